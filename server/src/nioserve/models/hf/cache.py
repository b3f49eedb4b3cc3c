"""Keys and values in blocks for models whose layers may differ in heads and sizes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nioserve.models.cache import BLOCK_SIZE
from nioserve.models.device import zeros
from nioserve.models.spec import ModelError


class LayerShape(NamedTuple):
    """What a layer stores for a token: a key and a value for each of its heads."""

    heads: int
    key_size: int
    value_size: int


class LayerCache:
    """One layer's keys and values, each [blocks * block_size, heads, size]."""

    def __init__(self, shape: LayerShape, blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.blocks = shape, blocks
        self.keys = zeros((blocks * BLOCK_SIZE, shape.heads, shape.key_size), dtype, device)
        self.values = zeros((blocks * BLOCK_SIZE, shape.heads, shape.value_size), dtype, device)

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [tokens, heads, size] at the given slots."""
        self.keys.index_copy_(0, slots, keys.to(self.keys.dtype))
        self.values.index_copy_(0, slots, values.to(self.values.dtype))

    def gather(self, table: Tensor, sequences: int, length: int) -> tuple[Tensor, Tensor]:
        """Return the first `length` keys and values in the blocks of `table`, [sequences, heads, length, size]."""

        def side_by_side(stored: Tensor) -> Tensor:
            blocks = stored.view(self.blocks, -1).index_select(0, table)
            return blocks.view(sequences, -1, *stored.shape[1:])[:, :length].transpose(1, 2)

        return side_by_side(self.keys), side_by_side(self.values)


class PagedCache:
    """A model's cache. Without `shapes` it takes on the layers' as they come, which is how they are found out."""

    def __init__(self, shapes: list[LayerShape] | None, blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        self._blocks, self._dtype, self._device = blocks, dtype, device
        self._growing = shapes is None
        self.layers = [self._new(shape) for shape in shapes or []]

    def _new(self, shape: LayerShape) -> LayerCache:
        return LayerCache(shape, self._blocks, self._dtype, self._device)

    def layer(self, number: int, shape: LayerShape) -> LayerCache:
        """Return a layer's cache; ModelError when it has another shape, or there is no such layer."""
        if self._growing and number == len(self.layers):
            self.layers.append(self._new(shape))
        if number >= len(self.layers) or self.layers[number].shape != shape:
            raise ModelError(f"its attention layer {number} changes from one step to the next")
        return self.layers[number]
