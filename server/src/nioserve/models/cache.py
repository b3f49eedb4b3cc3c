"""The tensors that hold keys and values, in blocks. Which block is whose is the engine's business."""

from __future__ import annotations

import torch
from torch import Tensor

from nioserve.models.device import CPU, zeros
from nioserve.models.spec import ModelSpec

BLOCK_SIZE = 16  # tokens; small enough to waste little, large enough that gathering copies kilobytes at a time


class KvCache:
    """One tensor per layer, [blocks * block_size, 2, kv_heads, head_dim]: a token's key and value lie together."""

    def __init__(self, spec: ModelSpec, blocks: int, dtype: torch.dtype, device: torch.device = CPU) -> None:
        self.blocks, self.dtype = blocks, dtype
        shape = (blocks * BLOCK_SIZE, 2, spec.num_kv_heads, spec.head_dim)
        # Zeros, or padding could read a NaN.
        self.layers = [zeros(shape, dtype, device) for _ in range(spec.num_layers)]

    def write(self, layer: int, slots: Tensor, keys_values: Tensor) -> None:
        """Store [tokens, 2, kv_heads, head_dim] at the given slots."""
        self.layers[layer].index_copy_(0, slots, keys_values.to(self.dtype))

    def gather(self, layer: int, table: Tensor, sequences: int) -> Tensor:
        """Return the blocks of `table`, side by side, as [sequences, tokens, 2, kv_heads, head_dim]."""
        cache = self.layers[layer]
        blocks = cache.view(self.blocks, -1).index_select(0, table)
        return blocks.view(sequences, -1, *cache.shape[1:])
