"""Fixtures of every scenario: the lab's machines, the two places outside of them, and runs of the role."""

import shlex
import subprocess

import labtools
import pytest
import testinfra
from labtools import LAB, Place


@pytest.fixture(scope="session")
def control():
    """The machine that runs Ansible: 10.0.0.250, on the management network alone."""
    return Place(LAB)


@pytest.fixture(scope="session")
def desk():
    """A user's machine: 192.168.1.250, on the business network alone."""
    return Place(f"{LAB}-user")


@pytest.fixture(scope="session")
def ssh(tmp_path_factory):
    """OpenSSH's configuration for the lab's machines, as a file."""
    config = tmp_path_factory.mktemp("ssh") / "config"
    config.write_text(labtools.ssh_config())
    return str(config)


@pytest.fixture(scope="session")
def machines(ssh):
    """The lab's machines by name, reached as Ansible reaches them; commands run as root."""
    return {name: testinfra.get_host(f"ssh://{name}", ssh_config=ssh, sudo=True) for name in labtools.hosts()}


@pytest.fixture(scope="session")
def feed(ssh):
    """Runs a command on a machine as root with text as its input, for what must not stand in a command line."""

    def run(name, text, *command):
        words = ["ssh", "-F", ssh, name, "sudo", shlex.join(command)]
        return subprocess.run(words, input=text, capture_output=True, text=True, timeout=120, check=False)

    return run


@pytest.fixture(scope="session")
def core1(machines):
    """The machine that is everything but a model node."""
    return machines["core1"]


@pytest.fixture(scope="session")
def model1(machines):
    """The first model node."""
    return machines["model1"]


@pytest.fixture(scope="session")
def model2(machines):
    """The second model node."""
    return machines["model2"]


@pytest.fixture(scope="session")
def addresses():
    """Addresses by machine: `management_address` and `business_address`."""
    return labtools.hosts()


@pytest.fixture(scope="session")
def play():
    """Runs the scenario's role again: `play("--check", variable=value).changed`."""
    return labtools.play
