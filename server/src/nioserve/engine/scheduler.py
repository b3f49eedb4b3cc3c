"""What runs in each step.

vLLM's rule: a sequence has tokens, and some of them are computed. There is no prefill phase and no decode phase; each
step has one budget of tokens, spent on the running sequences first and on the waiting ones after. A long prompt is
computed in chunks beside the others' single tokens.

Blocks are taken as a sequence grows. When none are left the sequence that was admitted last gives its blocks back,
returns to the head of the queue and is computed again later. The first admitted one always fits, because the pool holds
at least one whole context: so there is no deadlock, and every request ends.
"""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import dataclass, field

from nioserve.engine.blocks import BlockPool
from nioserve.engine.messages import Sampling


@dataclass(slots=True, eq=False)
class Sequence:
    """One request: its tokens so far, how many of them are computed, and the blocks it holds."""

    key: tuple[bytes, str]  # which worker, and its name for the request
    tokens: list[int]
    prompt_length: int
    max_tokens: int
    sampling: Sampling
    random: random.Random
    arrived: float = field(default_factory=time.monotonic)
    scheduled: float | None = None
    computed: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def generated(self) -> int:
        """Return the number of tokens generated so far."""
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True, slots=True)
class Slice:
    """`count` tokens of a sequence, to be computed in this step."""

    sequence: Sequence
    count: int

    @property
    def completes(self) -> bool:
        """Return whether all tokens are computed after this, so that the next one can be drawn."""
        return self.sequence.computed + self.count == len(self.sequence.tokens)


class Scheduler:
    """A bounded queue, the running sequences, and the pool of blocks they share."""

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int, max_num_queued: int) -> None:
        self.pool = pool
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0
        self._max_num_seqs, self._budget, self._max_queued = max_num_seqs, max_num_batched_tokens, max_num_queued
        self._by_key: dict[tuple[bytes, str], Sequence] = {}

    @property
    def has_work(self) -> bool:
        """Return whether any request is running or waiting."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> bool:
        """Queue a sequence; False when the queue is full. Room among the running ones counts as room."""
        room = self._max_queued + self._max_num_seqs - len(self.running)
        if len(self.waiting) >= room:
            return False
        self.waiting.append(sequence)
        self._by_key[sequence.key] = sequence
        return True

    def find(self, key: tuple[bytes, str]) -> Sequence | None:
        """Return the live sequence of that key."""
        return self._by_key.get(key)

    def of_worker(self, worker: bytes) -> list[Sequence]:
        """Return all live sequences of a worker."""
        return [sequence for key, sequence in self._by_key.items() if key[0] == worker]

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and take its blocks back."""
        self.pool.release(sequence.blocks)
        if self._by_key.pop(sequence.key, None) is None:
            return
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Slice]:
        """Choose what runs now. The counts sum up to the budget at most; all blocks they need are taken."""
        slices: list[Slice] = []
        budget = self._budget
        preempted = self.preemptions
        index = 0
        while index < len(self.running) and budget > 0:  # preempting shortens the list from its end
            sequence = self.running[index]
            count = min(len(sequence.tokens) - sequence.computed, budget)
            if not self._make_room(sequence, count):
                break  # it was the last one itself, and waits again
            slices.append(Slice(sequence, count))
            budget -= count
            index += 1
        if self.preemptions == preempted:  # else the blocks would go back and forth
            self._admit(slices, budget)
        return slices

    def _admit(self, slices: list[Slice], budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self._max_num_seqs:
            sequence = self.waiting[0]
            count = min(len(sequence.tokens), budget)
            if not self.pool.grow(sequence.blocks, count):
                return
            self.running.append(self.waiting.popleft())
            slices.append(Slice(sequence, count))
            budget -= count

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Take the blocks for `count` more tokens, from those admitted last if need be; False if it lost its own."""
        while not self.pool.grow(sequence.blocks, sequence.computed + count):
            victim = self.running.pop()
            self.pool.release(victim.blocks)
            victim.computed = 0
            self.waiting.appendleft(victim)
            self.preemptions += 1
            if victim is sequence:
                return False
        return True
