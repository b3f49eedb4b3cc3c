"""Packages from the mirror alone, administrators by key and by the management network alone, a journal that stays."""

import pytest
from labtools import FOLDER, LAB, hosts, until

MACHINES = sorted(hosts())


def sign_in(control, address, user, *options):
    """Try to sign in with the lab's key and return what ssh said."""
    done = control.run(
        "ssh",
        "-F",
        "none",
        "-o",
        "BatchMode=yes",
        "-o",
        f"UserKnownHostsFile={FOLDER}/ssh/known_hosts",
        "-i",
        f"{FOLDER}/ssh/id_ed25519",
        *options,
        f"{user}@{address}",
        "echo signed in",
    )
    return done.stdout + done.stderr


@pytest.fixture
def business(machines, addresses):
    """Machines whose business address is up; before the network role has run, it is set by hand."""
    added = []
    for name, machine in machines.items():
        address = f"{addresses[name]['business_address']}/24"
        if not machine.run(f"ip addr add {address} dev biz0 && ip link set biz0 up").rc:
            added.append((machine, address))
    yield
    for machine, address in added:
        machine.check_output(f"ip addr delete {address} dev biz0")


@pytest.mark.parametrize("name", MACHINES)
def test_packages_come_from_the_mirror_whatever_else_is_listed(machines, name):
    machine = machines[name]
    machine.check_output("echo 'deb http://192.0.2.1/debian bookworm main' > /etc/apt/sources.list.d/by-hand.list")
    sources = set(machine.check_output("apt-get indextargets --format '$(REPO_URI)'").split())
    machine.check_output("rm /etc/apt/sources.list.d/by-hand.list")
    assert sources == {"file:/srv/mirror/apt/" if name == "core1" else "http://10.0.0.11/apt/"}


@pytest.mark.parametrize("name", MACHINES)
def test_a_package_installs(machines, name):
    machine = machines[name]
    machine.check_output("apt-get --quiet --quiet --yes --reinstall install ca-certificates")
    assert machine.package("ca-certificates").is_installed


def test_a_mirror_that_somebody_else_signed_is_refused(model1):
    keyring = "/usr/share/keyrings/debian-archive-bookworm-stable.gpg"
    model1.check_output(f"echo 'deb [signed-by={keyring}] http://10.0.0.11/apt bookworm main' > /run/by-hand.list")
    model1.check_output("mkdir -p /run/by-hand/partial")
    refused = model1.run(
        "apt-get update --error-on=any -o Dir::Etc::sourceparts=/dev/null -o Dir::Etc::sourcelist=/run/by-hand.list"
        " -o Dir::State::Lists=/run/by-hand"
    )
    model1.check_output("rm -r /run/by-hand /run/by-hand.list")
    assert refused.rc != 0
    assert "NO_PUBKEY" in refused.stdout + refused.stderr


@pytest.mark.parametrize("name", MACHINES)
def test_administrators_sign_in_by_key_alone(control, addresses, name):
    address = addresses[name]["management_address"]
    assert "signed in" in sign_in(control, address, "ansible")
    refused = sign_in(control, address, "ansible", "-o", "PubkeyAuthentication=no")
    assert "Permission denied (publickey)" in refused  # no password was asked for


@pytest.mark.parametrize("name", MACHINES)
def test_root_does_not_sign_in(machines, control, addresses, name):
    machine = machines[name]
    machine.check_output("install -D -m 0600 /home/ansible/.ssh/authorized_keys /root/.ssh/authorized_keys")
    assert "Permission denied" in sign_in(control, addresses[name]["management_address"], "root")
    machine.check_output("rm -r /root/.ssh")


@pytest.mark.usefixtures("business")
@pytest.mark.parametrize("name", MACHINES)
def test_sshd_is_not_on_the_business_network(desk, addresses, name):
    assert desk.knock(addresses[name]["business_address"], 22)[22] in ("refused", "silent")


@pytest.mark.parametrize("name", MACHINES)
def test_the_journal_outlives_a_boot(machines, name):
    machine = machines[name]
    machine.check_output(f"logger --tag {LAB} 'a line to keep' && journalctl --sync")
    kept = machine.check_output("journalctl --directory=/var/log/journal --identifier=%s --output=cat --lines=1", LAB)
    assert kept == "a line to keep"


def test_settings_altered_by_hand_are_put_right(play, core1, model1, model2, control, addresses):
    core1.check_output("sed -i 's/Storage=.*/Storage=volatile/' /etc/systemd/journald.conf.d/50-chatnio.conf")
    model1.check_output(
        "sed -i 's/PasswordAuthentication no/PasswordAuthentication yes/' /etc/ssh/sshd_config.d/50-chatnio.conf"
        " && systemctl restart ssh"
    )
    model2.check_output("rm /etc/apt/apt.conf.d/90chatnio")
    without_key = ("ansible", "-o", "PubkeyAuthentication=no")
    until(lambda: "password" in sign_in(control, addresses["model1"]["management_address"], *without_key))

    run = play()

    assert set(run.changed) == {"core1", "model1", "model2"}, run.changed
    assert "(publickey)" in sign_in(control, addresses["model1"]["management_address"], *without_key)
    assert model2.check_output("apt-get indextargets --format '$(REPO_URI)'").split()[0] == "http://10.0.0.11/apt/"
    core1.check_output(f"logger --tag {LAB} 'after the run' && journalctl --sync")
    kept = core1.check_output("journalctl --directory=/var/log/journal --identifier=%s --output=cat --lines=1", LAB)
    assert kept == "after the run"
