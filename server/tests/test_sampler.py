"""Draws follow the distribution they are asked for."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from nioserve.engine import sampler
from nioserve.engine.messages import Sampling
from nioserve.engine.scheduler import Sequence


def draw(logits: torch.Tensor, temperature: float, top_p: float, count: int) -> Counter:
    rows = [
        Sequence((b"w", str(i)), [0], 1, 1, Sampling(temperature, top_p), random.Random(i)) for i in range(count)
    ]  # fmt: skip
    return Counter(sampler.sample(logits.expand(count, -1), rows))


def test_frequencies_follow_the_probabilities():
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    counts = draw(probabilities.log(), 1.0, 1.0, 4000)
    for token, probability in enumerate(probabilities[0].tolist()):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.04)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert set(draw(logits, 1.0, 0.79, 500)) == {0, 1}
    assert set(draw(logits, 1.0, 0.01, 100)) == {0}


def test_top_p_beyond_the_candidates_sorts_everything():
    logits = torch.zeros(1, 5000)  # flat: 256 candidates hold a twentieth
    counts = draw(logits, 1.0, 0.9, 2000)
    assert len(counts) > 1500
    assert len(draw(logits, 1.0, 0.5, 2000)) <= 2500


@pytest.mark.parametrize("temperature", [1e-9, 2.0])
def test_extreme_temperatures_stay_finite(temperature):
    logits = torch.tensor([[1000.0, -1000.0, 999.0]])
    assert set(draw(logits, temperature, 1.0, 50)) <= {0, 2}


def test_greedy_and_drawn_rows_mix():
    logits = torch.tensor([[0.0, 5.0, 0.0]] * 3)
    rows = [
        Sequence((b"w", str(i)), [0], 1, 1, Sampling(t, 0.9), random.Random(0)) for i, t in enumerate((0.0, 0.01, 0.0))
    ]  # fmt: skip
    assert sampler.sample(logits, rows) == [1, 1, 1]
