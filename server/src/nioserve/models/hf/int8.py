"""INT8 weights in transformers' models: their linear layers and embeddings are replaced before the weights are read.

transformers has an interface for ways to quantise, and its loader does the rest: names of old checkpoints, tied
weights, experts that are merged. Only matrices of `nn.Linear` and `nn.Embedding` are INT8 here; what a model keeps in
other shapes (experts in one tensor, GPT-2's transposed matrices) stays dense.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from nioserve.models.linear import Int8Linear
from nioserve.models.spec import ModelError

METHOD = "nioserve"


class _Int8(nn.Module):
    """A matrix of s8 rows [outputs, inputs] and their float32 scales [outputs]; named as in the files."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        weight = torch.empty(rows, columns, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(rows, dtype=torch.float32), requires_grad=False)


class Int8Module(_Int8):
    """A linear layer. Until `pack` gives its weights to the kernel it computes with them in full precision."""

    def __init__(self, rows: int, columns: int, bias: bool, wide: bool) -> None:
        super().__init__(rows, columns)
        self._outputs, self._wide, self._linear = rows, wide, cast("Int8Linear | None", None)
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False) if bias else None

    def pack(self) -> None:
        """Give the weights to the kernel of the device they are on."""
        # Copies: what the kernel keeps would otherwise keep the mapped file.
        bias = None if self.bias is None else self.bias.data.clone()
        self._linear = Int8Linear(self.weight.data, self.weight_scale.data.clone(), bias, wide=self._wide)
        del self.weight, self.weight_scale

    def forward(self, x: Tensor) -> Tensor:
        """Return x . weight^T + bias for x [..., inputs]."""
        if self._linear is None:
            out = functional.linear(x, self.weight.to(x.dtype)) * self.weight_scale
            return out if self.bias is None else out + self.bias
        return self._linear(x.flatten(0, -2)).view(*x.shape[:-1], self._outputs)


class Int8Embedding(_Int8):
    """An embedding; `scale` is what some models multiply by (Gemma)."""

    def __init__(self, rows: int, columns: int, like: nn.Embedding) -> None:
        super().__init__(rows, columns)
        self.padding_idx, self.num_embeddings, self.embedding_dim = like.padding_idx, rows, columns
        scale = getattr(like, "scalar_embed_scale", 1.0)
        self._scale = float(scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the tokens' rows [..., columns] in float32."""
        rows = functional.embedding(tokens, self.weight).to(torch.float32)
        return rows * functional.embedding(tokens, self.weight_scale.unsqueeze(1)) * self._scale


def quantisable(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return which of the tensors `names` of a checkpoint may be INT8, and the module of `model` each belongs to."""
    modules = {
        name: module
        for name, module in model.named_modules()
        # Subclasses that compute otherwise would lose what they add; scaled embeddings are known.
        if type(module) in (nn.Linear, nn.Embedding) or _is_scaled_embedding(module)
    }
    prefix = str(getattr(model, "base_model_prefix", ""))
    found = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        candidates = (module, f"{prefix}.{module}", module.removeprefix(f"{prefix}."))
        match = next((candidate for candidate in candidates if candidate in modules), None)
        if kind == "weight" and match is not None:
            found[name] = match
    return found


def _is_scaled_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and hasattr(module, "scalar_embed_scale")


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfigMixin):  # type: ignore[misc]
    """Tells the loader which tensors are INT8, and of which of those layers the activations need 16 bits."""

    def __init__(self, tensors: Iterable[str] = (), wide: Iterable[str] = (), **_others: object) -> None:
        self.quant_method = METHOD
        self.tensors, self.wide = frozenset(tensors), frozenset(wide)

    def to_dict(self) -> dict[str, Any]:
        """Return what transformers writes into configurations."""
        return {"quant_method": METHOD, "tensors": sorted(self.tensors), "wide": sorted(self.wide)}


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):  # type: ignore[misc]
    """Puts INT8 modules in the place of those whose weights are INT8."""

    def _process_model_before_weight_loading(self, model: nn.Module, **_kwargs: object) -> None:
        config = self.quantization_config
        modules = quantisable(model, config.tensors)
        if missing := sorted(config.tensors - modules.keys()):
            raise ModelError(f"weights: {missing[0]} is INT8, and no linear layer of this architecture")
        for path in modules.values():
            name = path.rpartition(".")[2]
            model.set_submodule(path, _replacement(model.get_submodule(path), wide=name in config.wide))

    def is_serializable(self) -> bool:
        """Return that such models are not saved."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Return that such models are not trained."""
        return False


def _replacement(module: nn.Module, wide: bool) -> nn.Module:
    rows, columns = cast("tuple[int, int]", tuple(cast("Tensor", module.weight).shape))
    if isinstance(module, nn.Embedding):
        return Int8Embedding(rows, columns, module)
    return Int8Module(rows, columns, bias=module.bias is not None, wide=wide)


def share_embedding(model: nn.Module) -> None:
    """Make the head an INT8 layer too where it has the embedding's weights and no file names them."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(embedding, Int8Embedding) and isinstance(head, nn.Linear) and head.weight.dtype == torch.int8:
        shared = _replacement(head, wide=False)
        shared.weight, shared.weight_scale, shared.bias = embedding.weight, embedding.weight_scale, head.bias
        model.set_output_embeddings(shared)  # type: ignore[operator]


def pack(model: nn.Module) -> None:
    """Give the weights of all INT8 layers to their kernel, and let go of the files that were mapped."""
    for module in model.modules():
        if isinstance(module, Int8Module):
            module.pack()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
