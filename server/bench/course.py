"""A load: when requests are sent, when counting begins and ends, and what one request looked like to its client.

Standard library only, because the adapters of library peers run it in their own environments: every peer is driven by
this very code. All times are seconds of the monotonic clock, which processes of one machine share.

Closed loop: each of `streams` sends its next request when the last one is complete. The starts are spread over `ramp`
seconds, else all streams would compute their prompts in the same instant for ever. Counting begins when the ramp is
over and the first request is complete, and ends after `seconds` and one complete request per stream, or after twice
`seconds`: no start-up and no tail is counted.

Open loop: Poisson arrivals at `rate` per second, whatever the server does. A request's time begins when it was due, not
when the client came to send it, so a client that is late cannot make a server look fast ("coordinated omission").
"""

from __future__ import annotations

import heapq
import random
from dataclasses import asdict, dataclass, field
from typing import Any

RETRY_SECONDS = 0.25
"""A closed stream that was refused waits this long, rather than asking as fast as it can."""

FIRST_SECONDS = 30.0
"""A closed loop waits at least this long for its first complete answer."""


@dataclass(frozen=True, slots=True)
class Load:
    """Either `streams` (closed loop) or `rate` in requests/s (open loop) is set.

    With `requests`, that many are sent and the load ends with the last of them, after `seconds` at the latest.
    """

    seconds: float
    ramp: float = 0.0
    streams: int = 0
    rate: float = 0.0
    requests: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be driven."""
        if (self.streams > 0) == (self.rate > 0):
            raise ValueError(f"a load needs streams or a rate, got streams={self.streams} and rate={self.rate}")
        if self.seconds <= 0 or self.ramp < 0:
            raise ValueError(f"a load needs seconds > 0 and ramp >= 0, got {self.seconds} and {self.ramp}")


@dataclass(slots=True)
class Record:
    """One request. `status` is 0 where none came, and 200 for a library's answer."""

    start: float
    status: int = 0
    answered: float | None = None  # when the status came
    times: list[float] = field(default_factory=list)  # when each piece of text came
    finished: float | None = None  # when the answer was complete
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retry_after: bool = False
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return asdict(self)


class Course:
    """One run of a load. Its caller has the clock: it asks what is due, and says what is complete."""

    def __init__(self, load: Load, begin: float) -> None:
        self.load = load
        self._begin = begin
        self._random = random.Random(load.seed)  # noqa: S311  arrivals, no secrets
        self._due: list[float] = []
        self._counted_from: float | None = None
        self._complete = 0
        self._sent = 0
        self._ended = 0
        if load.streams:
            self._due = [begin + load.ramp * number / load.streams for number in range(load.streams)]
        else:
            self._counted_from = begin + load.ramp
            self._due = [begin + self._gap()]

    def due(self, now: float) -> list[float]:
        """Return when each of the requests to send now was due."""
        starts = []
        while self._due and self._due[0] <= now:
            start = heapq.heappop(self._due)
            starts.append(start)
            self._sent += 1
            if self._sent == self.load.requests:
                self._due.clear()
                break
            if self.load.rate:
                heapq.heappush(self._due, start + self._gap())
        return starts

    def next_due(self) -> float | None:
        """Return when the next request is due; None while all streams are busy."""
        return self._due[0] if self._due else None

    def ended(self, now: float, well: bool) -> None:
        """Note the end of a request."""
        self._ended += 1
        if self.load.streams and not 0 < self.load.requests <= self._sent:
            heapq.heappush(self._due, now if well else now + RETRY_SECONDS)
        if not well:
            return
        if self._counted_from is None:
            self._counted_from = max(now, self._begin + self.load.ramp)
        elif now >= self._counted_from:
            self._complete += 1

    def over(self, now: float) -> bool:
        """Return whether counting has ended."""
        if self.load.requests:
            return self._ended >= self.load.requests or now >= self._begin + self.load.seconds
        if self._counted_from is None:  # not one complete answer yet
            return now >= self._begin + self.load.ramp + max(3 * self.load.seconds, FIRST_SECONDS)
        passed = now - self._counted_from
        if self.load.rate:
            return passed >= self.load.seconds
        enough = self._complete >= self.load.streams
        return passed >= self.load.seconds and (enough or passed >= 2 * self.load.seconds)

    def window(self, now: float) -> tuple[float, float]:
        """Return from when to when is counted, given that it ends now."""
        if self.load.requests:
            return (self._begin, now)
        return (self._begin if self._counted_from is None else min(self._counted_from, now), now)

    def _gap(self) -> float:
        return self._random.expovariate(self.load.rate)
