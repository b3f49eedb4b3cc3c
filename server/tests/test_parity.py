"""In float32 every supported family gives the very tokens of transformers, alone and in mixed batches."""

from __future__ import annotations

import random

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


def prompts(count: int) -> list[list[int]]:
    numbers = random.Random(1)
    return [[numbers.randrange(256) for _ in range(numbers.choice([1, 3, 15, 16, 17, 40, 90]))] for _ in range(count)]


def reference(directory, requests: list[list[int]], length: int) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found = []
    for prompt in requests:
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=length, do_sample=False,
        )  # fmt: skip
        found.append(out[0, len(prompt) :].tolist())
    return found


def engine(directory, **changes) -> Engine:
    limits = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 512, "max_num_queued": 64,
              "kv_cache_tokens": 4096}  # fmt: skip
    return Engine(load(directory, "float32", CONTEXT), Limits(**{**limits, **changes}))


def run(engine: Engine, requests: list[list[int]], length: int, sampling: Sampling = GREEDY) -> list[list[int]]:
    """Let requests arrive one step after another, and return their tokens."""
    out: dict[str, list[int]] = {str(i): [] for i in range(len(requests))}
    waiting = list(enumerate(requests))
    while waiting or engine.scheduler.has_work:
        if waiting:
            index, prompt = waiting.pop(0)
            assert engine.add(b"w", Submit(str(index), prompt, length, sampling))
        for output in engine.step().outputs.get(b"w", []):
            out[output.request_id] += output.tokens
    assert engine.scheduler.pool.free == engine.scheduler.pool.total
    return list(out.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_same_tokens_as_transformers(name, tmp_path):
    family, changes = FAMILIES[name]
    directory = make_model(tmp_path / name, family, **changes)
    requests = prompts(6)
    expected = reference(directory, requests, 24)
    assert any(len(set(tokens)) > 3 for tokens in expected), "the model repeats itself: this would prove little"
    assert run(engine(directory), requests[:1], 24) == expected[:1]
    assert run(engine(directory), requests, 24) == expected
    chunked = engine(directory, max_num_batched_tokens=11, max_num_seqs=3)
    assert run(chunked, requests, 24) == expected


def test_same_tokens_when_sequences_are_preempted(hf_model):
    requests = [prompt * 3 for prompt in prompts(6)]
    requests = [prompt[:100] for prompt in requests]
    expected = reference(hf_model, requests, 60)
    small = engine(hf_model, kv_cache_tokens=256, max_num_batched_tokens=32)
    assert run(small, requests, 60) == expected
    assert small.scheduler.preemptions > 0


def test_seeded_draws_do_not_depend_on_the_company(hf_model):
    sampling = Sampling(temperature=0.9, top_p=0.8, seed=7)
    alone = run(engine(hf_model), prompts(1), 20, sampling)
    assert run(engine(hf_model), prompts(1), 20, sampling) == alone
    assert run(engine(hf_model), prompts(4), 20, sampling)[:1] == alone


def test_end_of_answer_and_length(hf_model):
    runner = engine(hf_model)
    first = run(runner, prompts(1), 5)[0]
    runner._eos = frozenset({first[2]})
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


def test_impossible_requests_are_refused(hf_model):
    runner = engine(hf_model)
    with pytest.raises(ValueError, match="do not fit"):
        runner.add(b"w", Submit("x", [1] * 200, 100, GREEDY))
    with pytest.raises(ValueError, match="vocabulary"):
        runner.add(b"w", Submit("x", [10**6], 5, GREEDY))


def test_other_architectures_are_refused_by_name():
    with pytest.raises(ModelError, match="gpt_neox"):
        parse_spec({"model_type": "gpt_neox"}, {})
    with pytest.raises(ModelError, match="hidden_size is missing"):
        parse_spec({"model_type": "llama"}, {})
    assert EOS in parse_spec({**_config(), "eos_token_id": 1}, {"eos_token_id": [EOS]}).eos_token_ids


def _config() -> dict:
    return {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 264,
            "num_hidden_layers": 2, "max_position_embeddings": 64}  # fmt: skip
