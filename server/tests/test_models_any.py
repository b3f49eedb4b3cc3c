"""Architectures beyond the fast path run on transformers' code with the engine's cache: the same tokens, or refused."""

from __future__ import annotations

import functools
import json
import random

import pytest
import torch
from support import make_model

from nioserve.models.batch import Chunk
from nioserve.models.cache import BLOCK_SIZE
from nioserve.models.loader import load
from nioserve.models.quantize import quantize
from nioserve.models.spec import DecoderSpec, ModelError, load_spec, parse_spec

WINDOW = {"sliding_window": 24}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "kv_lora_rank": 16, "q_lora_rank": None,
          "head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
          **EXPERTS}  # fmt: skip
ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128,
        "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}  # fmt: skip

FAMILIES = {
    "gpt2": ("gpt2", {}),
    "gpt-neox": ("gpt_neox", {}),
    "phi3-window": ("phi3", WINDOW),
    "gemma2-softcap": ("gemma2", {**WINDOW, "attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", {**WINDOW, "num_hidden_layers": 3, "sliding_window_pattern": 2}),
    "gemma4-two-sizes": ("gemma4_text", {**WINDOW, "global_head_dim": 32, "num_global_key_value_heads": 1}),
    "gpt-oss-sinks": ("gpt_oss", {**WINDOW, **LOCAL_EXPERTS}),
    "qwen3-moe": ("qwen3_moe", EXPERTS),
    "llama-yarn": ("llama", {"rope_parameters": {**ROPE, "rope_type": "yarn"}}),
    "phi3-longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 128}),
    "phi": ("phi", {}),
    "olmo2": ("olmo2", {}),
    "stablelm": ("stablelm", {}),
    "granite": ("granite", {}),
    "starcoder2-window": ("starcoder2", WINDOW),
    "mixtral": ("mixtral", LOCAL_EXPERTS),
    "qwen2-moe": ("qwen2_moe", EXPERTS),
    "cohere2": ("cohere2", WINDOW),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "llama4-chunks": ("llama4_text", {"attention_chunk_size": 24, "num_local_experts": 2, "intermediate_size_mlp": 96}),
    "deepseek-v3-latent": ("deepseek_v3", LATENT),
    "gpt-bigcode-one-head": ("gpt_bigcode", {}),
    "llama-dynamic": ("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic"}}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
}  # fmt: skip
REFUSED = {
    "mamba": ("mamba", {}, "state beside keys and values"),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}, "state beside keys and values .conv"),
    "falcon-h1": ("falcon_h1", {}, "state beside keys and values"),
    "bloom": ("bloom", {}, "attention interface"),
    "gptj": ("gptj", {}, "attention interface"),
    "bert": ("bert", {}, "look ahead"),
    "doge": ("doge", {}, "does not work with the engine's cache"),
}


class Runner:
    """Greedy generation by steps of mixed chunks, in blocks that lie anywhere."""

    def __init__(self, model, blocks: int = 64, seed: int = 0) -> None:
        self.model, self.cache = model, model.new_cache(blocks)
        self.free = random.Random(seed).sample(range(blocks), blocks)
        self.random = random.Random(seed)

    def blocks_for(self, length: int) -> list[int]:
        return [self.free.pop() for _ in range(-(-length // BLOCK_SIZE))]

    def run(self, prompts: list[list[int]], count: int, longest_chunk: int, cached: list[tuple[int, list[int]]] = ()):
        """Return `count` tokens for each prompt; `cached` says of how many tokens the blocks are filled already."""
        sequences = [list(prompt) for prompt in prompts]
        done = [0] * len(prompts)
        blocks: list[list[int]] = [[] for _ in prompts]
        for index, (length, shared) in enumerate(cached):
            done[index], blocks[index] = length, list(shared)
        for own, prompt in zip(blocks, prompts, strict=True):
            own += self.blocks_for(len(prompt) + count - len(own) * BLOCK_SIZE)
        while active := [i for i, s in enumerate(sequences) if len(s) < len(prompts[i]) + count]:
            self.random.shuffle(active)
            chunks = []
            for i in active:
                part = sequences[i][done[i] : done[i] + longest_chunk]
                done[i] += len(part)
                chunks.append(Chunk(part, done[i] - len(part), blocks[i], int(done[i] == len(sequences[i]))))
            rows = iter(self.model.forward(chunks, self.cache).logits.argmax(-1).tolist())
            for i, chunk in zip(active, chunks, strict=True):
                if chunk.logits:
                    sequences[i].append(next(rows))
        self.blocks = blocks
        return sequences


def prompts() -> list[list[int]]:
    numbers = random.Random(1)
    return [[numbers.randrange(256) for _ in range(length)] for length in (1, 17, 40, 33)]


def assert_greedy(directory, sequences: list[list[int]], requests: list[list[int]]) -> None:
    """Each generated token is the one that transformers' own model finds most likely after all before it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    distinct = set()
    for sequence, prompt in zip(sequences, requests, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([sequence]), use_cache=False).logits[0]
        generated = sequence[len(prompt) :]
        distinct.update(generated)
        assert generated == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert len(distinct) > 5, "the model repeats itself: this would prove little"


def check_family(directory, family: str, changes: dict) -> None:
    # With a head of its own: a random model that shares it with the embedding says the last token again and again.
    make_model(directory, family, **{"tie_word_embeddings": False, **changes})
    model = load(directory, "float32", 256, "cpu")
    assert not isinstance(model.spec, DecoderSpec)
    requests = prompts()
    mixed = Runner(model).run(requests, 24, longest_chunk=64)
    assert_greedy(directory, mixed, requests)
    chunked = Runner(model, seed=1)
    assert chunked.run(requests, 24, longest_chunk=7) == mixed
    # A prompt that shares its first blocks with one that has been computed.
    shared = [[*requests[2][:32], 7, 8, 9]]
    reused = chunked.run(shared, 8, 64, cached=[(32, chunked.blocks[2][:2])])
    assert reused == Runner(model).run(shared, 8, 64)


@pytest.mark.parametrize("name", FAMILIES)
def test_same_tokens_as_transformers(name, tmp_path):
    check_family(tmp_path, *FAMILIES[name])


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_answer_wrongly_is_refused_by_name(name, tmp_path):
    family, changes, reason = REFUSED[name]
    make_model(tmp_path, family, **changes)
    with pytest.raises(ModelError, match=rf"(?s){family}.*{reason}"):
        load(tmp_path, "float32", 256, "cpu")


def forgets_the_mask(plain, rows, keys, values, mask, scale):
    return plain(rows, keys, values, None, scale)


def forgets_the_past_of_answers(plain, rows, keys, values, mask, scale):
    return plain(rows, keys, values, mask, scale) * (rows.shape[1] > 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mistake", [forgets_the_mask, forgets_the_past_of_answers])
def test_a_model_that_differs_from_its_own_code_is_refused(mistake, dtype, tmp_path, monkeypatch):
    from nioserve.models.hf import attention

    monkeypatch.setattr(attention, "_plain", functools.partial(mistake, attention._plain))
    make_model(tmp_path, "gpt2")
    with pytest.raises(ModelError, match=r"gpt2.*logits differ from its own"):
        load(tmp_path, dtype, 256, "cpu")


def test_gguf_files_of_other_families_are_refused(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma2")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"GGUF is read for the Llama family only, not model_type 'gemma2'"):
        quantize(tmp_path / "m.gguf", tmp_path / "int8")


def test_unknown_and_broken_directories_are_refused(tmp_path):
    make_model(tmp_path, "gpt2")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    with pytest.raises(ModelError, match=r"transformers does not know it.*nonesuch"):
        load(tmp_path, "float32", 256, "cpu")
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    with pytest.raises(ModelError, match=r"missing keys.*h\.2"):
        load(tmp_path, "float32", 256, "cpu")
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layer": 1}))
    with pytest.raises(ModelError, match=r"unexpected keys.*h\.1"):
        load(tmp_path, "float32", 256, "cpu")
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_inner": 32}))
    with pytest.raises(ModelError, match="weights: "):
        load(tmp_path, "float32", 256, "cpu")


@pytest.mark.parametrize("name", ["gemma2-softcap", "phi", "gpt-neox"])
def test_int8_of_other_families_counts_as_its_weights_say(name, tmp_path):
    family, changes = FAMILIES[name]
    make_model(tmp_path / "source", family, **changes)
    quantize(tmp_path / "source", tmp_path / "int8")
    sizes = [sum(p.stat().st_size for p in (tmp_path / d).glob("*.safetensors")) for d in ("source", "int8")]
    assert sizes[1] < sizes[0]
    dense, int8 = (load(tmp_path / d, "float32", 256, "cpu") for d in ("source", "int8"))
    requests = prompts()[1:]

    def logits(model) -> torch.Tensor:
        runner = Runner(model)
        chunks = [Chunk(p, 0, runner.blocks_for(len(p)), len(p)) for p in requests]
        return torch.log_softmax(model.forward(chunks, runner.cache).logits, dim=-1)

    exact, rounded = logits(dense), logits(int8)
    agreement = (exact.argmax(-1) == rounded.argmax(-1)).float().mean()
    assert agreement > 0.75  # random weights: rivals lie close together
    mixed = Runner(int8).run(requests, 8, 64)
    assert Runner(int8, seed=1).run(requests, 8, 9) == mixed


def test_a_model_that_int8_would_make_larger_is_not_quantised(tmp_path):
    make_model(tmp_path / "source", "qwen3_moe", **EXPERTS)
    with pytest.raises(ModelError, match=r"only \d+% .* can be INT8"):
        quantize(tmp_path / "source", tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


def test_pooled_states_and_wanted_rows(tmp_path):
    from transformers import AutoModel

    make_model(tmp_path, "gpt_neox")
    model = load(tmp_path, "float32", 256, "cpu")
    runner, requests = Runner(model), prompts()
    chunks = [Chunk(p, 0, runner.blocks_for(len(p)), min(2, i), pool=i > 1) for i, p in enumerate(requests)]
    out = model.forward(chunks, runner.cache)
    assert out.logits.shape == (0 + 1 + 2 + 2, 264)
    plain = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = torch.stack([plain(torch.tensor([p])).last_hidden_state[0].sum(0) for p in requests[2:]])
    torch.testing.assert_close(out.pooled, expected, rtol=1e-3, atol=1e-3)


def test_spec_reads_any_configuration(tmp_path):
    make_model(tmp_path / "gpt2", "gpt2")
    spec = load_spec(tmp_path / "gpt2")
    assert (spec.family, spec.vocab_size, spec.max_model_len, spec.num_layers) == ("gpt2", 264, 4096, 2)
    base = {"vocab_size": 10, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "model_type": "x"}
    spec = parse_spec(base, {"eos_token_id": [1, 2]})
    assert (spec.num_kv_heads, spec.head_dim, spec.eos_token_ids) == (4, 16, (1, 2))
    nested = parse_spec({"model_type": "y", "torch_dtype": "bfloat16", "text_config": base}, {})
    assert (nested.family, nested.weights_dtype) == ("x", "bfloat16")
    latent = parse_spec({**base, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}, {})
    assert latent.head_dim == 192
    for key, name in [("vocab_size", "vocab_size"), ("n_positions", "max_position_embeddings"), ("n_embd", "hidden")]:
        with pytest.raises(ModelError, match=f"x model: {name}.* is missing"):
            parse_spec({k: v for k, v in base.items() if k != key}, {})
    with pytest.raises(ModelError, match="model_type is missing"):
        parse_spec({}, {})


def test_longrope_is_bounded_by_the_length_its_first_frequencies_are_for():
    base = {"vocab_size": 10, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
            "max_position_embeddings": 4096, "model_type": "phi3", "rope_scaling": {"type": "longrope"}}  # fmt: skip
    assert parse_spec({**base, "original_max_position_embeddings": 512}, {}).max_model_len == 512
