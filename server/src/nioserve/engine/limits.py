"""Limits that follow from the model and the machine when the configuration leaves them open. No torch here."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from nioserve.config import Config
from nioserve.models.spec import ModelError, ModelSpec

log = logging.getLogger(__name__)

_CACHE_SHARE = 0.4
"""Of the memory that is free at start, and not needed to compute, at most this goes to keys and values by default."""

_FALLBACKS = (2048, 1024)
"""Context lengths tried, in this order, when the model's own does not fit."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """One queue: its share of tokens and seats when both are busy, and how many requests and prompt tokens may wait."""

    share: float = 0.5
    max_requests: int = 256
    max_tokens: int = 131072


@dataclass(frozen=True, slots=True)
class Limits:
    """How much the engine takes on. Lengths and sizes in tokens, `queue_timeout` in seconds."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_tokens: int
    short: QueueLimits = QueueLimits()
    conversations: QueueLimits = QueueLimits()
    queue_timeout: float = 60
    prefix_cache: bool = True
    speculate_tokens: int = 0
    speculate_max_num_seqs: int = 4


def resolve_max_model_len(config: Config, spec: ModelSpec) -> int:
    """Return the longest context asked for, in tokens; ModelError when it is more than the model has."""
    asked = config.engine.max_model_len
    if asked is not None and asked > spec.max_model_len:
        raise ModelError(f"engine.max_model_len: must be <= {spec.max_model_len} for this model, is {asked}")
    return asked or spec.max_model_len


def resolve_limits(config: Config, spec: ModelSpec, bytes_per_token: int, free_bytes: int) -> Limits:
    """Fill in what the configuration leaves open, for a model that is loaded.

    `bytes_per_token` is what a token's keys and values take, `free_bytes` the memory that is left. Where one context
    does not fit, a shorter one is served, with a warning. ModelError when not even the shortest fits.
    """
    engine = config.engine
    asked = resolve_max_model_len(config, spec)
    work = _working_bytes(spec, engine.max_num_batched_tokens, engine.max_num_seqs)
    room = int(max(0, free_bytes - work) * _CACHE_SHARE)
    fitting = engine.kv_cache_tokens or room // bytes_per_token
    longest = next((length for length in (asked, *_FALLBACKS) if length <= min(asked, fitting)), None)
    have = f"{fitting} tokens fit" if engine.kv_cache_tokens else f"{_mib(room)} of {_mib(free_bytes)} are for them"
    need = f"one context of {asked} tokens needs {_mib(asked * bytes_per_token)} for its keys and values, and {have}"
    if longest is None:
        shortest = min(asked, *_FALLBACKS)
        raise ModelError(
            f"engine.max_model_len: {need}; not even {shortest} tokens fit. Free memory, take a smaller model, or set "
            "engine.max_model_len or engine.kv_cache_tokens"
        )
    if longest < asked:
        log.warning("max_model_len falls back", extra={"asked": asked, "served": longest, "reason": need})
    conversations = QueueLimits(engine.conversation_share, engine.max_num_queued_reqs, engine.max_num_queued_tokens)
    return Limits(
        max_model_len=longest,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        kv_cache_tokens=engine.kv_cache_tokens or min(fitting, engine.max_num_seqs * longest),
        short=QueueLimits(1 - conversations.share, conversations.max_requests, conversations.max_tokens),
        conversations=conversations,
        queue_timeout=engine.queue_timeout,
        prefix_cache=engine.prefix_cache,
        speculate_tokens=engine.speculate_tokens,
        speculate_max_num_seqs=engine.speculate_max_num_seqs,
    )


def _working_bytes(spec: ModelSpec, tokens: int, sequences: int) -> int:
    """Return about what a full step needs beside weights and cache, all float32.

    A token: some 16 rows of the hidden size live at a time (residual, norm, projections, the wider ones of the MLP). A
    sequence: its logits, and two copies of them while a token is drawn.
    """
    return 4 * (tokens * 16 * spec.hidden_size + sequences * 3 * spec.vocab_size)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def free_memory() -> int:
    """Return the bytes this process may still take: the machine's, or less where its cgroup or one above says so."""
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    available = next(int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
    return max(0, min([available, *_cgroup_rooms()]))


def _cgroup_rooms() -> list[int]:
    """Return what each memory limit of this process's cgroups leaves, in bytes."""
    rooms = []
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, limit, used = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif controllers == "memory":
            root, limit, used = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.strip("/")
        for folder in (folder for folder in (group, *group.parents) if folder.is_relative_to(root)):
            text = (folder / limit).read_text(encoding="ascii").strip() if (folder / limit).exists() else "max"
            if text != "max":
                rooms.append(int(text) - _unreclaimable(folder, used))
    return rooms


def _unreclaimable(folder: Path, used: str) -> int:
    """Return a group's use without the page cache, which the kernel gives back when memory is wanted."""
    total = int((folder / used).read_text(encoding="ascii"))
    stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    return max(0, total - int(stat.get("total_inactive_file", stat.get("inactive_file", 0))))
