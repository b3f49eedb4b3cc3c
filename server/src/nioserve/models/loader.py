"""From a model directory to a model that is ready to run."""

from __future__ import annotations

import ctypes
import logging
import time
from pathlib import Path
from typing import Any

import torch

from nioserve.backends import ONNX, kind_of
from nioserve.models import manifest
from nioserve.models.base import CausalModel
from nioserve.models.decoder import Decoder
from nioserve.models.device import compute_types, resolve_device
from nioserve.models.native import library as native
from nioserve.models.native.decoder import NativeDecoder
from nioserve.models.spec import DecoderSpec, ModelError, decoder_obstacle, load_spec, read_json
from nioserve.models.weights import SCALE, Tensors, Weights

log = logging.getLogger(__name__)


def load(
    directory: Path, dtype: str, max_model_len: int, device: str = "auto", *, kernels: str = "auto",
    kv_cache_dtype: str = "auto",
) -> CausalModel:  # fmt: skip
    """Load a converted model (its manifest is verified first) or a plain Hugging Face directory.

    `dtype` is `auto`, `float32`, `bfloat16` or `float16`, `device` as `resolve_device` takes it, `kernels` and
    `kv_cache_dtype` as in `config.schema.Engine`. The Llama family runs on our own decoder (INT8 on the CPU by the
    native kernels where they can), any other architecture on transformers' code. ModelError when the directory cannot
    be served.
    """
    started = time.monotonic()
    listed = manifest.read(directory)
    if listed is not None:
        manifest.verify(directory, listed)
    if kind_of(directory) == ONNX:
        # Imported here: nobody else needs ONNX Runtime.
        from nioserve.backends.onnx import OnnxModel

        return OnnxModel(directory, load_spec(directory))
    place = resolve_device(device)
    spec = load_spec(directory)
    tensors = Tensors(directory)
    quantised = any(name.endswith(SCALE) for name in tensors.names())
    compute, cached = compute_types(dtype, spec.weights_dtype, quantised, place)
    wide = _wide(listed)
    library = None
    if isinstance(spec, DecoderSpec) and quantised and dtype != "float32" and place.type == "cpu":
        library = _native_library(spec, kernels)
    if library is None and kv_cache_dtype == "int8":
        raise ModelError("engine.kv_cache_dtype: int8 needs an INT8 model on the native kernels, which do not run")
    model: CausalModel
    if isinstance(spec, DecoderSpec):
        weights = Weights(tensors, compute, wide, place)
        if library is not None:
            int8, threads = kv_cache_dtype == "int8", torch.get_num_threads()
            model = NativeDecoder(library, spec, weights, max_model_len, int8_cache=int8, threads=threads)
        else:
            model = Decoder(spec, weights, max_model_len, cached)
    else:
        # Imported here: transformers' modelling code takes 100 MB that the decoder does without.
        from nioserve.models.hf.load import load as load_any

        obstacle = decoder_obstacle(read_json(directory / "config.json"))
        log.info("model runs on transformers' code", extra={"because_of": obstacle})
        model = load_any(directory, spec, compute, cached, place, wide)
    log.info(
        "model loaded",
        extra={"path": str(directory), "verified": listed is not None, "quantised": quantised, "device": str(place),
               "runner": type(model).__name__, "compute_dtype": str(compute),
               "seconds": round(time.monotonic() - started, 2)},
    )  # fmt: skip
    return model


def _native_library(spec: DecoderSpec, kernels: str) -> ctypes.CDLL | None:
    """Return the build of the kernels to use, or None for torch; ModelError when the one asked for cannot be used."""
    if kernels == "torch":
        return None
    obstacle = NativeDecoder.obstacle(spec)
    if kernels == "auto":
        return None if obstacle else native.best()
    try:
        if kernels not in native.supported_levels():
            raise native.KernelError("this processor lacks the instructions")
        if obstacle:
            raise native.KernelError(f"they do not take {obstacle}")
        return native.load(kernels)
    except native.KernelError as error:
        raise ModelError(f"engine.kernels: {kernels} cannot be used: {error}") from error


def _wide(listed: dict[str, Any] | None) -> frozenset[str]:
    """Return the kinds of layers whose activations a manifest wants in 16 bits."""
    return frozenset(listed["quantisation"].get("wide_activations", ())) if listed else frozenset()
