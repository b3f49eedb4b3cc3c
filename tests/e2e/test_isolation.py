"""Two networks: what is open, what is closed, and what can't be reached at all."""

import pytest

from .conftest import ADDRESSES, Lab

CLOSED_TO_USERS = [
    ("192.168.1.11", 22),
    ("192.168.1.11", 6379),
    ("192.168.1.21", 8000),
    ("192.168.1.22", 8000),
    ("192.168.1.21", 8001),
    ("192.168.1.21", 22),
]
CLOSED_TO_MANAGEMENT = [
    ("10.0.0.11", 443),
    ("10.0.0.11", 6379),
    ("10.0.0.21", 8000),
    ("10.0.0.21", 8001),
    ("10.0.0.11", 80),
]


def test_users_reach_the_gateway(platform: Lab) -> None:
    assert platform.reaches(ADDRESSES["core1"], 443, desk=True)


@pytest.mark.parametrize(("address", "port"), CLOSED_TO_USERS)
def test_users_reach_nothing_else(platform: Lab, address: str, port: int) -> None:
    assert not platform.reaches(address, port, desk=True)


def test_the_control_machine_reaches_ssh(platform: Lab) -> None:
    assert platform.reaches("10.0.0.21", 22, desk=False)


@pytest.mark.parametrize(("address", "port"), CLOSED_TO_MANAGEMENT)
def test_a_machine_that_is_in_no_group_reaches_no_service(platform: Lab, address: str, port: int) -> None:
    assert not platform.reaches(address, port, desk=False)


@pytest.mark.parametrize("host", ADDRESSES)
def test_machines_have_no_way_out(platform: Lab, host: str) -> None:
    assert "default" not in platform.on(host, "ip route")
    assert "unreachable" in platform.on(
        host,
        'ping -c1 -W1 192.0.2.1 2>&1 || python3 -c "import socket; '
        "socket.create_connection(('192.0.2.1', 80), 1)\" 2>&1",
        check=False,
    )


@pytest.mark.parametrize("host", ADDRESSES)
def test_nothing_listens_on_every_network(platform: Lab, host: str) -> None:
    listening = platform.on(host, "ss -Hltun | awk '{print $5}'").split()
    assert listening
    assert not [address for address in listening if address.startswith(("0.0.0.0:", "*:", "[::]:"))]
