"""A lab is real where it matters, cut off, and gone without a trace when it is taken down."""

import os
import subprocess
from pathlib import Path

import pytest
from labtools import FOLDER, INVENTORY, LAB, ROOT, hosts, knock_from, until

MACHINES = sorted(hosts())
CGROUPS = Path("/sys/fs/cgroup")


def traces():
    """Return everything on this machine that is of the lab."""
    commands = [
        f"{process.name}: {line}"
        for process in Path("/proc").glob("[0-9]*")
        if (line := read(process / "cgroup")) and f"/chatnio-lab/{LAB}/" in line
    ]
    mounts = [line for line in read(Path("/proc/mounts")).splitlines() if str(FOLDER) in line]
    groups = [str(group) for group in CGROUPS.glob(f"*/chatnio-lab/{LAB}")]
    namespaces = [name for name in (LAB, f"{LAB}-user") if Path("/run/netns", name).exists()]
    return commands + mounts + groups + namespaces + ([str(FOLDER)] if FOLDER.exists() else [])


def read(path):
    """Return a file's text; none for that of a process that has just ended."""
    try:
        return path.read_text()
    except OSError:
        return ""


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_reaches_its_networks_and_nothing_else(machines, name):
    machine = machines[name]
    assert "default" not in machine.check_output("ip route")
    assert knock_from(machine, "10.0.0.250", 9) == {9: "refused"}
    assert knock_from(machine, "192.0.2.1", 80) == {80: "ENETUNREACH"}


def test_neither_do_the_places_around_them(control, desk):
    for place in (control, desk):
        assert place.knock("192.0.2.1", 80) == {80: "ENETUNREACH"}
    assert desk.knock("10.0.0.250", 22) == {22: "ENETUNREACH"}


@pytest.mark.parametrize("name", MACHINES)
def test_the_limits_of_a_unit_hold(machines, name):
    def eats(limit):
        """Say whether a unit with this limit may hold 200 MB."""
        limited = f"systemd-run --quiet --wait --collect --property=MemoryMax={limit}"
        return machines[name].check_output(f"{limited} python3 -c %s && echo ate || echo killed", "b'x' * 200_000_000")

    assert eats("400M") == "ate"
    assert eats("50M") == "killed"


def test_a_machine_that_died_comes_back_with_its_files(core1, ssh):
    core1.check_output("touch /var/lib/kept")
    pids = {int(pid) for pid in (CGROUPS / f"systemd/chatnio-lab/{LAB}/core1/cgroup.procs").read_text().split()}
    for pid in pids:
        os.kill(pid, 9)
    playbook("lab_up.yml")
    assert subprocess.run(["ssh", "-F", ssh, "core1", "test", "-e", "/var/lib/kept"], check=False).returncode == 0


def test_nothing_is_left_of_a_lab_that_was_taken_down():
    assert traces()
    playbook("lab_down.yml")
    until(lambda: not traces())  # a process that was killed takes a moment to be gone
    playbook("lab_down.yml")  # nor does a second time hurt


def playbook(name):
    """Run one of the lab's playbooks."""
    subprocess.run(["ansible-playbook", f"--inventory={INVENTORY}", f"playbooks/{name}"], cwd=ROOT, check=True)
