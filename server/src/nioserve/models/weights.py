"""The tensors of a model directory, by their Hugging Face names, turned into layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nioserve.models.device import CPU
from nioserve.models.linear import DenseLinear, Int8Linear, Linear
from nioserve.models.spec import ModelError

SCALE = "_scale"


class Tensors:
    """All `*.safetensors` of a directory, mapped and read one tensor at a time."""

    def __init__(self, directory: Path) -> None:
        # Any: safetensors' handles are not typed.
        files: list[Any] = [safe_open(path, framework="pt") for path in sorted(directory.glob("*.safetensors"))]
        if not files:
            raise ModelError(f"{directory}: holds no *.safetensors (other weight files are not read)")
        self._file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118  not a dict

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def get(self, name: str) -> Tensor:
        """Return one tensor; ModelError when it is missing."""
        if name not in self._file_of:
            raise ModelError(f"weights: tensor {name} is missing")
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor


@dataclass(frozen=True, slots=True)
class LinearParts:
    """A linear layer's tensors: int8 weights with the scales of their rows, or dense ones without.

    wide: the activations need 16 bits where others have 8.
    """

    weight: Tensor  # [outputs, inputs]
    scale: Tensor | None  # float32 [outputs]
    bias: Tensor | None  # [outputs]
    wide: bool


class Weights:
    """Hands out layers, and remembers what was taken: a tensor nobody asked for means another architecture."""

    def __init__(
        self, tensors: Tensors, dtype: torch.dtype, wide: frozenset[str] = frozenset(), device: torch.device = CPU
    ) -> None:
        self._tensors, self._dtype, self._wide, self.device = tensors, dtype, wide, device
        self._left = set(tensors.names())

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def _take(self, name: str) -> Tensor:
        self._left.discard(name)
        return self._tensors.get(name)

    def dense(self, name: str) -> Tensor:
        """Return a tensor in the compute type, on the device."""
        # Cloned where the type already fits: the tensor would otherwise keep the mapped file alive.
        return self._take(name).to(self.device, self._dtype, copy=True)

    def dense_if_present(self, name: str) -> Tensor | None:
        """Return a tensor in the compute type, or None when the model has none of that name."""
        return self.dense(name) if name in self else None

    def rows(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return a matrix and the scales of its rows; without scales it is in the compute type."""
        if name + SCALE in self:
            scale = self._take(name + SCALE).to(self.device, torch.float32, copy=True)
            return self._take(name).to(self.device, copy=True), scale
        return self.dense(name), None

    def is_wide(self, prefix: str) -> bool:
        """Return whether the activations that go into a layer need 16 bits where others have 8."""
        return prefix.rpartition(".")[2] in self._wide

    def linear(self, prefixes: Sequence[str], reorder: Callable[[str, Tensor], Tensor] | None = None) -> Linear:
        """Return one layer whose outputs are those of all `prefixes`, one after the other."""
        parts = self.parts(prefixes, reorder)
        if parts.scale is None:
            return DenseLinear(parts.weight, parts.bias)
        return Int8Linear(parts.weight, parts.scale, parts.bias, wide=parts.wide)

    def parts(self, prefixes: Sequence[str], reorder: Callable[[str, Tensor], Tensor] | None = None) -> LinearParts:
        """Return the tensors of such a layer.

        `reorder(prefix, rows)` may permute the output rows of a part; it sees weight, scale and bias alike.
        """
        arrange = reorder or (lambda _prefix, rows: rows)
        matrices = [(prefix, *self.rows(f"{prefix}.weight")) for prefix in prefixes]
        weight = torch.cat([arrange(prefix, matrix) for prefix, matrix, _ in matrices])
        biases = [(prefix, self.dense_if_present(f"{prefix}.bias")) for prefix in prefixes]
        parts = [arrange(prefix, bias) for prefix, bias in biases if bias is not None]
        if parts and len(parts) != len(prefixes):
            raise ModelError(f"weights: only some of {', '.join(prefixes)} have a bias")
        bias = torch.cat(parts) if parts else None
        scales = [arrange(prefix, scale) for prefix, _, scale in matrices if scale is not None]
        wide = any(self.is_wide(prefix) for prefix in prefixes)
        return LinearParts(weight, torch.cat(scales) if scales else None, bias, wide)

    def finish(self) -> None:
        """Refuse a model with tensors that nothing uses: it would answer, and answer wrongly."""
        left = sorted(name for name in self._left if not name.endswith("rotary_emb.inv_freq"))
        if left:
            raise ModelError(f"weights: {len(left)} tensors are not used by this architecture, such as {left[0]}")
