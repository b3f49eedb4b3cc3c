"""Rows of a batch, without copying what need not be copied."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def take(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Return these rows, which ascend: `values` itself when they are all of them, else a copy."""
    if len(rows) == len(values):
        return values
    return values[torch.tensor(rows, device=values.device)]


def column(values: Iterable[float], like: Tensor) -> Tensor:
    """Return one number per row as a column [rows, 1] of the type and on the device of `like`."""
    return torch.tensor([[value] for value in values], dtype=like.dtype, device=like.device)
