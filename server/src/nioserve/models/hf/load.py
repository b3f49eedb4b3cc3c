"""Loading a model through transformers.

What would make an answer wrong is looked for twice: here by what a model says of itself (state that is carried from
token to token, attention outside of the interface), and in proof.py by running it.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

# Before transformers is imported: nothing here may look for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn

from nioserve.models.hf.attention import NAME
from nioserve.models.hf.int8 import Int8Config, pack, quantisable, share_embedding
from nioserve.models.hf.model import TransformersModel
from nioserve.models.hf.proof import first_line, prove
from nioserve.models.spec import ModelError, ModelSpec
from nioserve.models.weights import SCALE, Tensors

_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
"""Kinds of layers that keep keys and values, and nothing else."""
_LEAST_INT8 = 2 / 3
"""Share of the weights. What is not INT8 is float32: with less than this, bfloat16 takes less memory."""


def load(
    directory: Path, spec: ModelSpec, compute: torch.dtype, cached: torch.dtype, device: torch.device,
    wide: frozenset[str] = frozenset(),
) -> TransformersModel:  # fmt: skip
    """Load a model, INT8 where its files are, and check it; ModelError says what keeps it from being served."""
    config = _config(directory)
    with torch.device("meta"):
        empty = _build(config)
    _refuse(spec.family, empty)
    tensors = Tensors(directory)
    quantised = [name.removesuffix(SCALE) for name in tensors.names() if name.endswith(SCALE)]
    if quantised:
        config.quantization_config = Int8Config(quantised, wide).to_dict()
    network = _weights(type(empty), tensors, config, compute).to(device)
    share_embedding(network)
    model = TransformersModel(spec, network, cached, device)
    # Before the activations are rounded too: in a deep model the least difference then becomes a large one.
    prove(model, exact=compute == torch.float32)
    if quantised:
        pack(network)
    return model


def int8_tensors(directory: Path, names: Sequence[str]) -> set[str]:
    """Return which of a checkpoint's tensors are to be INT8, by its configuration alone.

    ModelError when that would gain nothing, as for models with experts, and GPT-2 with its transposed matrices.
    """
    config = _config(directory)
    with torch.device("meta"):
        model = _build(config)
    chosen = quantisable(model, names)
    linear = {weight for path in chosen.values() for weight in model.get_submodule(path).parameters()}
    share = sum(weight.numel() for weight in linear) / sum(parameter.numel() for parameter in model.parameters())
    if share < _LEAST_INT8:
        raise ModelError(
            f"only {share:.0%} of a {type(model).__name__}'s weights are in linear layers and can be INT8: in bfloat16 "
            "the whole takes less memory; serve the directory as it is"
        )
    return set(chosen)


def _config(directory: Path) -> Any:  # noqa: ANN401  transformers is not typed here
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{directory}/config.json: transformers does not know it: {first_line(error)}") from error


def _build(config: Any) -> nn.Module:  # noqa: ANN401
    try:
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, ImportError) as error:
        raise ModelError(f"config.json: no causal language model of transformers: {first_line(error)}") from error
    return model


def _refuse(family: str, model: Any) -> None:  # noqa: ANN401
    """Raise ModelError for what a model says of itself and the engine cannot do."""
    config = model.config.get_text_config(decoder=True)
    others = set(getattr(config, "layer_types", None) or ()) - _LAYERS
    reason = None
    if model.config.is_encoder_decoder:
        reason = "it has an encoder"
    elif model._is_stateful or others:
        reason = f"it keeps a state beside keys and values ({', '.join(sorted(others)) or 'recurrent layers'})"
    elif not model._can_set_attn_implementation():
        reason = "its attention does not go through transformers' attention interface"
    elif "position_ids" not in inspect.signature(model.forward).parameters:
        reason = "it does not take positions of tokens"
    if reason is not None:
        raise ModelError(f"config.json: model_type {family!r} cannot be served: {reason}")


def _weights(architecture: Any, tensors: Tensors, config: Any, compute: torch.dtype) -> nn.Module:  # noqa: ANN401
    # Tensors are mapped, and read when the loader copies them.
    state = {name: tensors.get(name) for name in tensors.names()}
    try:
        model, report = architecture.from_pretrained(
            None, config=config, state_dict=state, dtype=compute, attn_implementation=NAME, output_loading_info=True
        )
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise ModelError(f"weights: they do not fit {architecture.__name__}: {first_line(error)}") from error
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        if report.get(kind):
            raise ModelError(f"weights: {kind.replace('_', ' ')} for this architecture: {sorted(report[kind])[0]}")
    return cast("nn.Module", model.eval())
