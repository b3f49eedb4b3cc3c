"""Rotary position embedding as one complex product."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nioserve.models.spec import RopeSpec


def rotation_table(rope: RopeSpec, head_dim: int, length: int) -> Tensor:
    """Return e^(i * position * frequency) as complex64 [length, head_dim / 2], on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def _llama3(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """Stretch long waves by the factor, leave short ones, and blend between (Llama 3.1's rule)."""
    waves = 2 * math.pi / frequencies
    longest = rope.original_max_position / rope.low_freq_factor
    shortest = rope.original_max_position / rope.high_freq_factor
    share = (rope.original_max_position / waves - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - share) * frequencies / rope.factor + share * frequencies
    scaled = torch.where(waves > longest, frequencies / rope.factor, blended)
    return torch.where(waves < shortest, frequencies, scaled)


def interleave_rows(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder each head's outputs so that the two halves of a rotated pair are neighbours.

    Checkpoints rotate dimension i with i + head_dim / 2. As neighbours they are one complex number, and rotating all
    heads of a token is one product instead of six operations. Queries and keys are permuted alike, so their scores
    do not change.
    """
    heads = rows.view(-1, 2, head_dim // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """Rotate [tokens, heads, head_dim] by complex [tokens, 1, head_dim / 2]; the result is float32."""
    pairs = torch.view_as_complex(heads.to(torch.float32).reshape(*heads.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation).flatten(-2)
