"""What the engine asks of a model, whatever runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from nioserve.models.batch import Chunk, StepOutput
from nioserve.models.spec import ModelSpec


class CausalModel(Protocol):
    """A causal language model with a cache in blocks of `cache.BLOCK_SIZE` tokens. What a cache is, only it knows."""

    @property
    def spec(self) -> ModelSpec:
        """Return what the engine needs to know of the model."""
        ...

    @property
    def cache_bytes_per_token(self) -> int:
        """Return how much of a cache the keys and values of one token take."""
        ...

    def new_cache(self, blocks: int) -> Any:  # noqa: ANN401  each model has its own
        """Return an empty cache of that many blocks."""
        ...

    def forward(self, chunks: Sequence[Chunk], cache: Any) -> StepOutput:  # noqa: ANN401  what `new_cache` returned
        """Compute the chunks, store their keys and values in the cache, and return what they asked for.

        Chunks of one call belong to different sequences. No token may look at a block that its chunk does not name.
        """
        ...
