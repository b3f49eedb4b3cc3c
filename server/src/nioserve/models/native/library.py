"""Choosing, loading and checking the native kernels.

There is one build for each set of instructions. The widest that the processor has is taken, and compared with exact
integer arithmetic before anything relies on it.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import POINTER, c_float, c_int, c_int32, c_size_t, c_uint8, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

LEVELS: dict[str, frozenset[str]] = {
    "amx": frozenset({"avx512_bf16", "amx_int8", "amx_bf16", "avx512_vnni", "avx512bw", "avx512dq", "avx512vl"}),
    "bf16": frozenset({"avx512_bf16", "avx512_vnni", "avx512bw", "avx512dq", "avx512vl"}),
    "avx512": frozenset({"avx512_vnni", "avx512bw", "avx512dq", "avx512vl"}),
}
"""The builds, fastest first, and the flags of /proc/cpuinfo that each needs."""

MAX_HEAD_DIM = 256
"""kMostHeadDim in attention.cpp."""


class KernelError(Exception):
    """A build of the kernels that cannot be used here; the message says why."""


class Shape(ctypes.Structure):
    """decoder.h's Shape."""

    _fields_ = (
        *((name, c_int32) for name in ("hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocabulary")),
        ("norm_eps", c_float),
        ("int8_cache", c_int32),
        ("threads", c_int32),
        ("rotations", c_void_p),
    )


class Layer(ctypes.Structure):
    """decoder.h's Layer."""

    _fields_ = tuple(
        (name, c_void_p)
        for name in ("input_norm", "qkv", "query_norm", "key_norm", "out", "post_norm", "gate_up", "down")
    )


class Ends(ctypes.Structure):
    """decoder.h's Ends."""

    _fields_ = tuple((name, c_void_p) for name in ("tied_embedding", "embedding", "embedding_scale", "norm", "head"))


class Step(ctypes.Structure):
    """decoder.h's Step."""

    _fields_ = (
        *((name, c_int32) for name in ("tokens", "sequences", "logit_rows", "pooled")),
        *(
            (name, c_void_p)
            for name in (
                "ids", "positions", "first_token", "blocks", "first_block", "rows", "spans", "layers", "logits",
                "pooled_sums",
            )
        ),
    )  # fmt: skip


_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "nio_prepare": (c_int, ()),
    "nio_linear_new": (c_void_p, (c_void_p, c_void_p, c_void_p, c_int, c_int, c_int, c_int)),
    "nio_linear_free": (None, (c_void_p,)),
    "nio_linear_apply": (None, (c_void_p, c_void_p, c_int, c_void_p)),
    "nio_cache_block_bytes": (c_size_t, (c_int, c_int, c_int)),
    "nio_decoder_new": (c_void_p, (POINTER(Shape), POINTER(Layer), c_int, POINTER(Ends))),
    "nio_decoder_free": (None, (c_void_p,)),
    "nio_decoder_step": (c_int, (c_void_p, POINTER(Step))),
}

BytePointer = POINTER(c_uint8)


def supported_levels() -> list[str]:
    """Return the builds whose instructions this processor has, fastest first."""
    text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    flags = set(line.partition(":")[2].split())
    return [level for level, needs in LEVELS.items() if needs <= flags]


@cache
def load(level: str) -> ctypes.CDLL:
    """Return one build, ready to use; KernelError when it is not there, not permitted, or counts wrong."""
    path = Path(__file__).with_name(f"{level}.abi3.so")
    if not path.exists():
        raise KernelError(f"{path.name} was not built with this package")
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if library.nio_prepare() != 0:
        raise KernelError("the kernel does not permit the tile unit (AMX)")
    problem = check(library)
    if problem is not None:
        raise KernelError(problem)
    return library


@cache
def best() -> ctypes.CDLL | None:
    """Return the fastest build that works here, or None."""
    for level in supported_levels():
        try:
            library = load(level)
        except (KernelError, OSError) as error:
            log.warning("native kernels refused", extra={"kernels": level, "problem": str(error)})
            continue
        log.info("native kernels chosen", extra={"kernels": level})
        return library
    return None


class Linear:
    """INT8 weights, packed for the kernels: weight s8 [outputs, inputs], scale float32 [outputs], bias or None.

    `wide`: activations in 16 bits. `gated`: the outputs are two halves, of which silu(first) * second is computed.
    """

    def __init__(
        self, library: ctypes.CDLL, weight: Tensor, scale: Tensor, bias: Tensor | None, *, wide: bool = False,
        gated: bool = False,
    ) -> None:  # fmt: skip
        weight, scale = weight.contiguous(), scale.to(torch.float32).contiguous()
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        self._library = library
        self.outputs, self.inputs = weight.shape
        self.columns = self.outputs // 2 if gated else self.outputs
        self.handle = library.nio_linear_new(
            weight.data_ptr(), scale.data_ptr(), pointer(bias), self.outputs, self.inputs, wide, gated
        )
        if not self.handle:
            raise MemoryError(f"no memory for {weight.numel()} bytes of weights")

    def __call__(self, x: Tensor) -> Tensor:
        """Return float32 [rows, outputs] of float32 x [rows, inputs], on one thread; the decoder does not come here."""
        x = x.to(torch.float32).contiguous()
        out = torch.empty(len(x), self.columns)
        self._library.nio_linear_apply(self.handle, x.data_ptr(), len(x), out.data_ptr())
        return out

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._library.nio_linear_free(self.handle)


def pointer(tensor: Tensor | None) -> int | None:
    """Return a tensor's address, or None for none."""
    return None if tensor is None else tensor.data_ptr()


def check(library: ctypes.CDLL) -> str | None:
    """Compare products with exact integer ones, for few rows and many, at full range; return what is wrong, or None."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 64, 576, False), (7, 40, 100, True), (40, 96, 256, False), (20, 48, 64, True))
    for rows, outputs, inputs, wide in shapes:
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
        top = 65535 if wide else 255
        # Integers from 0 to the top in each row: the step is 1 and the offset 0, so that nothing is rounded.
        x = torch.randint(0, top + 1, (rows, inputs), generator=generator)
        x[:, 0], x[:, 1], x[0] = 0, top, top
        x[0, 0] = 0
        weight[0], weight[1] = 127, -127
        scale = torch.rand(outputs, generator=generator) + 0.5
        exact = (x @ weight.to(torch.int64).t()).double() * scale.double()
        got = Linear(library, weight, scale, None, wide=wide)(x.to(torch.float32)).double()
        if not torch.allclose(got, exact, rtol=1e-5, atol=1e-2):
            return f"wrong by up to {(got - exact).abs().max().item():g} at [{rows}, {inputs}] x [{inputs}, {outputs}]"
    return None
