"""A circuit breaker: after too many failures in a row nobody knocks for a while, then one tries first.

The pattern is Nygard's (Release It!, 2nd ed., section 5.2). Each API worker has its own breakers, so nothing is shared
but the upstream itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Breaker:
    """Closed: all pass. Open, for `cooldown` seconds after `failures` in a row: none. Half-open: one, which decides."""

    def __init__(self, failures: int, cooldown: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._cooldown, self._clock = failures, cooldown, clock
        self._failures = 0
        self._opened: float | None = None
        self._trial = False

    @property
    def state(self) -> str:
        """Return `closed`, `open` or `half-open`."""
        if self._opened is None:
            return "closed"
        return "open" if self.wait > 0 else "half-open"

    @property
    def wait(self) -> float:
        """Return the seconds until a request may pass: 0 when one may now, unless another is trying already."""
        return 0.0 if self._opened is None else max(0.0, self._opened + self._cooldown - self._clock())

    def allow(self) -> bool:
        """Return whether a request may pass. One that may must end in `succeeded`, `failed` or `abandoned`."""
        if self._opened is None:
            return True
        if self.wait > 0 or self._trial:
            return False
        self._trial = True
        return True

    def succeeded(self) -> None:
        """Note that the upstream answered."""
        self._failures, self._opened, self._trial = 0, None, False

    def failed(self) -> None:
        """Note that it did not; a failed trial opens again at once."""
        self._failures += 1
        if self._trial or self._failures >= self._limit:
            self._opened, self._trial = self._clock(), False

    def abandoned(self) -> None:
        """Note that the request ended by no fault of the upstream, such as a client that hung up; the next may try."""
        self._trial = False
