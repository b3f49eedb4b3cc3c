"""Linear layers: dense in a floating type, or INT8 with the activations quantised per token on the fly."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from nioserve.models.int8 import best_packer


class Linear(Protocol):
    """Maps [tokens, inputs] to [tokens, outputs]."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return x . weight^T + bias."""
        ...


class DenseLinear:
    """A floating-point layer."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """Return x . weight^T + bias."""
        return functional.linear(x, self.weight, self.bias)


class Int8Linear:
    """INT8 weights per output channel; activations per token in 8 bits, or 16, with an offset of their own.

    A row x is written as low + step * q with whole q >= 0, so that
    x . w = step * (q . w) + low * sum(w): one integer product and one row sum known beforehand. The offset is kept in
    floating point, which spares the rounding and the clamp of an integer zero point. The product comes back in
    float32, because it is much larger than the result and would not survive bfloat16.

    A wide layer has 16 bits for q. Its halves are two rows of one u8 product, 256 * high + low, so the weights are the
    same int8 and are read once.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, wide: bool = False) -> None:
        self.product = best_packer(weight.device)(weight, scale)
        self.row_sum = weight.sum(dim=1, dtype=torch.int32).to(torch.float32) * scale
        self.bias, self.wide = bias, wide

    def __call__(self, x: Tensor) -> Tensor:
        """Return x . weight^T + bias, for float32 x."""
        low = x.amin(-1, keepdim=True)
        steps = 65535 if self.wide else 255
        step = (x.amax(-1, keepdim=True) - low).mul_(1 / steps).clamp_min_(1e-12)
        levels = ((x - low) / step).add_(0.5)
        out = self._wide_product(levels) if self.wide else self.product(levels.to(torch.uint8))
        out.mul_(step).addcmul_(low, self.row_sum)
        return out if self.bias is None else out.add_(self.bias)

    def _wide_product(self, levels: Tensor) -> Tensor:
        whole = levels.to(torch.int32)
        high, low = self.product(torch.cat([whole >> 8, whole & 255]).to(torch.uint8)).chunk(2)
        return torch.add(low, high, alpha=256)


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return s8 rows and their float32 scales: symmetric, one scale per output channel."""
    weight = weight.to(torch.float32)
    scale = weight.abs().amax(dim=1).div_(127).clamp_min_(1e-12)
    return (weight / scale.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8), scale
