"""The tensors that hold keys and values, in blocks. Which block is whose is the engine's business."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nioserve.models.spec import ModelSpec

BLOCK_SIZE = 16  # tokens; small enough to waste little, large enough that gathering copies kilobytes at a time


class KvCache:
    """One tensor per layer, [blocks * block_size, 2, kv_heads, head_dim]: a token's key and value lie together."""

    def __init__(self, spec: ModelSpec, blocks: int, dtype: torch.dtype) -> None:
        self.blocks, self.dtype = blocks, dtype
        shape = (blocks * BLOCK_SIZE, 2, spec.num_kv_heads, spec.head_dim)
        self.layers = [_zeros(shape, dtype) for _ in range(spec.num_layers)]

    def write(self, layer: int, slots: Tensor, keys_values: Tensor) -> None:
        """Store [tokens, 2, kv_heads, head_dim] at the given slots."""
        self.layers[layer].index_copy_(0, slots, keys_values.to(self.dtype))

    def gather(self, layer: int, table: Tensor, sequences: int) -> Tensor:
        """Return the blocks of `table`, side by side, as [sequences, tokens, 2, kv_heads, head_dim]."""
        cache = self.layers[layer]
        blocks = cache.view(self.blocks, -1).index_select(0, table)
        return blocks.view(sequences, -1, *cache.shape[1:])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # numpy asks the kernel for zeroed pages and touches none: memory is taken as the cache fills up, not at start.
    # torch.zeros writes them all. And they must be zero, or padding could read a NaN.
    raw = torch.from_numpy(np.zeros(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8))
    return raw.view(dtype).view(shape)
