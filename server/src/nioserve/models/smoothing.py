"""SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): moving the outliers of activations into the weights beforehand.

A few channels of a layer's inputs are much larger than the rest, and one range per token leaves the rest few of its
levels. Dividing each channel by a factor and multiplying the weights that meet it by the same changes no result. The
division is folded into what makes the inputs, a norm or the layer before, so it costs nothing at run time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nioserve.models.calibrate import Calibration
from nioserve.models.spec import DecoderSpec, ModelError

log = logging.getLogger(__name__)

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class TensorSource(Protocol):
    """Tensors by their Hugging Face names."""

    def names(self) -> list[str]:
        """Return all names, sorted."""
        ...

    def get(self, name: str) -> Tensor:
        """Return one tensor."""
        ...


class Site(NamedTuple):
    """Linear layers that share their inputs, and what makes those: a norm's weights or another layer's rows."""

    inputs: str  # a field of `LayerInputs`
    maker: str
    layers: tuple[str, ...]
    alpha: float  # how much of the activations' range the weights take over, 0 to 1


# Of the alphas tried, 0.5 to 0.7, those that kept SmolLM2's logits closest to its source's on the calibration texts.
# The fourth possible site, values to attention output, was measured and brought nothing.
SITES = (
    Site("attention", "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 0.7),
    Site("mlp", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), 0.6),
    Site("down", "mlp.up_proj", ("mlp.down_proj",), 0.5),
)
HEAD_ALPHA = 0.5


def smoothed(tensors: TensorSource, spec: DecoderSpec, texts: Sequence[Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model of the Llama family, smoothed for these texts (token ids), layer by layer.

    The smoothed ones are float64. Memory: one layer in float64, its inputs, and the hidden states of all texts.
    """
    left = set(tensors.names())

    def take(name: str) -> Tensor:
        left.discard(name)
        return tensors.get(name)

    embedding = take(EMBEDDING)
    calibration = Calibration(spec, texts, embedding)
    yield EMBEDDING, embedding
    for index in range(spec.num_layers):
        prefix = f"model.layers.{index}."
        names = [name for name in tensors.names() if name.startswith(prefix)]
        layer = {name.removeprefix(prefix): take(name).to(torch.float64) for name in names}
        try:
            inputs = calibration.advance(layer)
        except KeyError as error:
            raise ModelError(f"weights: tensor {prefix}{error.args[0]} is missing") from error
        for site in SITES:
            matrices = [f"{name}.weight" for name in site.layers]
            _fold(layer, site.maker, matrices, getattr(inputs, site.inputs), site.alpha)
        log.info("layer smoothed", extra={"layer": index + 1, "of": spec.num_layers})
        yield from ((prefix + name, layer[name]) for name in sorted(layer))
    end = {NORM: take(NORM).to(torch.float64)}
    # A tied head shares its matrix with the embedding, which a factor would change.
    if HEAD in left and not spec.tie_word_embeddings:
        end[HEAD] = take(HEAD).to(torch.float64)
        _fold(end, NORM.removesuffix(".weight"), [HEAD], calibration.head_inputs(end[NORM]), HEAD_ALPHA)
    yield from end.items()
    yield from ((name, tensors.get(name)) for name in sorted(left))


def _fold(tensors: dict[str, Tensor], maker: str, layers: Sequence[str], inputs: Tensor, alpha: float) -> None:
    """Divide what makes the inputs by factors and multiply the columns of the layers by them, in place."""
    factors = _factors(inputs, [tensors[name] for name in layers], alpha)
    for name in (f"{maker}.weight", f"{maker}.bias"):
        if name in tensors:
            tensors[name] = tensors[name] / (factors if tensors[name].ndim == 1 else factors.unsqueeze(1))
    for name in layers:
        tensors[name] = tensors[name] * factors


def _factors(inputs: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """Return the factor of each channel: max|input| ** alpha / max|weight| ** (1 - alpha)."""
    reach = inputs.abs().amax(dim=0)
    weight = torch.stack([matrix.abs().amax(dim=0) for matrix in weights]).amax(dim=0)
    factors = reach**alpha / weight ** (1 - alpha)
    # A channel that is always zero, on either side, stays as it is.
    return torch.where((reach > 0) & (weight > 0), factors, torch.ones_like(factors)).clamp(1e-4, 1e4)
