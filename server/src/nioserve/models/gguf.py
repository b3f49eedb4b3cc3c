"""Reading a GGUF file of the Llama family as Hugging Face names and shapes.

transformers reads GGUF too, and its configuration and tokenizer conversions are used for it. Its weights loader builds
the whole model in float32 and needs accelerate; conversion wants one tensor at a time.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nioserve.models.spec import ModelError

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_IGNORED = {"rope_freqs.weight"}  # derived from the configuration


class GgufTensors:
    """The tensors of a GGUF file, dequantised one at a time to float32."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        try:
            import gguf
        except ImportError as error:
            raise ModelError("reading GGUF needs the gguf package: pip install 'nioserve[convert]'") from error
        self._dequantize = gguf.dequantize
        self._config = config
        self._tensors = {_name(t.name): t for t in gguf.GGUFReader(path).tensors if t.name not in _IGNORED}

    def names(self) -> list[str]:
        """Return the Hugging Face names of all tensors, sorted."""
        return sorted(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def get(self, name: str) -> Tensor:
        """Return one tensor in float32."""
        tensor = self._tensors[name]
        values: Tensor = torch.from_numpy(self._dequantize(tensor.data, tensor.tensor_type).copy()).to(torch.float32)
        if self._config.get("model_type") in ("llama", "mistral") and ".q_proj." in name:
            return _unpermute(values, int(self._config["num_attention_heads"]))
        if self._config.get("model_type") in ("llama", "mistral") and ".k_proj." in name:
            return _unpermute(values, int(self._config["num_key_value_heads"]))
        return values


def _name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in _LAYER:
        raise ModelError(f"GGUF tensor {name} belongs to an architecture that is not supported")
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


def _unpermute(rows: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of query and key rows (pairs as neighbours) back to the checkpoint's (two halves)."""
    pairs = rows.view(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
