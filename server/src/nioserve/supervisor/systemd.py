"""Word to systemd: the notification protocol is one datagram, which needs no library."""

from __future__ import annotations

import os
import socket

_SECONDS = 1.0


def notify(state: str) -> None:
    """Send a state such as `READY=1`; without systemd, or when it does not listen, nothing happens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.settimeout(_SECONDS)  # a listener that does not read must not stop the service
        try:
            channel.sendto(state.encode(), address)
        except OSError:
            return


def watchdog_seconds() -> float | None:
    """Return how often systemd wants to hear from us (half of its limit, as it advises), or None."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    text = os.environ.get("WATCHDOG_USEC", "")
    return int(text) / 2e6 if text.isdecimal() and int(text) > 0 else None
