"""Sampling against a plain reference, one row at a time in double precision."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nioserve.engine.messages import FinishReason, Sampling
from nioserve.engine.sampling import SamplerState, sample
from nioserve.engine.sampling.state import TokenCounts

EOS = 3
STRATA = 200


class Given:
    """A generator that says what it was told."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


def state(sampling: Sampling, prompt=(), answer=(), uniform: float | None = None) -> SamplerState:
    made = SamplerState(sampling, prompt, (EOS,))
    for token in answer:
        made.accept(token)
    if uniform is not None:
        made.random = Given(uniform)
    return made


def tokens(logits: torch.Tensor, states: list[SamplerState]) -> list[int]:
    return [draw.token for draw in sample(logits.clone(), states)]


def measure(logits: torch.Tensor, sampling: Sampling, prompt=(), answer=()) -> np.ndarray:
    """Return each token's share [vocabulary] of the draws at evenly spread uniform numbers."""
    states = [state(sampling, prompt, answer, (i + 0.5) / STRATA) for i in range(STRATA)]
    drawn = tokens(logits.expand(STRATA, -1), states)
    return np.bincount(drawn, minlength=logits.shape[-1]) / STRATA


def reference(logits: torch.Tensor, sampling: Sampling, prompt=(), answer=(), slack: float = 0.0) -> np.ndarray:
    """Return each token's probability [vocabulary], written down as the parameters are defined."""
    x = logits.double().numpy().copy()
    if len(answer) < sampling.min_tokens:
        x[EOS] = -math.inf
    for token, bias in sampling.logit_bias.items():
        x[token] += bias
    for token in {*prompt, *answer}:
        x[token] = x[token] / sampling.repetition_penalty if x[token] > 0 else x[token] * sampling.repetition_penalty
    for token in set(answer):
        x[token] -= sampling.frequency_penalty * list(answer).count(token) + sampling.presence_penalty
    if sampling.temperature == 0:
        return np.eye(len(x))[x.argmax()]
    p = np.exp((x - x.max()) / sampling.temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = [token for token in order if p[token] >= sampling.min_p * p.max() * (1 + slack)]
    kept = kept[: sampling.top_k or None]
    mass, enough, nucleus = 0.0, sampling.top_p * p[kept].sum() * (1 + slack), []
    for token in kept:
        if sampling.top_p < 1 and nucleus and mass >= enough:
            break
        nucleus.append(token)
        mass += p[token]
    out = np.zeros(len(x))
    out[nucleus] = p[nucleus] / mass
    return out


def assert_follows(shares: np.ndarray, logits: torch.Tensor, sampling: Sampling, prompt=(), answer=()) -> None:
    """Evenly spread numbers hit each token as often as its probability says, give or take one."""
    expected = [reference(logits, sampling, prompt, answer, slack) for slack in (0.0, 1e-5, -1e-5)]
    worst = min(np.abs(shares - one).max() for one in expected)  # float32 may see a border on its other side
    assert worst <= 1.1 / STRATA, sampling


def normal(size: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    top_k=st.sampled_from([0, 1, 2, 7, 1000]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    logit_bias=st.dictionaries(st.integers(0, 11), st.sampled_from([-100.0, -1.0, 2.5, 100.0]), max_size=3),
    min_tokens=st.integers(0, 4),
)
TOKENS = st.lists(st.integers(0, 11), max_size=8)


@settings(max_examples=150, deadline=None)
@given(sampling=SAMPLINGS, prompt=TOKENS, answer=TOKENS, seed=st.integers(0, 10**6))
def test_all_parameters_together_are_those_of_the_reference(sampling, prompt, answer, seed):
    logits = normal(12, seed)
    assert_follows(measure(logits, sampling, prompt, answer), logits, sampling, prompt, answer)


@pytest.mark.parametrize("vocabulary", [1023, 1024, 5000])
@pytest.mark.parametrize(
    "cut",
    [{"top_k": 1}, {"top_k": 40}, {"top_k": 512}, {"top_k": 513}, {"top_k": 10**6}, {"top_p": 0.2}, {"top_p": 0.9},
     {"top_p": 0.99999}, {"min_p": 0.01}, {"top_k": 600, "top_p": 0.8}, {"min_p": 0.001, "top_p": 0.5}],
)  # fmt: skip
def test_cuts_of_a_large_vocabulary_need_no_sorting_of_it(vocabulary, cut):
    for scale in (0.01, 1.0, 6.0):  # flat: top_p reaches beyond the tokens that are looked at first
        logits, sampling = normal(vocabulary, 1, scale), Sampling(**cut)
        assert_follows(measure(logits, sampling), logits, sampling)


@settings(max_examples=50, deadline=None)
@given(samplings=st.lists(SAMPLINGS, min_size=2, max_size=6), data=st.data())
def test_a_row_gives_the_same_in_any_company(samplings, data):
    logits = torch.stack([normal(1500, data.draw(st.integers(0, 99))) for _ in samplings])

    def fresh() -> list[SamplerState]:
        return [state(s, [1, 2], [2, 5], random.Random(i).random()) for i, s in enumerate(samplings)]

    together = tokens(logits, fresh())
    alone = [tokens(logits[row : row + 1], [one])[0] for row, one in enumerate(fresh())]
    order = data.draw(st.permutations(range(len(samplings))))
    shuffled = tokens(logits[list(order)], [fresh()[row] for row in order])
    assert together == alone == [shuffled[order.index(row)] for row in range(len(samplings))]


def test_a_seed_repeats_the_draws_and_no_seed_does_not():
    logits = torch.zeros(1, 50000)

    def draws(seed: int | None) -> list[int]:
        one = state(Sampling(seed=seed))
        return [tokens(logits, [one])[0] for _ in range(8)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1e-9), Sampling(1e-4), Sampling(1.0, top_k=1)])
def test_greedy_in_all_its_forms_takes_the_largest_and_of_equals_the_first(sampling):
    logits = torch.stack([normal(2000, seed).round() for seed in range(8)])  # rounded: with many equals
    got = tokens(logits, [state(sampling, uniform=0.0) for _ in logits])
    assert got == [row.argmax() for row in logits.numpy()]


def test_greedy_rows_and_drawn_ones_mix():
    logits = torch.stack([normal(100, seed) for seed in range(6)])
    states = [state(Sampling(t, top_k=1 if t else 0)) for t in (0, 1.0, 0, 0, 1.0, 0)]
    assert tokens(logits, states) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "sampling", [Sampling(0), Sampling(1.0), Sampling(2.0, 0.9), Sampling(1e-5), Sampling(min_p=1)]
)
def test_extreme_logits_give_a_token_that_may_come(sampling):
    inf = math.inf
    cases = {
        (1.0, inf, 0.0, -inf): {1},
        (-inf, -inf, -inf, 5.0): {3},
        (-inf, -inf, -inf, -inf): {0, 1, 2, 3},
        (3e38, -3e38, 0.0, 0.0): {0},
        (2.0, 2.0, 2.0, 2.0): {0, 1, 2, 3},
        (math.nan, 0.0, 0.0, 0.0): {0, 1, 2, 3},  # a broken model: any token, and no crash
    }
    for logits, allowed in cases.items():
        for uniform in (0.0, 0.3, 0.999999999):
            assert tokens(torch.tensor([logits]), [state(sampling, uniform=uniform)])[0] in allowed


@given(prompt=TOKENS, answer=st.lists(st.integers(0, 500), max_size=300))
def test_counts_kept_step_by_step_are_those_of_the_whole_text(prompt, answer):
    counts = TokenCounts(prompt)
    for token in answer:
        counts.add(token)
    got = dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True))
    assert got == {token: answer.count(token) for token in {*prompt, *answer}}


def test_a_row_that_asks_for_nothing_is_untouched_by_its_neighbours():
    logits = torch.stack([normal(300, 5)] * 3)
    heavy = Sampling(0, repetition_penalty=5.0, logit_bias={0: 100.0}, min_tokens=9)
    states = [state(heavy, range(200)), state(Sampling(0, logprobs=0)), state(heavy, [])]
    assert tokens(logits, states)[1] == logits[1].argmax()


def test_no_end_token_before_min_tokens_and_an_ignored_one_does_not_end():
    logits = torch.zeros(1, 8)
    logits[0, EOS] = 50
    one = state(Sampling(0, min_tokens=2))
    ends = []
    for _ in range(3):
        token = tokens(logits, [one])[0]
        ends.append((token == EOS, one.accept(token)))
    assert ends == [(False, None), (False, None), (True, FinishReason.STOP)]
    assert state(Sampling(0, ignore_eos=True)).accept(EOS) is None


def test_only_plain_states_are_told_to_need_nothing():
    assert state(Sampling(0)).plain
    assert state(Sampling(0, min_tokens=2), answer=[1, 1]).plain
    for changes in ({"temperature": 1.0}, {"min_tokens": 2}, {"presence_penalty": 1.0}, {"repetition_penalty": 1.1},
                    {"logit_bias": {1: 1.0}}, {"logprobs": 0}):  # fmt: skip
        assert not state(Sampling(**{"temperature": 0.0, **changes})).plain


@settings(max_examples=40, deadline=None)
@given(wanted=st.lists(st.sampled_from([None, 0, 1, 5, 20]), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_logprobs_are_of_the_raw_logits(wanted, seed):
    logits = torch.stack([normal(30, seed + row) for row in range(len(wanted))])
    changed = {"temperature": 0.3, "top_k": 3, "logit_bias": {4: 100.0}, "repetition_penalty": 2.0, "min_tokens": 5}
    draws = sample(logits.clone(), [state(Sampling(**changed, logprobs=count), [1, 2]) for count in wanted])
    exact = logits.double().log_softmax(-1)
    for row, (count, draw) in enumerate(zip(wanted, draws, strict=True)):
        if count is None:
            assert draw.logprobs is None
            continue
        assert draw.logprobs.chosen == pytest.approx(exact[row, draw.token].item(), abs=1e-4)
        assert [token for token, _ in draw.logprobs.top] == exact[row].topk(count).indices.tolist()
        values = [value for _, value in draw.logprobs.top]
        assert values == pytest.approx(exact[row].topk(count).values.tolist(), abs=1e-4)
        assert sum(math.exp(value) for value in values) <= 1 + 1e-5


def test_logprobs_are_numbers_that_json_has():
    draw = sample(torch.tensor([[0.0, -math.inf]]), [state(Sampling(0, logprobs=20))])[0]
    assert draw.logprobs.top == [(0, 0.0), (1, -9999.0)]
