"""What each step computes: two queues share tokens and seats, and nobody's flood stops anybody else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import answer, drain, queue, submit, toy_engine

LONG = {"long_conversation": True}
ROOMY = {"kv_cache_tokens": 16384, "prefix_cache": False}


def slices(engine) -> list[tuple[str, int]]:
    """Run a step and return what it computed: request and tokens."""
    found = []
    schedule = engine.scheduler.schedule
    engine.scheduler.schedule = lambda: found.extend(schedule()) or found
    engine.step()
    engine.scheduler.schedule = schedule
    return [(part.sequence.key[1], part.count) for part in found]


def test_answers_come_first_and_a_prompt_takes_what_is_left():
    engine = toy_engine(max_num_batched_tokens=8, **ROOMY)
    submit(engine, "answer", [1] * 4, 20)
    engine.step()
    submit(engine, "prompt", [2] * 30)
    assert slices(engine) == [("answer", 1), ("prompt", 7)]
    assert slices(engine) == [("answer", 1), ("prompt", 7)]


def test_a_prompt_that_fits_passes_one_that_takes_several_steps():
    engine = toy_engine(max_num_batched_tokens=32, **ROOMY)
    submit(engine, "long", [1] * 100)
    submit(engine, "short", [2] * 10)
    submit(engine, "middle", [2] * 20)
    assert sorted(slices(engine)) == [("long", 22), ("short", 10)]
    assert sorted(slices(engine)) == [("long", 31), ("short", 1)], "the oldest gets half at least"


def test_both_queues_get_their_share_of_a_step():
    engine = toy_engine(max_num_batched_tokens=40, conversations=queue(share=0.2), short=queue(share=0.8), **ROOMY)
    submit(engine, "conversation", [1] * 100, **LONG)
    engine.step()
    submit(engine, "short", [2] * 100)
    spent = {"conversation": 0, "short": 0}
    for _ in range(2):
        for name, count in slices(engine):
            spent[name] += count
    assert spent["short"] == pytest.approx(64, abs=16)
    assert sum(spent.values()) == 80


def test_a_floods_prompts_make_short_steps_while_the_other_queue_has_few():
    engine = toy_engine(max_num_batched_tokens=60, **ROOMY)
    submit(engine, "few", [2] * 5, 100)
    for number in range(6):
        submit(engine, f"flood{number}", [1] * 100, **LONG)
    engine.step()
    assert sum(count for _, count in slices(engine)) <= 1 + 10
    submit(engine, "next", [2] * 50)
    assert dict(slices(engine))["next"] > 40, "the others may use nearly the whole step"
    for name in ("few", "next"):
        engine.cancel(b"w", name)
    assert sum(count for _, count in slices(engine)) == 60, "alone, the flood may too"


def test_one_queue_alone_gets_everything_and_owes_nothing_later():
    engine = toy_engine(max_num_batched_tokens=32, **ROOMY)
    for number in range(4):
        submit(engine, f"c{number}", [1] * 90, 30, **LONG)
    for _ in range(13):
        engine.step()
    assert len(engine.scheduler.running) == 4, "all seats, while nobody else asks"
    submit(engine, "c4", [1] * 90, **LONG)
    submit(engine, "s", [2] * 90, 30)
    behind, ahead = engine.scheduler.short.served, engine.scheduler.conversations.served
    assert behind == ahead, "time asleep is not saved up"


@pytest.mark.parametrize("flood_is_long", [True, False])
def test_a_flood_gives_half_of_its_seats_back_at_once_and_goes_on_where_it_was(flood_is_long):
    engine = toy_engine(max_num_seqs=4, max_num_batched_tokens=64, **ROOMY)
    prompts = {f"f{number}": [number % 7] * 12 for number in range(8)}
    for name, prompt in prompts.items():
        submit(engine, name, prompt, 40, long_conversation=flood_is_long)
    for _ in range(4):
        engine.step()
    assert len(engine.scheduler.running) == 4
    prompts |= {"x": [5] * 9, "y": [6] * 9, "z": [4] * 9}
    for name in "xyz":
        submit(engine, name, prompts[name], 10, long_conversation=not flood_is_long)
    ran = dict(slices(engine))
    assert ran == {"f0": 1, "f1": 1, "x": 9, "y": 9}, "the newest two of the flood are paused, in the very next step"
    assert engine.scheduler.preemptions == 0, "and keep what is computed"
    assert drain(engine)["x"] == answer(prompts["x"], 10)[1:]
    assert engine.scheduler.preemptions == 0
    assert not engine.scheduler._paused


def test_paused_ones_give_their_blocks_when_others_need_them_and_are_computed_again():
    engine = toy_engine(max_num_seqs=2, kv_cache_tokens=128, prefix_cache=False)
    submit(engine, "a", [1] * 30, 60, **LONG)
    submit(engine, "b", [2] * 30, 60, **LONG)
    got = {"a": [], "b": [], "s": []}

    def run(steps: int) -> None:
        for _ in range(steps):
            for output in engine.step().outputs.get(b"w", []):
                got[output.request_id] += output.tokens

    run(20)
    submit(engine, "s", [3] * 60, 60)
    for name, tokens in [*got.items()]:
        assert tokens == answer([1 + "ab".find(name)] * 30, 60)[: len(tokens)]
    for name, tokens in drain(engine).items():
        got[name] += tokens
    assert got == {"a": answer([1] * 30, 60), "b": answer([2] * 30, 60), "s": answer([3] * 60, 60)}
    assert engine.scheduler.preemptions > 0


def test_with_one_seat_the_queues_take_turns_by_what_they_used():
    engine = toy_engine(max_num_seqs=1, **ROOMY)
    order = []
    for number in range(6):
        submit(engine, f"c{number}", [1] * 40, 20, **LONG)
        submit(engine, f"s{number}", [2] * 10, 5)
    while engine.has_work:
        order += [output.request_id[0] for output in engine.step().outputs.get(b"w", []) if output.finish_reason]
    assert "cc" not in "".join(order)[:8], "a conversation costs as much as four short ones"
    assert order[:5].count("s") >= 3


@settings(max_examples=60, deadline=None)
@given(
    share=st.floats(0.1, 0.9), seats=st.integers(2, 8),
    flood=st.lists(st.tuples(st.integers(1, 120), st.integers(1, 8)), min_size=30, max_size=40),
)  # fmt: skip
def test_nobody_starves_under_a_flood(share, seats, flood):
    """The few of one queue end while the flood of the other still waits, whatever its shape."""
    engine = toy_engine(
        max_num_seqs=seats, max_num_batched_tokens=32, conversations=queue(share=1 - share), short=queue(share=share),
        **ROOMY,
    )  # fmt: skip
    for number, (prompt, length) in enumerate(flood):
        submit(engine, f"f{number}", [1] * prompt, length, **LONG)
    for _ in range(3):
        engine.step()
    submit(engine, "x", [2] * 20, 3)
    steps = 0
    while engine.scheduler.find((b"w", "x")):
        engine.step()
        steps += 1
    assert steps <= 2 + 20 / (share * (32 - seats)) + 3 + 2


def test_a_workers_requests_are_found_for_dropping():
    engine = toy_engine(max_num_seqs=1)
    for number in range(3):
        submit(engine, str(number), [1] * 4, 9, long_conversation=number == 2)
    engine.step()
    engine.cancel_worker(b"w")
    assert not engine.has_work
    assert engine.scheduler.pool.free == engine.scheduler.pool.total
