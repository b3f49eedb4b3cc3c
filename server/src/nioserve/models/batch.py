"""One step's work for the model: a flat row of tokens, and how they attend to the cached keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence: `tokens` go to positions `start`.. ; `blocks` cover all up to the last.

    `logits` says of how many of its last tokens the logits are wanted: none while a prompt is not complete, one to draw
    the next token, more to check guesses. `pool` asks for the sum of its tokens' final hidden states.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    logits: int = 0
    pool: bool = False


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a model gives back for one step's chunks, in their order.

    logits: float32 [sum of the chunks' `logits`, vocabulary]. The caller's to overwrite, until the model's next step.
    pooled: float32 [chunks that asked for it, hidden size]; sums over tokens, after the last norm.
    """

    logits: Tensor
    pooled: Tensor


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Rows that share one attention call: many sequences with one new token each, or one sequence with many."""

    first: int
    last: int
    sequences: int
    table: Tensor  # block numbers, [sequences * blocks], int64
    length: int  # keys to look at; the gathered blocks may hold more
    mask: Tensor | None  # bool, broadcast to [sequences, heads, queries, length]; None: all keys


@dataclass(frozen=True, slots=True)
class Batch:
    """What the model runs in one step."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64: block * block_size + offset, where each token's keys and values go
    groups: list[AttentionGroup]
    logit_rows: Tensor  # rows whose logits are wanted, in the order of the given chunks
    pool_spans: list[tuple[int, int]]  # first and last + 1 row of each chunk to be summed up, in that order too


def build_batch(chunks: Sequence[Chunk], block_size: int) -> Batch:
    """Lay the chunks out: single tokens first, sorted by context so that padding stays small; then the long ones."""
    singles = sorted((i for i, c in enumerate(chunks) if len(c.tokens) == 1), key=lambda i: len(chunks[i].blocks))
    longer = [i for i, c in enumerate(chunks) if len(c.tokens) > 1]
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    ends: dict[int, int] = {}
    for index in singles + longer:
        chunk = chunks[index]
        tokens.extend(chunk.tokens)
        span = range(chunk.start, chunk.start + len(chunk.tokens))
        positions.extend(span)
        slots.extend(chunk.blocks[p // block_size] * block_size + p % block_size for p in span)
        ends[index] = len(tokens)
    logit_rows = [row for i, chunk in enumerate(chunks) for row in range(ends[i] - chunk.logits, ends[i])]
    groups = [_single_group(chunks, part, ends, block_size) for part in _buckets(chunks, singles)]
    groups += [_long_group(chunks[index], ends[index]) for index in longer]
    return Batch(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        groups=groups,
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        pool_spans=[(ends[i] - len(c.tokens), ends[i]) for i, c in enumerate(chunks) if c.pool],
    )


def _buckets(chunks: Sequence[Chunk], singles: Sequence[int]) -> list[list[int]]:
    """Split sequences, sorted by context, wherever padding would more than double the shortest."""
    buckets: list[list[int]] = []
    for index in singles:
        if buckets and len(chunks[index].blocks) <= 2 * len(chunks[buckets[-1][0]].blocks):
            buckets[-1].append(index)
        else:
            buckets.append([index])
    return buckets


def _single_group(
    chunks: Sequence[Chunk], part: Sequence[int], ends: dict[int, int], block_size: int
) -> AttentionGroup:
    width = max(len(chunks[i].blocks) for i in part)
    # Padding reads block 0: any finite content will do, the mask takes it out again.
    table = [[*chunks[i].blocks, *([0] * (width - len(chunks[i].blocks)))] for i in part]
    lengths = [chunks[i].start + 1 for i in part]
    length = max(lengths)
    mask = None
    if min(lengths) < length:
        mask = (torch.arange(length) < torch.tensor(lengths).unsqueeze(1))[:, None, None, :]
    first = ends[part[0]] - 1
    return AttentionGroup(first, first + len(part), len(part), torch.tensor(table).flatten(), length, mask)


def _long_group(chunk: Chunk, end: int) -> AttentionGroup:
    count, length = len(chunk.tokens), chunk.start + len(chunk.tokens)
    mask = torch.arange(length) <= torch.arange(chunk.start, length).unsqueeze(1)
    return AttentionGroup(end - count, end, 1, torch.tensor(chunk.blocks), length, mask[None, None])
