"""What a model directory says about itself, read without torch so that API workers and checks can use it too.

Two kinds of models are told apart here: those of the Llama family that our own decoders run (`DecoderSpec`), and all
others, which run through transformers' modelling code (`models/hf`). Of those only what the engine needs is read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3")

# One thing has many names in configurations; the first that is present counts.
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")


class ModelError(Exception):
    """A model that cannot be used; the message says which file or key, and why."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding: its base, and how it is stretched beyond the trained context."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the engine needs to know of any model.

    Layers, heads and their size give the memory that a token takes in the cache; where layers differ, they are upper
    bounds. `max_model_len` is in tokens, `weights_dtype` a name of torch's.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    weights_dtype: str


@dataclass(frozen=True, slots=True)
class DecoderSpec(ModelSpec):
    """The shape of a decoder of the Llama family, which our own code runs."""

    num_heads: int
    rms_norm_eps: float
    rope: RopeSpec
    tie_word_embeddings: bool


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; ModelError when it is missing or is no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return value


def load_spec(directory: Path) -> ModelSpec:
    """Read `config.json` and `generation_config.json` of a Hugging Face style directory."""
    config = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    return parse_spec(config, read_json(generation) if generation.exists() else {})


def parse_spec(config: dict[str, Any], generation: dict[str, Any]) -> ModelSpec:
    """Turn the two configurations into a spec, a `DecoderSpec` where our own decoders can run the model.

    ModelError names what is missing.
    """
    text = _text(config)
    family = str(text.get("model_type", ""))
    if not family:
        raise ModelError("config.json: model_type is missing")
    eos = generation.get("eos_token_id", text.get("eos_token_id", config.get("eos_token_id")))
    try:
        hidden, heads = int(_first(text, _HIDDEN)), int(_first(text, _HEADS))
        common = ModelSpec(
            family=family,
            vocab_size=int(_first(text, ("vocab_size",))),
            hidden_size=hidden,
            num_layers=int(_first(text, _LAYERS)),
            num_kv_heads=_largest(text.get("num_key_value_heads")) or heads,
            head_dim=_head_dim(text) or hidden // heads,
            max_model_len=_context(text),
            eos_token_ids=_eos(eos),
            weights_dtype=_dtype(config, text),
        )
    except KeyError as error:
        raise ModelError(f"config.json: {family} model: {error.args[0]} is missing") from error
    if decoder_obstacle(config) is not None:
        return common
    return DecoderSpec(
        **{field.name: getattr(common, field.name) for field in fields(ModelSpec)},
        num_heads=heads,
        rms_norm_eps=float(text.get("rms_norm_eps", 1e-6)),
        rope=_rope(text),
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
    )


def decoder_obstacle(config: dict[str, Any]) -> str | None:
    """Return what keeps our own decoders from running a model, or None."""
    if (family := config.get("model_type")) not in FAMILIES:
        return f"model_type {family!r}"
    if (activation := config.get("hidden_act", "silu")) != "silu":
        return f"hidden_act {activation!r}"
    ropes = _ropes(config)
    if len(ropes) > 1:
        return "rope_parameters that differ between layers"
    if (kind := _kind(ropes[0])) not in ROPE_TYPES:
        return f"rope_type {kind!r}"
    if (share := ropes[0].get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1) != 1:
        return f"partial_rotary_factor {share!r}"
    return None


def sampling_defaults(directory: Path) -> tuple[float, float]:
    """Return temperature and top_p for requests that name none: the model's own where it has any, else 1 and 1."""
    path = directory / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    temperature, top_p = generation.get("temperature"), generation.get("top_p")
    return (1.0 if temperature is None else float(temperature)), (1.0 if top_p is None else float(top_p))


def _text(config: dict[str, Any]) -> dict[str, Any]:
    """Return the language model's part: multimodal configurations nest it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _first(config: dict[str, Any], names: Sequence[str]) -> Any:  # noqa: ANN401  JSON
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise KeyError(names[0])


def _largest(value: object) -> int:
    """Return a number, or the largest of one per layer; 0 for none."""
    return max(map(int, value), default=0) if isinstance(value, list) else int(str(value or 0))


def _head_dim(config: dict[str, Any]) -> int:
    """Return the size of a stored key or value, or 0 where the configuration does not say."""
    if config.get("qk_nope_head_dim"):  # latent attention, stored unfolded: keys are wider than values
        key = int(config["qk_nope_head_dim"]) + int(config.get("qk_rope_head_dim") or 0)
        return max(key, int(config.get("v_head_dim") or 0))
    return max(_largest(config.get("head_dim")), _largest(config.get("global_head_dim")))


def _dtype(config: dict[str, Any], text: dict[str, Any]) -> str:
    for part in (text, config):
        if name := part.get("dtype") or part.get("torch_dtype"):
            return str(name)
    return "float32"


def _ropes(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rotary embedding's parameters: one set, or one for each kind of layer."""
    # transformers 5 writes `rope_parameters`; everything older `rope_theta` beside an optional `rope_scaling`.
    values = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    return [value for value in values.values() if isinstance(value, dict)] or [values]


def _kind(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _rope(config: dict[str, Any]) -> RopeSpec:
    values = _ropes(config)[0]
    return RopeSpec(
        theta=float(values.get("rope_theta", config.get("rope_theta", 10000.0))),
        kind=_kind(values),
        factor=float(values.get("factor", 1.0)),
        low_freq_factor=float(values.get("low_freq_factor", 1.0)),
        high_freq_factor=float(values.get("high_freq_factor", 4.0)),
        original_max_position=int(values.get("original_max_position_embeddings", 8192)),
    )


def _context(config: dict[str, Any]) -> int:
    """Return the longest context in tokens.

    Our own decoders attend to everything, which is exact within a sliding window. `longrope` has two sets of
    frequencies, and which one is right depends on the length that a sequence will reach: only the first is used.
    """
    longest = int(_first(config, _CONTEXT))
    for rope in _ropes(config):
        if _kind(rope) == "longrope":
            original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
            longest = min(longest, int(original or longest))
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True) and decoder_obstacle(config) is None:
        longest = min(longest, int(window))
    return longest


def _eos(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(item) for item in value) if isinstance(value, list) else (int(str(value)),)
