"""Properties that hold for any arrivals, lengths and cancellations."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from nioserve.engine.blocks import BlockPool
from nioserve.engine.messages import Sampling
from nioserve.engine.scheduler import Scheduler, Sequence

BLOCK = 4


def sequence(number: int, prompt: int, answer: int) -> Sequence:
    return Sequence(
        key=(b"w", str(number)), tokens=[0] * prompt, prompt_length=prompt, max_tokens=answer,
        sampling=Sampling(0, 1), random=random.Random(0),
    )  # fmt: skip


def step(scheduler: Scheduler, budget: int, max_num_seqs: int) -> list[Sequence]:
    """Do what the engine does, check every invariant, and return the sequences that ended."""
    slices = scheduler.schedule()
    assert sum(part.count for part in slices) <= budget
    assert len(scheduler.running) <= max_num_seqs
    assert all(part.count > 0 and part.sequence in scheduler.running for part in slices)
    held = [block for s in scheduler.running for block in s.blocks]
    assert len(held) == len(set(held)), "a block with two owners"
    assert len(held) + scheduler.pool.free == scheduler.pool.total, "a block was lost"
    assert all(not s.blocks and s.computed == 0 for s in scheduler.waiting)
    ended = []
    for part in slices:
        assert len(part.sequence.blocks) * BLOCK >= part.sequence.computed + part.count, "no room for the keys"
        complete = part.completes
        part.sequence.computed += part.count
        if complete:
            part.sequence.tokens.append(1)
            if part.sequence.generated == part.sequence.max_tokens:
                scheduler.finish(part.sequence)
                ended.append(part.sequence)
    return ended


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20), st.integers(0, 15)), min_size=1, max_size=25),
    cancels=st.dictionaries(st.integers(0, 24), st.integers(0, 40)),
    seats=st.integers(1, 6),
    spare=st.integers(0, 10),
    blocks=st.integers(13, 40),
)
def test_every_request_ends_and_nothing_leaks(requests, cancels, seats, spare, blocks):
    budget = seats + spare
    scheduler = Scheduler(BlockPool(blocks, BLOCK), seats, budget, 1000)
    sequences = [sequence(i, prompt, answer) for i, (prompt, answer, _) in enumerate(requests)]
    ended, cancelled = set(), set()
    for now in range(5000):
        for number, (_, _, arrival) in enumerate(requests):
            if arrival == now:
                assert scheduler.add(sequences[number])
            if cancels.get(number) == now and scheduler.find((b"w", str(number))):
                scheduler.finish(sequences[number])
                cancelled.add(number)
        if not scheduler.has_work and now > 15:
            break
        ended |= {int(s.key[1]) for s in step(scheduler, budget, seats)}
    assert ended | cancelled == set(range(len(requests)))
    assert not ended & cancelled
    assert scheduler.pool.free == blocks


def test_the_queue_is_bounded_and_free_seats_count_as_room():
    scheduler = Scheduler(BlockPool(100, BLOCK), 2, 16, 1)
    assert [scheduler.add(sequence(i, 3, 3)) for i in range(4)] == [True, True, True, False]
    scheduler.schedule()
    assert not scheduler.add(sequence(5, 3, 3))
    scheduler.finish(scheduler.running[0])
    assert scheduler.add(sequence(6, 3, 3))


def test_running_sequences_come_before_waiting_ones():
    scheduler = Scheduler(BlockPool(100, BLOCK), 4, 8, 10)
    scheduler.add(sequence(0, 4, 9))
    step(scheduler, 8, 4)
    scheduler.add(sequence(1, 30, 9))
    slices = scheduler.schedule()
    assert [(part.sequence.key[1], part.count) for part in slices] == [("0", 1), ("1", 7)]


def test_a_workers_requests_are_found_for_dropping():
    scheduler = Scheduler(BlockPool(100, BLOCK), 1, 8, 10)
    for number in range(3):
        scheduler.add(sequence(number, 4, 9))
    scheduler.schedule()
    for one in scheduler.of_worker(b"w"):
        scheduler.finish(one)
    assert not scheduler.has_work
    assert scheduler.pool.free == 100
