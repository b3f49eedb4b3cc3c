"""Two networks that stay apart, on machines that know each other."""

import pytest
from labtools import hosts, knock_from, until

MACHINES = sorted(hosts())


@pytest.mark.parametrize("name", MACHINES)
def test_the_business_address_answers_the_business_network(desk, addresses, name):
    assert desk.pings(addresses[name]["business_address"])


@pytest.mark.parametrize("name", MACHINES)
def test_no_machine_answers_for_its_management_address_on_the_business_network(desk, addresses, name):
    # As if 10.0.0.0/24 were on that cable. What is sent to a machine as a router is the firewall's to drop.
    desk.run("ip", "route", "replace", "10.0.0.0/24", "dev", "eth0")
    answers = desk.knock(addresses[name]["management_address"], 22)
    desk.run("ip", "route", "delete", "10.0.0.0/24")
    assert answers[22] in ("silent", "EHOSTUNREACH")


def test_no_machine_is_a_router_between_the_networks(desk, addresses):
    with desk.route("10.0.0.0/24", addresses["core1"]["business_address"]):
        for other in ("model1", "model2"):
            assert not desk.pings(addresses[other]["management_address"]), other


@pytest.mark.parametrize("name", MACHINES)
def test_machines_know_each_other_by_name(machines, addresses, name):
    for other in set(MACHINES) - {name}:
        found = machines[name].check_output(f"getent ahostsv4 {other}").split()[0]
        assert found == addresses[other]["management_address"]


def test_a_name_leads_to_its_machine(model1):
    assert knock_from(model1, "core1", 80) == {80: "open"}


def test_settings_altered_by_hand_are_put_right(play, core1, model1, desk, addresses):
    core1.check_output(
        "sed -i 's/rp_filter = 1/rp_filter = 0/' /etc/sysctl.d/60-chatnio-network.conf"
        " && sysctl -q --load=/etc/sysctl.d/60-chatnio-network.conf && sed -i 's/ model2$/ model9/' /etc/hosts"
    )
    model1.check_output(
        "sed -i 's/^Address=.*/Address=192.168.1.99\\/24/' /etc/systemd/network/20-chatnio-business.network"
        " && networkctl reload"
    )
    assert core1.check_output("sysctl -n net.ipv4.conf.all.rp_filter") == "0"
    until(lambda: not desk.pings(addresses["model1"]["business_address"]))

    run = play()

    assert set(run.changed) == {"core1", "model1"}, run.changed
    assert core1.check_output("sysctl -n net.ipv4.conf.all.rp_filter") == "1"
    assert core1.check_output("getent ahostsv4 model2").split()[0] == addresses["model2"]["management_address"]
    until(lambda: desk.pings(addresses["model1"]["business_address"]))
    until(lambda: not desk.pings("192.168.1.99"))
