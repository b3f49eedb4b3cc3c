"""What a model directory says about itself, read without torch so that API workers and checks can use it too."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3")


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
    """The shape of a decoder of the Llama family."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeSpec
    tie_word_embeddings: bool
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    weights_dtype: str


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
    """Turn the two configurations into a spec; ModelError names what is missing or not supported."""
    family = str(config.get("model_type", ""))
    if family not in FAMILIES:
        raise ModelError(f"config.json: model_type {family!r} is not supported (supported: {', '.join(FAMILIES)})")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"config.json: hidden_act {activation!r} is not supported (supported: silu)")
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return ModelSpec(
            family=family,
            vocab_size=int(config["vocab_size"]),
            hidden_size=hidden,
            num_layers=int(config["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=_rope(config),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_model_len=_context(config),
            eos_token_ids=_eos(generation.get("eos_token_id", config.get("eos_token_id"))),
            weights_dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        )
    except KeyError as error:
        raise ModelError(f"config.json: {error.args[0]} is missing") from error


def sampling_defaults(directory: Path) -> tuple[float, float]:
    """Return temperature and top_p for requests that name none: the model's own where it has any, else 1 and 1."""
    path = directory / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    temperature, top_p = generation.get("temperature"), generation.get("top_p")
    return (1.0 if temperature is None else float(temperature)), (1.0 if top_p is None else float(top_p))


def _rope(config: dict[str, Any]) -> RopeSpec:
    # transformers 5 writes `rope_parameters`; everything older `rope_theta` beside an optional `rope_scaling`.
    values = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = str(values.get("rope_type", values.get("type", "default")))
    if kind not in ROPE_TYPES:
        raise ModelError(f"config.json: rope_type {kind!r} is not supported (supported: {', '.join(ROPE_TYPES)})")
    return RopeSpec(
        theta=float(values.get("rope_theta", config.get("rope_theta", 10000.0))),
        kind=kind,
        factor=float(values.get("factor", 1.0)),
        low_freq_factor=float(values.get("low_freq_factor", 1.0)),
        high_freq_factor=float(values.get("high_freq_factor", 4.0)),
        original_max_position=int(values.get("original_max_position_embeddings", 8192)),
    )


def _context(config: dict[str, Any]) -> int:
    """Return the longest context in tokens; within the sliding window, full attention is exact."""
    longest = int(config["max_position_embeddings"])
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True):
        longest = min(longest, int(window))
    return longest


def _eos(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(item) for item in value) if isinstance(value, list) else (int(str(value)),)
