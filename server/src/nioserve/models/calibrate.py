"""Running a model of the Llama family one layer at a time, to see what its linear layers are given.

A conversion needs each layer's inputs on a few thousand tokens. Layer after layer keeps the memory at one layer,
whatever the model's size. float64, because what is derived from the inputs is rounded to integers: in float32 the
number of threads would decide some of them, and the same source would not give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nioserve.models.rope import rotation_table
from nioserve.models.spec import DecoderSpec


class LayerInputs(NamedTuple):
    """What the linear layers of one decoder layer are given: float64 [tokens of all texts, inputs]."""

    attention: Tensor  # of the projections to queries, keys and values
    out: Tensor  # of the attention's output projection
    mlp: Tensor  # of the gate and the up projection
    down: Tensor  # of the down projection


class Calibration:
    """The hidden states of texts on their way through a model. Each text is a sequence of its own."""

    def __init__(self, spec: DecoderSpec, texts: Sequence[Sequence[int]], embedding: Tensor) -> None:
        self._spec = spec
        self._hidden = [embedding[torch.tensor(text)].to(torch.float64) for text in texts]
        rotation = rotation_table(spec.rope, spec.head_dim, max(len(text) for text in texts)).unsqueeze(1)
        self._cos, self._sin = rotation.real.to(torch.float64), rotation.imag.to(torch.float64)

    @torch.inference_mode()
    def advance(self, layer: Mapping[str, Tensor]) -> LayerInputs:
        """Run one layer, given by its tensors under their names without the `model.layers.N.` in front."""
        weights = {name: tensor.to(torch.float64) for name, tensor in layer.items()}
        seen = []
        for index, start in enumerate(self._hidden):
            attention = self._norm(start, weights["input_layernorm.weight"])
            out = self._attention(attention, weights)
            middle = start + _linear(out, weights, "self_attn.o_proj")
            mlp = self._norm(middle, weights["post_attention_layernorm.weight"])
            down = functional.silu(_linear(mlp, weights, "mlp.gate_proj")) * _linear(mlp, weights, "mlp.up_proj")
            self._hidden[index] = middle + _linear(down, weights, "mlp.down_proj")
            seen.append((attention, out, mlp, down))
        return LayerInputs(*(torch.cat(inputs) for inputs in zip(*seen, strict=True)))

    @torch.inference_mode()
    def head_inputs(self, norm: Tensor) -> Tensor:
        """Return what the language-model head is given after the last layer: float64 [tokens of all texts, inputs]."""
        return self._norm(torch.cat(self._hidden), norm.to(torch.float64))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, self._spec.rms_norm_eps)

    def _attention(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        heads = [_linear(x, weights, f"self_attn.{part}_proj").view(len(x), -1, self._spec.head_dim) for part in "qkv"]
        for index, part in enumerate("qk"):
            if (norm := weights.get(f"self_attn.{part}_norm.weight")) is not None:
                heads[index] = self._norm(heads[index], norm)
            heads[index] = self._rotate(heads[index])
        queries, keys, values = (part.transpose(0, 1).unsqueeze(0) for part in heads)
        out = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)

    def _rotate(self, heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, dim=-1)
        cos, sin = self._cos[: len(heads)], self._sin[: len(heads)]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
