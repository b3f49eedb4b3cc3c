"""INT8 matrix products: which kernel of torch is used, and the proof at start-up that it counts right.

`onednn.qlinear_*` are private operations of torch. They are reached from this file only, compared with exact integer
arithmetic before a model uses them, and replaced by `torch._int_mm` where they are missing or wrong (oneDNN's u8*s8
products saturate on processors without VNNI).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from nioserve.models.device import CPU

log = logging.getLogger(__name__)

Product = Callable[[Tensor], Tensor]
"""Maps u8 activations [M, K] to float32 [M, N]: (activations . weight) * scale of the output channel."""

Packer = Callable[[Tensor, Tensor], Product]
"""Makes a product from s8 weights [N, K] and float32 scales [N]."""


def pack_onednn(weight: Tensor, scale: Tensor) -> Product:
    """Pack for oneDNN; one packed weight serves every number of rows."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    zero_points = torch.zeros(weight.shape[0], dtype=torch.int64)
    call = torch.ops.onednn.qlinear_pointwise.default

    def product(activations: Tensor) -> Tensor:
        out: Tensor = call(
            activations, 1.0, 0, packed, scale, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )  # fmt: skip
        return out

    return product


def pack_int_mm(weight: Tensor, scale: Tensor) -> Product:
    """Pack for `torch._int_mm`, which knows s8 only: shift the activations by 128 and add 128 row sums back.

    On a GPU it wants more than 16 rows and sides that are multiples of 8: zeros fill up what is missing.
    """
    outputs, inputs = weight.shape
    unit, fewest = (1, 1) if weight.device.type == "cpu" else (8, 32)
    filled = functional.pad(weight, (0, -inputs % unit, 0, -outputs % unit))
    transposed = filled.t().contiguous()
    shift = weight.sum(dim=1, dtype=torch.int32) * 128

    def product(activations: Tensor) -> Tensor:
        signed = (activations.to(torch.int16) - 128).to(torch.int8)
        rows = signed.shape[0]
        signed = functional.pad(signed, (0, -inputs % unit, 0, -rows % fewest))
        exact = torch._int_mm(signed, transposed)[:rows, :outputs]
        return (exact + shift).to(torch.float32).mul_(scale)

    return product


def check(packer: Packer, device: torch.device = CPU) -> str | None:
    """Compare a packer with exact integer products, at full range too; return what is wrong, or None."""
    generator = torch.Generator().manual_seed(0)
    for rows, outputs, inputs in ((1, 64, 576), (7, 128, 512), (33, 96, 1536)):
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
        activations = torch.randint(0, 256, (rows, inputs), dtype=torch.uint8, generator=generator)
        # The largest sums there are: a kernel that adds pairs in 16 bits saturates here and nowhere else.
        weight[0], weight[1], activations[0] = 127, -127, 255
        scale = torch.rand(outputs, generator=generator) + 0.5
        exact = (activations.to(torch.int64) @ weight.to(torch.int64).t()).double() * scale.double()
        try:
            got = packer(weight.to(device), scale.to(device))(activations.to(device)).cpu().double()
        except (RuntimeError, AttributeError) as error:
            return str(error).splitlines()[0]
        if not torch.allclose(got, exact, rtol=1e-5, atol=1e-3):
            return f"wrong by up to {(got - exact).abs().max().item():g} at [{rows}, {inputs}] x [{inputs}, {outputs}]"
    return None


@cache
def best_packer(device: torch.device = CPU) -> Packer:
    """Return the fastest packer that counts right on a device; RuntimeError when there is none."""
    for packer in (pack_onednn, pack_int_mm) if device.type == "cpu" else (pack_int_mm,):
        problem = check(packer, device)
        if problem is None:
            log.info("int8 kernel chosen", extra={"kernel": packer.__name__, "device": str(device)})
            return packer
        log.warning("int8 kernel refused", extra={"kernel": packer.__name__, "problem": problem})
    raise RuntimeError(f"no int8 kernel of this torch counts right on {device}; serve an unquantised model")
