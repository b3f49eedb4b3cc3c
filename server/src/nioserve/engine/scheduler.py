"""What runs in each step.

vLLM's rule: a sequence has tokens, and some of them are computed. There is no prefill phase and no decode phase; each
step has one budget of tokens. First come the running sequences that answer, one token each (and guesses, if few run);
what is left goes to prompts, shared by the two queues (`engine.queues`). Within a queue the oldest prompt comes first;
where it needs several steps, prompts that fit in half of what the queue gets pass it.

Seats are shared too. While only one queue has requests it may take all of them; when the other comes, the newest beyond
the first one's share are paused: they keep their blocks as long as nobody needs them, and go on from there.

All blocks of a prompt are taken when it is admitted, those of an answer as it grows. When none are left the newest
sequence gives its own back and is computed again later. The oldest always fits, because the pool holds at least one
whole context: so there is no deadlock, and every request ends.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from itertools import count

from nioserve.engine.blocks import BlockPool
from nioserve.engine.limits import Limits
from nioserve.engine.prefix import PrefixCache
from nioserve.engine.queues import Queue, divide, level
from nioserve.engine.sequence import Sequence, Slice

_FLOOD_PART = 6
"""A queue that floods gets this part of the budget for prompts while the other has a few requests only.

Simulated with the step times of a 135M model on two cores (8 ms, 0.7 an answer, 0.2 a prompt token), 256 tokens a step:
two short requests a second beside 64 streams of long ones see 1.8 times the p95 time to first token that they have
alone, long ones beside short streams 1.6 times.
"""


class Scheduler:
    """The queues, the running sequences, and the pool of blocks they share."""

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        self.pool = pool
        self.prefix = PrefixCache(pool) if limits.prefix_cache else None
        self.running: list[Sequence] = []  # by ticket: the newest is the last
        self.short = Queue(limits.short, limits.max_num_seqs)
        self.conversations = Queue(limits.conversations, limits.max_num_seqs)
        self.queues = (self.short, self.conversations)
        self.preemptions = 0
        self._limits = limits
        self._paused: list[Sequence] = []  # they wait, and hold blocks
        self._tickets = count()
        self._by_key: dict[tuple[bytes, str], Sequence] = {}

    @property
    def has_work(self) -> bool:
        """Return whether any request is running or waiting."""
        return bool(self._by_key)

    @property
    def waiting(self) -> int:
        """Return how many requests wait."""
        return len(self._by_key) - len(self.running)

    @property
    def sequences(self) -> list[Sequence]:
        """Return all live sequences, those first that came first."""
        return list(self._by_key.values())

    def queue_of(self, long_conversation: bool) -> Queue:
        """Return the queue for a kind of request."""
        return self.conversations if long_conversation else self.short

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; whether there is room for it `engine.admission` says."""
        queue, other = self._queues_of(sequence)
        if not queue.active and other.active:
            queue.served = max(queue.served, other.served)
        queue.waiting.append(sequence)
        self._by_key[sequence.key] = sequence

    def find(self, key: tuple[bytes, str]) -> Sequence | None:
        """Return the live sequence of that key."""
        return self._by_key.get(key)

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and take its blocks back."""
        self.pool.release(sequence.blocks)
        if self._by_key.pop(sequence.key, None) is None:
            return
        queue, _ = self._queues_of(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
            queue.running -= 1
        else:
            queue.waiting.remove(sequence)
            if sequence in self._paused:
                self._paused.remove(sequence)

    def advance(self, sequence: Sequence, tokens: int) -> None:
        """Note that so many more tokens of a sequence are computed."""
        sequence.computed += tokens
        if self.prefix is not None:
            self.prefix.publish(sequence)

    def schedule(self) -> list[Slice]:
        """Choose what runs now. The tokens sum up to the budget at most; all blocks they need are taken."""
        budget = self._limits.max_num_batched_tokens
        level(self.queues, budget)
        for queue in self.queues:
            self._make_way(queue, budget)
        preemptions = self.preemptions
        slices = self._answers(budget)
        budget -= sum(part.count + len(part.drafts) for part in slices)
        if len(slices) < len(self.running) or self.waiting:
            # Nobody is admitted after a preemption: the blocks would go back and forth.
            self._prompts(slices, budget, admit=self.preemptions == preemptions)
        return slices

    def _queues_of(self, sequence: Sequence) -> tuple[Queue, Queue]:
        """Return a sequence's own queue, and the other."""
        return self.queues if not sequence.long_conversation else (self.conversations, self.short)

    def _of(self, queue: Queue) -> list[Sequence]:
        """Return a queue's running sequences, the oldest first."""
        return [sequence for sequence in self.running if self._queues_of(sequence)[0] is queue]

    def _make_way(self, queue: Queue, budget: int) -> None:
        """Get seats and blocks for those that wait and have a right to them, as far as this step can serve them."""
        if not queue.entitled:
            return
        other = self.short if queue is self.conversations else self.conversations
        seats, tokens = self._limits.max_num_seqs - len(self.running), 0
        for sequence in [queue.waiting[index] for index in range(queue.entitled)]:
            if seats > 0:
                seats -= 1
            elif other.running > other.quota:
                self._pause(self._of(other)[-1])
            else:
                return
            while not self._attainable(sequence):
                rivals = self._of(other)
                if len(rivals) < 2 or sum(len(one.blocks) for one in rivals) <= other.limits.share * self.pool.total:
                    return
                self._preempt(rivals[-1])
            tokens += sequence.remaining
            if tokens >= budget:
                return

    def _answers(self, budget: int) -> list[Slice]:
        """Return the slices of running sequences that lack one token, and take their blocks."""
        slices: list[Slice] = []
        index = 0
        while index < len(self.running):  # preempting shortens the list from its end
            sequence = self.running[index]
            index += 1
            if sequence.remaining > 1:
                continue
            if not self._make_room(sequence):
                break  # it was the newest itself, and waits again
            drafts = self._drafts(sequence, budget // len(self.running) - 1)
            slices.append(Slice(sequence, 1, drafts))
            self._queues_of(sequence)[0].charge(1 + len(drafts))
        return slices

    def _drafts(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        """Return guesses for a sequence, if few run, that neither its length nor the pool forbids."""
        limits = self._limits
        if sequence.drafter is None or len(self.running) > limits.speculate_max_num_seqs:
            return ()
        wanted = min(limits.speculate_tokens, sequence.max_tokens - sequence.generated - 1, most)
        before_end = sequence.state.sampling.min_tokens - sequence.generated - 1
        if before_end >= 0:  # no end token before, so all rows of a step must lie on the same side
            wanted = min(wanted, before_end)
        drafts = sequence.drafter.propose(sequence.tokens, wanted)
        return drafts if self.pool.grow(sequence.blocks, len(sequence.tokens) + len(drafts)) else ()

    def _prompts(self, slices: list[Slice], budget: int, *, admit: bool) -> None:
        """Add the slices of prompts, shared by the queues; the one that is behind chooses first."""
        order = sorted(self.queues, key=lambda queue: queue.served)
        free = self._limits.max_num_seqs - len(self.running) if admit else 0
        seats = [max(0, free - order[1 - index].entitled) for index in range(2)]
        demands = [self._demand(queue, seats[index], budget) for index, queue in enumerate(order)]
        for index, other in ((0, 1), (1, 0)):
            if self._holds_up(order[index], order[other]):
                most = self._limits.max_num_batched_tokens // _FLOOD_PART - demands[other]
                demands[index] = min(demands[index], max(1, most))
        left = 0
        for index, tokens in enumerate(divide(order, demands, budget)):
            left = self._fill(order[index], min(tokens + left, demands[index]), seats[index], slices)

    def _holds_up(self, queue: Queue, other: Queue) -> bool:
        """Return whether long steps for a flooding queue would make the other's few requests wait.

        Not when it is half a step behind its share: then it has a right to more.
        """
        half = self._limits.max_num_batched_tokens / 2 / queue.limits.share
        return queue.floods and other.active and not other.floods and queue.served + half > other.served

    def _demand(self, queue: Queue, seats: int, most: int) -> int:
        """Return how many prompt tokens of a queue could be computed now, up to `most`."""
        total = 0
        for sequence in self._candidates(queue, seats):
            total += sequence.remaining
            if total >= most:
                return most
        return total

    def _candidates(self, queue: Queue, seats: int) -> Iterator[Sequence]:
        """Yield the sequences whose prompt is not computed: running ones, then as many waiting ones as may sit down."""
        yield from [sequence for sequence in self._of(queue) if sequence.remaining > 1]
        if seats > 0:
            yield from tuple(queue.waiting)

    def _fill(self, queue: Queue, tokens: int, seats: int, slices: list[Slice]) -> int:
        """Spend tokens on a queue's prompts; return how many are left."""
        longest: Sequence | None = None  # the oldest prompt that this step cannot complete
        passing = 0  # tokens for those that pass it
        seats = min(seats, self._limits.max_num_seqs - len(self.running))
        for sequence in self._candidates(queue, seats):
            if tokens <= 0 or (longest is not None and passing <= 0):
                break
            if longest is not None and sequence.remaining > passing:
                continue
            if not sequence.blocks or sequence in self._paused:
                if seats <= 0 or not self._admit(sequence, queue):
                    break
                seats -= 1
            if longest is None and sequence.remaining > tokens:
                longest, passing = sequence, tokens // 2
                continue
            spent = sequence.remaining
            slices.append(Slice(sequence, spent))
            queue.charge(spent)
            tokens, passing = tokens - spent, passing - spent
        if longest is not None:
            slices.append(Slice(longest, tokens))
            queue.charge(tokens)
            return 0
        return tokens

    def _attainable(self, sequence: Sequence) -> bool:
        """Return whether all blocks of a sequence's tokens, and one for each running one, could be had."""
        need = self.pool.missing(len(sequence.blocks), len(sequence.tokens)) + len(self.running)
        return need <= self.pool.free + sum(len(one.blocks) for one in self._paused if one is not sequence)

    def _admit(self, sequence: Sequence, queue: Queue) -> bool:
        """Seat a waiting sequence, with all blocks of its tokens; False, and it waits on, when there are too few."""
        fresh = not sequence.blocks
        if fresh and self.prefix is not None:
            self.prefix.attach(sequence)
        spare = len(self.running)  # each may need one more soon
        while self.pool.missing(len(sequence.blocks), len(sequence.tokens)) + spare > self.pool.free:
            if not self._attainable(sequence) or not self._strip(sequence):
                if fresh:
                    self.pool.release(sequence.blocks)
                    sequence.forget()
                return False
        self.pool.grow(sequence.blocks, len(sequence.tokens))
        queue.waiting.remove(sequence)
        if sequence in self._paused:
            self._paused.remove(sequence)
        if sequence.ticket < 0:
            sequence.ticket, sequence.cached_tokens = next(self._tickets), sequence.computed
            if self.prefix is not None:
                self.prefix.count(sequence)
        insort(self.running, sequence, key=lambda one: one.ticket)
        queue.running += 1
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """Take the blocks for a running sequence's tokens, from the newest if need be; False if it lost its own."""
        while not self.pool.grow(sequence.blocks, len(sequence.tokens)):
            if not self._strip(sequence):
                victim = self.running[-1]
                self._preempt(victim)
                if victim is sequence:
                    return False
        return True

    def _pause(self, sequence: Sequence) -> None:
        """Take a running sequence's seat. It keeps its blocks, and is the first of its queue to go on."""
        queue, _ = self._queues_of(sequence)
        self.running.remove(sequence)
        queue.running -= 1
        queue.waiting.appendleft(sequence)
        self._paused.append(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's seat and blocks."""
        self._pause(sequence)
        self._strip_one(sequence)

    def _strip(self, but: Sequence) -> bool:
        """Take the blocks of the newest paused sequence; False when there is none but the given one."""
        others = [sequence for sequence in self._paused if sequence is not but]
        if not others:
            return False
        self._strip_one(max(others, key=lambda one: one.ticket))
        return True

    def _strip_one(self, sequence: Sequence) -> None:
        self._paused.remove(sequence)
        self.pool.release(sequence.blocks)
        sequence.forget()
        self.preemptions += 1
