"""Who gets into a queue, and who is told to come back, and when.

The engine reads its messages between two steps, so an answer from it may take as long as a step. When all but a
twentieth of a queue is taken the workers are told (`messages.Load`) and refuse by themselves, at once, until a tenth is
free again. The twentieth takes in what they send before they hear of it. The engine's own word counts: it checks each
request that reaches it.
"""

from __future__ import annotations

import math

from nioserve.engine.limits import Limits
from nioserve.engine.messages import Full, Load, Rejected, Submit
from nioserve.engine.queues import Queue
from nioserve.engine.scheduler import Scheduler

_CLOSE_AT, _REOPEN_BELOW = 0.95, 0.9
_LONGEST_WAIT = 60
_MEMORY_SECONDS = 10.0
"""Speeds are means of about this time."""


class Pace:
    """How fast the engine works: tokens in a second of its steps, and tokens in an answer."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0
        self._answer = 128.0

    @property
    def tokens_per_second(self) -> float:
        """Return the speed; before the first step a guess."""
        return self._tokens / self._seconds if self._seconds else 1000.0

    @property
    def answer(self) -> float:
        """Return the usual length of an answer, in tokens."""
        return self._answer

    def step(self, tokens: int, seconds: float) -> None:
        """Note a step."""
        fade = math.exp(-seconds / _MEMORY_SECONDS)
        self._tokens = self._tokens * fade + tokens
        self._seconds = self._seconds * fade + max(seconds, 1e-6)

    def answered(self, tokens: int) -> None:
        """Note the length of an answer."""
        self._answer += 0.05 * (tokens - self._answer)


class Admission:
    """Bounds each queue by requests and by prompt tokens."""

    def __init__(self, scheduler: Scheduler, limits: Limits) -> None:
        self.pace = Pace()
        self._scheduler, self._limits = scheduler, limits
        self._full: dict[Queue, str] = {}  # and which bound it has reached

    def refuse(self, request: Submit, elsewhere: int = 0) -> Rejected | None:
        """Return why a request is not taken, or None. `too_long`: it can never be; the others name a retry.

        `elsewhere` is how many requests are on their way to the queue.
        """
        length = len(request.prompt)
        if length + request.max_tokens > self._limits.max_model_len:
            return Rejected(request.request_id, "too_long", 0)
        queue = self._scheduler.queue_of(request.long_conversation)
        reason = "queue_full" if elsewhere > queue.limits.max_requests else self._reached(queue, length)
        if reason is None:
            return None
        self._full[queue] = reason
        return Rejected(request.request_id, reason, self.retry_after(queue))

    def load(self) -> Load:
        """Return which queues workers need not ask for."""
        short, conversations = (self._state(queue) for queue in self._scheduler.queues)
        return Load(short, conversations)

    def retry_after(self, queue: Queue) -> int:
        """Return in how many seconds half of what waits will have been served: 1 to 60."""
        scheduler, work = self._scheduler, queue.waiting_tokens + len(queue.waiting) * self.pace.answer
        contested = all(one.active for one in scheduler.queues)
        speed = self.pace.tokens_per_second * (queue.limits.share if contested else 1)
        return min(_LONGEST_WAIT, max(1, math.ceil(work / speed / 2)))

    def _reached(self, queue: Queue, prompt: int) -> str | None:
        """Return the bound that one more request would break. A free seat is room, whatever waits for the others."""
        seats = self._limits.max_num_seqs - len(self._scheduler.running)
        waiting = len(queue.waiting)
        if waiting < seats:
            return None
        if waiting >= queue.limits.max_requests + seats:
            return "queue_full"
        if queue.waiting and queue.waiting_tokens + prompt > queue.limits.max_tokens:
            return "queue_tokens"
        return None

    def _state(self, queue: Queue) -> Full | None:
        """Return what workers are told of a queue; between the two marks that is what they were told before."""
        limits, waiting = queue.limits, len(queue.waiting)
        requests = waiting / limits.max_requests if limits.max_requests else 1.0
        tokens = queue.waiting_tokens / limits.max_tokens
        if waiting < self._limits.max_num_seqs - len(self._scheduler.running) or max(requests, tokens) < _REOPEN_BELOW:
            self._full.pop(queue, None)
        elif max(requests, tokens) >= _CLOSE_AT:
            self._full[queue] = "queue_full" if requests >= tokens else "queue_tokens"
        reason = self._full.get(queue)
        return None if reason is None else Full(reason, self.retry_after(queue))
