"""A model of any architecture, run by transformers' code on the engine's batches and cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nioserve.models.batch import Batch, Chunk, StepOutput, build_batch
from nioserve.models.cache import BLOCK_SIZE
from nioserve.models.device import on_device
from nioserve.models.hf.attention import Step, running
from nioserve.models.hf.cache import LayerShape, PagedCache
from nioserve.models.spec import ModelSpec


class TransformersModel:
    """A causal language model whose attention is ours (see attention.py), and all else its own."""

    def __init__(self, spec: ModelSpec, network: nn.Module, cache_dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.network, self.device = spec, network, device
        self._cache_dtype = cache_dtype
        self._shapes: list[LayerShape] = []
        self._keeps_rows = "logits_to_keep" in inspect.signature(network.forward).parameters

    @property
    def cache_bytes_per_token(self) -> int:
        """Return how much of a cache the keys and values of one token take."""
        values = sum(shape.heads * (shape.key_size + shape.value_size) for shape in self._shapes)
        return values * self._cache_dtype.itemsize

    def new_cache(self, blocks: int) -> PagedCache:
        """Return an empty cache of that many blocks."""
        return PagedCache(self._shapes, blocks, self._cache_dtype, self.device)

    def learn_shapes(self, cache: PagedCache) -> None:
        """Take the layers of a cache that has been used for those of all caches to come."""
        self._shapes = [layer.shape for layer in cache.layers]

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], cache: PagedCache) -> StepOutput:
        """Run one step and store its keys and values; ModelError when the model does what is not supported."""
        batch = on_device(build_batch(chunks, BLOCK_SIZE), self.device)
        hidden: list[Tensor] = []
        hook = None
        if batch.pool_spans:
            hook = _decoder(self.network).register_forward_hook(lambda _m, _i, out: hidden.append(_states(out)[0]))
        try:
            with running(Step(batch, cache)):
                logits = self._logits(batch)
        finally:
            if hook is not None:
                hook.remove()
        sums = [hidden[-1][first:last].to(torch.float32).sum(0) for first, last in batch.pool_spans]
        return StepOutput(logits, torch.stack(sums) if sums else logits.new_empty(0, self.spec.hidden_size))

    def _logits(self, batch: Batch) -> Tensor:
        """Return the float32 logits of the wanted rows."""
        # A mask of ones, or transformers would take the positions' jumps for packed sequences. Attention ignores it.
        inputs: dict[str, Any] = {
            "input_ids": batch.tokens.unsqueeze(0),
            "position_ids": batch.positions.unsqueeze(0),
            "attention_mask": torch.ones_like(batch.tokens).unsqueeze(0),
            "use_cache": False,
        }
        if self._keeps_rows:
            inputs["logits_to_keep"] = batch.logit_rows
        logits: Tensor = self.network(**inputs).logits[0]
        if not self._keeps_rows:
            logits = logits.index_select(0, batch.logit_rows)
        return logits.to(torch.float32)


def _decoder(network: Any) -> nn.Module:  # noqa: ANN401  a method of transformers' models, which are not typed here
    decoder: nn.Module = network.get_decoder()
    return decoder


def _states(output: Any) -> Tensor:  # noqa: ANN401  transformers' outputs
    states: Tensor = output[0]
    return states
