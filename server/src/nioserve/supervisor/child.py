"""Starting a child process, and starting it again when it died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from nioserve.parent import PARENT_ENV

_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0
_HEALTHY_SECONDS = 60.0


@dataclass(slots=True)
class Backoff:
    """How long to wait before the next start: twice as long after each death, unless it had lived a while."""

    delay: float = _FIRST_DELAY
    not_before: float = 0.0

    def died(self, lifetime: float) -> None:
        """Note a death after `lifetime` seconds."""
        if lifetime >= _HEALTHY_SECONDS:
            self.delay = _FIRST_DELAY
        self.not_before = time.monotonic() + self.delay
        self.delay = min(self.delay * 2, _LONGEST_DELAY)

    @property
    def over(self) -> bool:
        """Return whether the wait is over."""
        return time.monotonic() >= self.not_before


@dataclass(slots=True)
class Child:
    """A running child process."""

    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)
    ready: bool = False
    heard: float = 0.0  # when it last gave a sign of life

    @classmethod
    def start(
        cls, module: str, arguments: Sequence[str], environment: dict[str, str], keep: Sequence[int] = ()
    ) -> Child:
        """Run `python -m module arguments`. It inherits the descriptors in `keep` and no others.

        In a session of its own: Ctrl-C at a terminal reaches the supervisor alone, which ends its children in order.
        """
        command = [sys.executable, "-m", module, *arguments]
        environment = {**os.environ, **environment, PARENT_ENV: str(os.getpid())}
        return cls(subprocess.Popen(command, env=environment, pass_fds=keep, start_new_session=True))

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self.process.pid

    @property
    def lifetime(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.started

    def exit_status(self) -> int | None:
        """Return the exit status (negative: the signal that ended it), or None while it runs."""
        return self.process.poll()

    def send(self, number: signal.Signals) -> None:
        """Send a signal; one that has ended meanwhile is left in peace."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it at once, and wait until it has."""
        self.process.kill()
        self.process.wait()
