# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)
"""Each machine's operating system: reachable, supported, and in step with the controller's clock."""

from __future__ import annotations

from collections.abc import Iterator

from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.finding import Finding
from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.site import Machine, Rules, Site

ARCHITECTURE = "x86_64"
INIT = "systemd"
PYTHON = (3, 9)


def check_system(site: Site, rules: Rules) -> Iterator[Finding]:
    """Yield machines that don't answer, and what is wrong with the system of those that do."""
    for machine in site.machines.values():
        if machine.silence:
            yield Finding(
                machine.name,
                "connection",
                found=machine.silence,
                needed="a machine that Ansible can log in to and run Python on",
                mend="check power, cabling, SSH key, sudo and ansible_host",
            )
    for machine in site.reporting():
        yield from _check_distribution(machine, rules)
        yield from _check_foundations(machine)
        yield from _check_clock(machine, rules.clock_tolerance)


def _check_distribution(machine: Machine, rules: Rules) -> Iterator[Finding]:
    name, version = machine.facts["distribution"], str(machine.facts["distribution_version"])
    # Debian is released by its major number (12.11 is 12), Ubuntu by both (22.04).
    major = machine.facts["distribution_major_version"]
    releases = {f"{name} {version}", f"{name} {major}"}
    supported = next((system for system in rules.systems if system in releases), None)
    tested = [system for system, traits in rules.systems.items() if traits["tested"]]
    if supported is None:
        yield Finding(
            machine.name,
            "system",
            found=f"{name} {version}",
            needed=f"one of {', '.join(rules.systems)}",
            mend=f"install {tested[0]}",
        )
    elif supported not in tested:
        yield Finding(
            machine.name,
            "system",
            found=f"{supported}, supported but untested",
            needed=f"{', '.join(tested)} for what every release is tested on",
            mend=f"try it on a staging site first, or install {tested[0]}",
            fatal=False,
        )


def _check_foundations(machine: Machine) -> Iterator[Finding]:
    if (architecture := machine.facts["architecture"]) != ARCHITECTURE:
        yield Finding(
            machine.name,
            "architecture",
            architecture,
            ARCHITECTURE,
            "use another machine: the bundle has no other packages",
        )
    if (init := machine.facts["service_mgr"]) != INIT:
        yield Finding(machine.name, "init system", init, INIT, "boot it with systemd (package systemd-sysv)")
    version = machine.facts["python"]["version"]
    if (version["major"], version["minor"]) < PYTHON:
        yield Finding(
            machine.name,
            "python",
            found=f"{version['major']}.{version['minor']} ({machine.facts['python']['executable']})",
            needed=f"{PYTHON[0]}.{PYTHON[1]} or newer",
            mend="install the system's python3, or point ansible_python_interpreter to it",
        )


def _check_clock(machine: Machine, tolerance: float) -> Iterator[Finding]:
    offset = machine.facts.get("onprem_hardware", {}).get("clock_offset", 0)
    if abs(offset) > tolerance:
        yield Finding(
            machine.name,
            "clock",
            found=f"{abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'} the controller",
            needed=f"a difference of at most {tolerance:g} s",
            mend="set its clock (timedatectl set-time), then let it follow the site's time server",
        )
