"""In float32 the engine gives the very tokens of transformers: alone, in mixed batches, with blocks found again, with
guesses, and after preemptions."""

from __future__ import annotations

import os
import random
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from support import CONTEXT, EOS, make_model

from nioserve.engine.core import Engine
from nioserve.engine.limits import Limits
from nioserve.engine.messages import FinishReason, Sampling, Submit
from nioserve.models.loader import load
from nioserve.models.spec import ModelError, parse_spec

GREEDY = Sampling(temperature=0.0, top_p=1.0)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
FAMILIES = {
    "llama": ("llama", {}),
    "llama-untied-bias-mha": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True,
                                        "num_key_value_heads": 4}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
}  # fmt: skip


PROMPTS, TOKENS = 20, 64


def prompts(count: int) -> list[list[int]]:
    numbers = random.Random(1)
    lengths = [1, 15, 16, 40, 90]
    return [[numbers.randrange(256) for _ in range(lengths[index % len(lengths)])] for index in range(count)]


def reference(directory, requests: list[list[int]], length: int) -> list[list[int]]:
    """Return what transformers generates; prompts of one length at a time, so that nothing is padded."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    found: dict[int, list[int]] = {}
    by_length = defaultdict(list)
    for index, prompt in enumerate(requests):
        by_length[len(prompt)].append(index)
    for indices in by_length.values():
        batch = torch.tensor([requests[index] for index in indices])
        rows = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=length, do_sample=False)
        for index, row in zip(indices, rows[:, batch.shape[1] :].tolist(), strict=True):
            last = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
            found[index] = row[: last + 1]
    return [found[index] for index in range(len(requests))]


def engine(directory, **changes) -> Engine:
    limits = {"max_model_len": 256, "max_num_seqs": 16, "max_num_batched_tokens": 512, "kv_cache_tokens": 8192}
    return Engine(load(directory, "float32", CONTEXT), Limits(**{**limits, **changes}))


def run(engine: Engine, requests: list[list[int]], length: int, sampling: Sampling = GREEDY) -> list[list[int]]:
    """Let requests arrive one step after another, and return their tokens."""
    out: dict[str, list[int]] = {str(i): [] for i in range(len(requests))}
    waiting = list(enumerate(requests))
    while waiting or engine.scheduler.has_work:
        if waiting:
            index, prompt = waiting.pop(0)
            assert engine.add(b"w", Submit(str(index), prompt, length, sampling)) is None
        for output in engine.step().outputs.get(b"w", []):
            out[output.request_id] += output.tokens
    assert engine.scheduler.pool.free == engine.scheduler.pool.total
    return list(out.values())


def compare(directory, requests: list[list[int]], expected: list[list[int]], **limits) -> None:
    """Check all ways to come to an answer."""
    off, on = {**limits, "prefix_cache": False}, {**limits, "prefix_cache": True}
    alone = engine(directory, **off)
    for index in range(3):
        assert run(alone, requests[index : index + 1], TOKENS) == expected[index : index + 1]
    assert run(engine(directory, **off), requests, TOKENS) == expected
    finding = engine(directory, **{**on, "max_num_batched_tokens": 67})
    for _ in range(2):
        assert run(finding, requests, TOKENS) == expected
    assert finding.scheduler.prefix.hits > 0
    guessing = engine(directory, **on, speculate_tokens=4, speculate_max_num_seqs=100)
    assert run(guessing, requests, TOKENS) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_same_tokens_as_transformers(name, tmp_path):
    family, changes = FAMILIES[name]
    directory = make_model(tmp_path / name, family, **changes)
    requests = prompts(PROMPTS)
    expected = reference(directory, requests, TOKENS)
    assert any(len(set(tokens)) > 3 for tokens in expected), "the model repeats itself: this would prove little"
    compare(directory, requests, expected)


@pytest.mark.slow
def test_same_tokens_as_transformers_from_a_real_model():
    """NIOSERVE_TEST_MODEL names a Hugging Face directory with a chat model and its tokeniser."""
    from tokenizers import Tokenizer

    if not (path := os.environ.get("NIOSERVE_TEST_MODEL")):
        pytest.skip("NIOSERVE_TEST_MODEL is not set to the directory of a model")
    directory = Path(path)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    words = Path(__file__).read_text(encoding="utf-8").split() * 3
    lengths = [1, 7, 16, 40, 90]
    texts = [" ".join(words[50 * index : 50 * index + 100]) for index in range(PROMPTS)]
    requests = [tokenizer.encode(text).ids[: lengths[index % 5]] for index, text in enumerate(texts)]
    compare(directory, requests, reference(directory, requests, TOKENS), max_num_seqs=20)


@pytest.mark.parametrize("changes", [{}, {"prefix_cache": False}, {"speculate_tokens": 4}])
def test_same_tokens_when_sequences_are_preempted(hf_model, changes):
    requests = [(prompt * 7)[:100] for prompt in prompts(6)]
    expected = reference(hf_model, requests, TOKENS)
    small = engine(hf_model, kv_cache_tokens=256, max_num_batched_tokens=32, **changes)
    assert run(small, requests, TOKENS) == expected
    assert small.scheduler.preemptions > 0


def test_seeded_draws_do_not_depend_on_the_company(hf_model):
    sampling = Sampling(temperature=0.9, top_p=0.8, seed=7)
    alone = run(engine(hf_model), prompts(1), 20, sampling)
    assert run(engine(hf_model), prompts(1), 20, sampling) == alone
    assert run(engine(hf_model), prompts(4), 20, sampling)[:1] == alone


def test_end_of_answer_and_length(hf_model):
    runner = engine(hf_model)
    first = run(runner, prompts(1), 5)[0]
    runner.intake._eos = frozenset({first[2]})
    runner.add(b"w", Submit("x", prompts(1)[0], 5, GREEDY))
    outputs = []
    while runner.scheduler.has_work:
        outputs += runner.step().outputs[b"w"]
    assert [o.tokens for o in outputs] == [[t] for t in first[: first.index(first[2]) + 1]]
    assert outputs[-1].finish_reason is FinishReason.STOP
    runner.add(b"w", Submit("y", prompts(1)[0], 5, Sampling(0.0, 1.0, ignore_eos=True)))
    outputs = []
    while runner.scheduler.has_work:
        outputs += runner.step().outputs[b"w"]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert len(outputs) == 5


def test_a_configuration_without_a_size_is_refused_by_its_name():
    with pytest.raises(ModelError, match="hidden_size"):
        parse_spec({"model_type": "llama"}, {})
    assert EOS in parse_spec({**_config(), "eos_token_id": 1}, {"eos_token_id": [EOS]}).eos_token_ids


def _config() -> dict:
    return {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 264,
            "num_hidden_layers": 2, "max_position_embeddings": 64}  # fmt: skip
