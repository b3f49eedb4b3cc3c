"""What no rule names is closed, both ways, and what isn't ours is left alone."""

import pytest
from labtools import hosts, knock_from, until

MACHINES = sorted(hosts())
UNNAMED = 9999


@pytest.fixture(scope="module", autouse=True)
def listeners(machines):
    """On every machine, something that a person started listens on every address, at a port that no rule names."""
    for machine in machines.values():
        machine.check_output(f"systemd-run --quiet --unit=by-hand python3 -m http.server --bind 0.0.0.0 {UNNAMED}")
    for machine in machines.values():
        until(lambda machine=machine: knock_from(machine, "127.0.0.1", UNNAMED) == {UNNAMED: "open"})
    yield
    for machine in machines.values():
        machine.check_output("systemctl stop by-hand")


@pytest.mark.parametrize("name", MACHINES)
def test_management_reaches_ssh_and_nothing_that_is_not_named(control, addresses, name):
    assert control.knock(addresses[name]["management_address"], 22, UNNAMED) == {22: "open", UNNAMED: "silent"}


@pytest.mark.parametrize("name", MACHINES)
def test_business_reaches_neither_ssh_nor_what_is_not_named(desk, addresses, name):
    answers = desk.knock(addresses[name]["business_address"], 22, 6379, 8000, 8001, UNNAMED)
    assert set(answers.values()) == {"silent"}, answers


def test_the_management_network_is_silent_by_way_of_the_business_network(desk, addresses):
    with desk.route("10.0.0.0/24", addresses["core1"]["business_address"]):
        for name in MACHINES:
            answers = desk.knock(addresses[name]["management_address"], 22, 80, 6379, 8001, UNNAMED)
            assert set(answers.values()) == {"silent"}, (name, answers)


def test_machines_reach_no_unnamed_port_of_each_other(model1, addresses):
    assert knock_from(model1, addresses["core1"]["management_address"], 80, UNNAMED) == {80: "open", UNNAMED: "silent"}
    assert knock_from(model1, addresses["model2"]["business_address"], 8000, UNNAMED) == {
        8000: "silent",
        UNNAMED: "silent",
    }


@pytest.mark.parametrize("name", MACHINES)
def test_machines_reach_nothing_outside_of_the_inventory(machines, control, name):
    with control.listener("10.0.0.250", UNNAMED):
        assert control.knock("10.0.0.250", UNNAMED) == {UNNAMED: "open"}
        assert knock_from(machines[name], "10.0.0.250", UNNAMED) == {UNNAMED: "silent"}


@pytest.mark.parametrize("name", MACHINES)
def test_rules_come_back_with_the_machine(machines, name):
    # What a boot does: no table is in the kernel, the unit is started.
    machine = machines[name]
    assert machine.service("chatnio-firewall").is_enabled
    machine.check_output("nft delete table inet chatnio && systemctl restart chatnio-firewall")
    assert machine.run("nft list chain inet chatnio input").stdout.count("policy drop") == 1


def test_rules_altered_by_hand_are_put_right_and_those_of_others_are_left(play, machines, control, addresses):
    machines["core1"].check_output(f"nft insert rule inet chatnio input tcp dport {UNNAMED} accept")
    machines["model1"].check_output("nft delete table inet chatnio")
    machines["model1"].check_output(
        "nft 'table inet others { chain theirs { type filter hook input priority 10; tcp dport 9 counter drop; }; }'"
    )
    for name in ("core1", "model1"):
        assert control.knock(addresses[name]["management_address"], UNNAMED) == {UNNAMED: "open"}

    run = play()

    assert set(run.changed) == {"core1", "model1"}, run.changed
    for name in ("core1", "model1"):
        assert control.knock(addresses[name]["management_address"], 22, UNNAMED) == {22: "open", UNNAMED: "silent"}
    assert "tcp dport 9" in machines["model1"].check_output("nft list table inet others")
    machines["model1"].check_output("nft delete table inet others")


def test_a_file_altered_by_hand_is_put_right(play, model2, control, addresses):
    model2.check_output(
        f"sed -i '/^    chain input/a tcp dport {UNNAMED} accept' /etc/chatnio/firewall.nft"
        " && systemctl reload chatnio-firewall"
    )
    assert control.knock(addresses["model2"]["management_address"], UNNAMED) == {UNNAMED: "open"}
    assert set(play().changed) == {"model2"}
    assert control.knock(addresses["model2"]["management_address"], UNNAMED) == {UNNAMED: "silent"}


def test_a_new_row_opens_its_port_and_nothing_else(play, control, desk, addresses):
    row = {"name": "trial", "network": "management", "port": UNNAMED, "from": ["network"], "to": ["model_nodes"]}
    assert set(play(firewall_extra_services=[row]).changed) == {"model1", "model2"}
    assert control.knock(addresses["model1"]["management_address"], UNNAMED) == {UNNAMED: "open"}
    assert control.knock(addresses["core1"]["management_address"], UNNAMED) == {UNNAMED: "silent"}
    assert desk.knock(addresses["model1"]["business_address"], UNNAMED) == {UNNAMED: "silent"}
    assert set(play().changed) == {"model1", "model2"}
    assert control.knock(addresses["model1"]["management_address"], UNNAMED) == {UNNAMED: "silent"}
