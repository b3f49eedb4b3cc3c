"""From a model directory to a decoder that is ready to run."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from nioserve.models import manifest
from nioserve.models.base import CausalModel
from nioserve.models.decoder import Decoder
from nioserve.models.spec import ModelError, ModelSpec, load_spec
from nioserve.models.weights import SCALE, Tensors, Weights

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(directory: Path, dtype: str, max_model_len: int) -> CausalModel:
    """Load a converted model (its manifest is verified first) or a plain Hugging Face directory.

    `dtype` is `auto`, `float32` or `bfloat16`. An INT8 model computes in float32 and stores keys and values in
    bfloat16, or in float32 if asked for it. ModelError when the directory cannot be served.
    """
    started = time.monotonic()
    listed = manifest.read(directory)
    if listed is not None:
        manifest.verify(directory, listed)
    spec = load_spec(directory)
    tensors = Tensors(directory)
    quantised = any(name.endswith(SCALE) for name in tensors.names())
    compute, cached = _types(dtype, spec, quantised)
    wide = frozenset(listed["quantisation"].get("wide_activations", ())) if listed else frozenset()
    decoder = Decoder(spec, Weights(tensors, compute, wide), max_model_len, cached)
    log.info(
        "model loaded",
        extra={"path": str(directory), "verified": listed is not None, "quantised": quantised,
               "compute_dtype": str(compute), "seconds": round(time.monotonic() - started, 2)},
    )  # fmt: skip
    return decoder


def _types(dtype: str, spec: ModelSpec, quantised: bool) -> tuple[torch.dtype, torch.dtype]:
    """Return the compute type and the type of the cache."""
    if quantised:
        return torch.float32, torch.float32 if dtype == "float32" else torch.bfloat16
    # float16 has no fast kernels on a CPU; bfloat16 holds the same weights.
    name = {"float16": "bfloat16"}.get(spec.weights_dtype, spec.weights_dtype) if dtype == "auto" else dtype
    if name not in DTYPES:
        raise ModelError(f"config.json: weights of type {name!r} cannot be served; set engine.dtype")
    return DTYPES[name], DTYPES[name]
