"""The two queues, long conversations and short ones, and whose turn it is.

Weighted fair queueing over tokens: each queue's `served` grows by the tokens computed for it divided by its share, and
the one that is behind comes first. A queue that was idle begins where the other is, so that nobody saves up time; one
that asks for less than its share leaves the rest to the other. (Start-time fair queueing, Goyal 1996; with tokens as
the unit and a lift after idleness it is the virtual token counter of Sheng et al., "Fairness in Serving Large Language
Models", OSDI 2024.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as SequenceOf

from nioserve.engine.limits import QueueLimits
from nioserve.engine.sequence import Sequence

_QUANTUM = 16
"""Tokens handed out at a time when two queues share a step."""


class Queue:
    """One class of requests: those that wait, how many run, and how much was computed for them."""

    def __init__(self, limits: QueueLimits, max_num_seqs: int) -> None:
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running = 0
        self.served = 0.0
        # With one seat there is nothing to divide: then the turn alone decides.
        self.quota = max(1, int(limits.share * max_num_seqs)) if max_num_seqs > 1 else 0

    @property
    def active(self) -> bool:
        """Return whether any request is running or waiting."""
        return self.running > 0 or bool(self.waiting)

    @property
    def floods(self) -> bool:
        """Return whether it has more requests than its share of seats."""
        return self.running + len(self.waiting) > self.quota

    @property
    def entitled(self) -> int:
        """Return how many of the waiting ones have a right to a seat now."""
        return max(0, min(len(self.waiting), self.quota - self.running))

    @property
    def waiting_tokens(self) -> int:
        """Return how many tokens of those that wait are not computed."""
        return sum(sequence.remaining for sequence in self.waiting)

    def charge(self, tokens: int) -> None:
        """Note tokens that are computed for this queue."""
        self.served += tokens / self.limits.share


def level(queues: SequenceOf[Queue], budget: int) -> None:
    """Let no queue fall behind by more than one step: what it did not ask for then, it does not get later."""
    ahead = max(queue.served for queue in queues)
    for queue in queues:
        queue.served = max(queue.served, ahead - budget / queue.limits.share)


def divide(queues: SequenceOf[Queue], demands: SequenceOf[int], budget: int) -> list[int]:
    """Return how many tokens of the budget each queue gets, at most its demand: always to the one that is behind."""
    parts = [0] * len(queues)
    served = [queue.served for queue in queues]
    while budget > 0:
        hungry = [index for index, demand in enumerate(demands) if parts[index] < demand]
        if not hungry:
            break
        if len(hungry) == 1:
            index = hungry[0]
            parts[index] += min(demands[index] - parts[index], budget)
            break
        index = min(hungry, key=lambda one: served[one])
        count = min(_QUANTUM, demands[index] - parts[index], budget)
        parts[index] += count
        served[index] += count / queues[index].limits.share
        budget -= count
    return parts
