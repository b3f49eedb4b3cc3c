"""Limits that follow from the model and the machine when the configuration leaves them open. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nioserve.config import Config
from nioserve.models.spec import ModelError, ModelSpec

_CACHE_SHARE = 0.4
"""Of the memory that is free at start, at most this goes to keys and values unless configured."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much the engine takes on: sequences, tokens a step, requests in the queue, tokens in the cache."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_queued: int
    kv_cache_tokens: int


def resolve_max_model_len(config: Config, spec: ModelSpec) -> int:
    """Return the longest context served, in tokens; ModelError when more is asked for than the model has."""
    asked = config.engine.max_model_len
    if asked is not None and asked > spec.max_model_len:
        raise ModelError(f"engine.max_model_len: must be <= {spec.max_model_len} for this model, is {asked}")
    return asked or spec.max_model_len


def resolve_limits(config: Config, spec: ModelSpec) -> Limits:
    """Fill in what the configuration leaves open; ModelError when one context does not fit the cache."""
    engine = config.engine
    longest = resolve_max_model_len(config, spec)
    tokens = engine.kv_cache_tokens or _default_cache_tokens(spec, longest, engine.max_num_seqs)
    if tokens < longest:
        raise ModelError(
            f"engine.kv_cache_tokens: {tokens} tokens do not hold one context of {longest}; "
            "set it, or a smaller engine.max_model_len"
        )
    return Limits(longest, engine.max_num_seqs, engine.max_num_batched_tokens, engine.max_num_queued_reqs, tokens)


def _default_cache_tokens(spec: ModelSpec, longest: int, sequences: int) -> int:
    per_token = spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim * 4  # float32, the widest stored
    return min(sequences * longest, int(_free_memory() * _CACHE_SHARE) // per_token)


def _free_memory() -> int:
    """Return the bytes this process may still take: the machine's, or less where its cgroup or one above says so."""
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    available = next(int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
    return min([available, *_cgroup_limits()])


def _cgroup_limits() -> list[int]:
    limits = []
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif controllers == "memory":
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        group = root / path.strip("/")
        for file in (folder / name for folder in (group, *group.parents) if folder.is_relative_to(root)):
            text = file.read_text(encoding="ascii").strip() if file.exists() else "max"
            if text != "max":
                limits.append(int(text))
    return limits
