"""Where a model computes: the CPU or a GPU, by torch's device names. All that depends on the device is decided here.

torch calls AMD's GPUs `cuda` too when it was built for ROCm; `rocm` is taken as another name for that. The code for
GPUs has been checked without one only (tests/test_devices.py): shapes, types and devices of every operation.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nioserve.models.batch import AttentionGroup, Batch
from nioserve.models.spec import ModelError

CPU = torch.device("cpu")
_NAME = re.compile(r"(cpu|(?:cuda|rocm)(?::\d+)?)")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda`, `cuda:N`, `rocm` or `rocm:N`; ModelError when it is not there.

    `auto` is the first GPU that torch can use, else the CPU.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else CPU
    if not _NAME.fullmatch(name):
        raise ModelError(f"engine.device: {name!r} is not auto, cpu, cuda, cuda:N, rocm or rocm:N")
    if name == "cpu":
        return CPU
    kind, _, index = name.partition(":")
    if kind == "rocm" and torch.version.hip is None:
        raise ModelError("engine.device: rocm needs a torch that is built for ROCm, and this one is not")
    if not torch.cuda.is_available():
        raise ModelError(f"engine.device: {name} is not available: torch {torch.__version__} finds no GPU it can use")
    if int(index or 0) >= torch.cuda.device_count():
        raise ModelError(f"engine.device: {name} is not there, torch finds {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", int(index or 0))


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return the free and the whole memory of a GPU in bytes; of the CPU's, `engine.limits` knows more (cgroups)."""
    if device.type != "cuda":
        raise ValueError(f"{device} is no GPU")
    # What torch has reserved and not handed out is free for us, and not for the driver.
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    return free + reserved, total


def compute_types(
    dtype: str, weights_dtype: str, quantised: bool, device: torch.device
) -> tuple[torch.dtype, torch.dtype]:
    """Return the type to compute in and the type of the cache, from `engine.dtype` and the type of the weights.

    INT8 computes in float32 between the products, whose results would not survive 16 bits, and caches in 16. `auto`
    takes 16-bit weights as what the device is fast in: bfloat16 where it has that, float16 on older GPUs.
    ModelError when the device cannot compute in the type that was asked for.
    """
    half = torch.bfloat16 if device.type == "cpu" or _has_bfloat16(device) else torch.float16
    if quantised:
        return torch.float32, torch.float32 if dtype == "float32" else half
    if dtype == "auto":
        if weights_dtype not in _DTYPES:
            raise ModelError(f"config.json: weights of type {weights_dtype!r} cannot be served; set engine.dtype")
        chosen = torch.float32 if weights_dtype == "float32" and device.type == "cpu" else half
    else:
        chosen = _DTYPES[dtype]
    if chosen == torch.float16 and device.type == "cpu":
        raise ModelError("engine.dtype: float16 has no fast kernels on a CPU; bfloat16 holds the same weights")
    if chosen == torch.bfloat16 and device.type != "cpu" and not _has_bfloat16(device):
        raise ModelError(f"engine.dtype: {device} has no bfloat16; use float16")
    return chosen, chosen


def _has_bfloat16(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of zeros; on the CPU it takes memory only as it is written to."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the kernel for zeroed pages and touches none; torch.zeros writes them all.
    raw = torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8))
    return raw.view(dtype).view(shape)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch with its index tensors on the device."""
    if device.type == "cpu":
        return batch
    return replace(
        batch,
        tokens=batch.tokens.to(device),
        positions=batch.positions.to(device),
        slots=batch.slots.to(device),
        logit_rows=batch.logit_rows.to(device),
        groups=[_group(group, device) for group in batch.groups],
    )


def _group(group: AttentionGroup, device: torch.device) -> AttentionGroup:
    mask = None if group.mask is None else group.mask.to(device)
    return replace(group, table=group.table.to(device), mask=mask)
