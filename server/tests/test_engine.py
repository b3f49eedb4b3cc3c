"""What the engine does with requests besides answering them: cancel, expire, shed, guess, embed, find again."""

from __future__ import annotations

import pytest
import torch
from toy import ToyModel, answer, drain, queue, submit, toy_engine

from nioserve.engine.messages import FinishReason, Sampling
from nioserve.engine.speculate import Drafter


def test_cancelling_frees_seat_and_blocks_before_the_next_step():
    engine = toy_engine(max_num_seqs=1, prefix_cache=False)
    submit(engine, "running", [1] * 20, 50)
    submit(engine, "waiting", [2] * 20, 50)
    engine.step()
    engine.cancel(b"w", "running")
    assert engine.scheduler.pool.usage == 0
    assert [output.request_id for output in engine.step().outputs[b"w"]] == ["waiting"]
    engine.cancel(b"w", "waiting")
    engine.cancel(b"w", "waiting")
    engine.cancel(b"w", "nobody")
    assert not engine.has_work


def test_a_request_that_waited_too_long_is_told_so_and_running_ones_stay():
    engine = toy_engine(max_num_seqs=1, queue_timeout=5)
    submit(engine, "running", [1] * 20, 50)
    submit(engine, "waiting", [2] * 20, 50)
    engine.step()
    for sequence in engine.scheduler.sequences:
        sequence.arrived -= 6
    ((worker, rejected),) = engine.step().rejected
    assert (worker, rejected.request_id, rejected.reason) == (b"w", "waiting", "queue_timeout")
    assert 1 <= rejected.retry_after <= 60
    assert drain(engine) == {"running": answer([1] * 20, 50)[2:]}


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
     RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")],
)  # fmt: skip
def test_out_of_memory_costs_the_newest_requests_and_nobody_else(error):
    engine = toy_engine(max_num_seqs=4)
    model: ToyModel = engine._model
    prompts = {str(number): [number] * 10 for number in range(4)}
    for name, prompt in prompts.items():
        submit(engine, name, prompt, 20)
    engine.step()
    model.failures = [error, error]
    shed = [output for _ in range(2) for output in engine.step().outputs[b"w"]]
    assert [output.request_id for output in shed] == ["3", "1", "2"], "one, then two more"
    assert {output.finish_reason for output in shed} == {FinishReason.ERROR}
    assert drain(engine) == {"0": answer(prompts["0"], 20)[1:]}
    submit(engine, "next", [5] * 30, 20)
    assert drain(engine) == {"next": answer([5] * 30, 20)}
    assert engine.scheduler.pool.usage == 0


def test_other_errors_are_no_lack_of_memory():
    engine = toy_engine()
    submit(engine, "a", [1])
    engine._model.failures = [RuntimeError("shapes differ")]
    with pytest.raises(RuntimeError, match="shapes"):
        engine.step()


def test_the_beginning_of_a_prompt_is_found_again_within_its_department_only():
    engine = toy_engine(kv_cache_tokens=512)
    prompt = [n * n % 7 for n in range(50)]
    firsts = []
    for department in ("a", "a", "b"):
        submit(engine, "x", prompt, 20, department=department)
        firsts.append(engine.step().outputs[b"w"][0])
        drain(engine)
    assert [output.cached_tokens for output in firsts] == [0, 48, 0]
    again = [*prompt, *answer(prompt, 20), 3, 1]
    submit(engine, "next turn", again, 5, department="a")
    assert engine.step().outputs[b"w"][0].cached_tokens == 64, "the answer is known too"
    assert (engine.scheduler.prefix.queries, engine.scheduler.prefix.hits) == (150 + 72, 48 + 64)


def test_a_prompt_that_is_known_whole_still_has_its_last_token_computed():
    engine = toy_engine()
    for _ in range(2):
        submit(engine, "x", [1, 2] * 16, 3)
        assert drain(engine) == {"x": answer([1, 2] * 16, 3)}
    assert engine.scheduler.prefix.hits == 16


def test_what_was_used_last_is_kept_longest():
    engine = toy_engine(kv_cache_tokens=128)  # 8 blocks
    for prompt in ([1] * 40, [2] * 40, [1] * 40, [3] * 90):
        submit(engine, "x", prompt, 2)
        drain(engine)
    submit(engine, "x", [1] * 40, 2)
    assert engine.step().outputs[b"w"][0].cached_tokens == 32
    drain(engine)
    submit(engine, "x", [2] * 40, 2)
    assert engine.step().outputs[b"w"][0].cached_tokens < 32


def test_without_a_prefix_cache_nothing_is_kept():
    engine = toy_engine(prefix_cache=False)
    for _ in range(2):
        submit(engine, "x", [1] * 40)
        assert engine.step().outputs[b"w"][0].cached_tokens == 0
        drain(engine)


def test_guesses_save_steps_and_change_nothing():
    prompt = [1, 2, 3, 4, 5, 6] * 6
    engines = [toy_engine(speculate_tokens=count) for count in (0, 4)]
    for engine in engines:
        submit(engine, "x", prompt, 80)
        assert drain(engine) == {"x": answer(prompt, 80)}
    plain, guessing = (len(engine._model.steps) for engine in engines)
    assert guessing < plain


def test_guesses_end_with_the_answer():
    engine = toy_engine(speculate_tokens=8, max_model_len=128)
    prompt = [1] * 100
    expected = answer(prompt, 28)
    submit(engine, "x", prompt, 28)
    assert drain(engine) == {"x": expected}
    assert all(chunk.start + len(chunk.tokens) <= 128 for step in engine._model.steps for chunk in step)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0.7, seed=1), Sampling(temperature=0, repetition_penalty=1.3),
     Sampling(temperature=0, logprobs=2), Sampling(temperature=0, presence_penalty=1)],
)  # fmt: skip
def test_nothing_is_guessed_where_it_could_matter(sampling):
    engine = toy_engine(speculate_tokens=4)
    submit(engine, "x", [1, 2] * 20, 40, sampling=sampling)
    drain(engine)
    assert all(len(chunk.tokens) == 1 for step in engine._model.steps[1:] for chunk in step)


def test_nothing_is_guessed_while_many_run():
    engine = toy_engine(speculate_tokens=4, speculate_max_num_seqs=1)
    for name in "ab":
        submit(engine, name, [1, 2] * 10, 20)
    drain(engine)
    assert all(len(chunk.tokens) == 1 for step in engine._model.steps[1:] for chunk in step)


def test_a_drafter_follows_repetition_and_gives_up_for_a_while_after_mistakes():
    drafter, tokens = Drafter(), [9, 1, 2, 3, 4, 1, 2, 3]
    assert drafter.propose(tokens, 3) == (4, 1, 2)
    assert Drafter().propose([5, 6] * 4, 5) == (5, 6, 5, 6, 5), "beyond what is there yet"
    assert Drafter().propose([1, 2, 3], 3) == ()
    pauses = []
    for _ in range(9):
        drafter.learn(len(tokens), 0)
        before = len(tokens)
        while not drafter.propose(tokens, 1):
            tokens.append(tokens[len(tokens) % 3 + 1])
        pauses.append(len(tokens) - before)
    assert max(pauses) >= 32
    drafter.learn(len(tokens), 2)
    assert drafter._pause == 0


def test_an_embedding_is_the_direction_of_the_mean_whatever_the_chunks():
    found = []
    for budget in (8, 64):
        engine = toy_engine(max_num_batched_tokens=budget)
        submit(engine, "talk", [1] * 20, 20)
        submit(engine, "e", list(range(7)) * 6, 0, embed=True)
        outputs = []
        while engine.has_work:
            outputs += [one for one in engine.step().outputs.get(b"w", []) if one.request_id == "e"]
        (output,) = outputs
        assert (output.tokens, output.finish_reason) == ([], FinishReason.STOP)
        assert torch.tensor(output.embedding).norm() == pytest.approx(1)
        found.append(output.embedding)
    assert found[0] == pytest.approx(found[1])


@pytest.mark.parametrize(
    ("prompt", "changes", "reason"),
    [([], {}, "invalid"), ([99], {}, "invalid"), ([1], {"length": 0}, "invalid"),
     ([1] * 100, {"length": 29}, "too_long"), ([1], {"length": 3, "embed": True}, "invalid"),
     ([1] * 129, {"length": 0, "embed": True}, "too_long")],
)  # fmt: skip
def test_what_can_never_run_is_refused(prompt, changes, reason):
    assert submit(toy_engine(), "x", prompt, **changes).reason == reason


def test_each_queue_is_bounded_by_requests_and_by_tokens_and_free_seats_are_room():
    bounds = queue(max_requests=2, max_tokens=100)
    engine = toy_engine(max_num_seqs=1, short=bounds, conversations=bounds)
    assert submit(engine, "seat", [1] * 10, 50) is None
    engine.step()
    assert [submit(engine, str(n), [1] * 10) for n in range(2)] == [None, None]
    assert submit(engine, "x", [1]).reason == "queue_full"
    assert submit(engine, "y", [1] * 60, long_conversation=True) is None, "the other queue is another queue"
    assert submit(engine, "z", [1] * 60, long_conversation=True).reason == "queue_tokens"
    engine.cancel(b"w", "0")
    assert submit(engine, "x", [1]) is None


def test_workers_hear_when_a_queue_is_full_and_when_a_tenth_is_free_again():
    engine = toy_engine(max_num_seqs=1, short=queue(max_requests=20))
    for number in range(22):
        submit(engine, str(number), [1] * 10)
    assert engine.admission.load().short.reason == "queue_full"
    assert engine.admission.load().conversations is None
    closed = []
    while engine.has_work:
        engine.step()
        closed.append((len(engine.scheduler.short.waiting), engine.admission.load().short is not None))
    assert all(full == (waiting >= 18) for waiting, full in closed)


def test_the_time_to_come_back_follows_work_and_speed():
    engine = toy_engine(max_num_seqs=1)
    for number in range(100):
        submit(engine, str(number), [1] * 100, 10)
    waits = []
    for speed in (200, 2000, 200000):
        engine.admission.pace.__init__()
        engine.admission.pace.step(speed, 1.0)
        waits.append(engine.admission.retry_after(engine.scheduler.short))
    assert waits == [57, 6, 1], "half of 22,800 tokens"
