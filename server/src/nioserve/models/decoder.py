"""Running a decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3) over a flat batch of tokens.

A small model spends its time in the overhead of operations: queries, keys and values are one product, gate and up
another; all sequences of a step share every product; logits are computed for the rows that are sampled and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nioserve.models.batch import AttentionGroup, Batch, Chunk, StepOutput, build_batch
from nioserve.models.cache import BLOCK_SIZE, KvCache
from nioserve.models.device import on_device
from nioserve.models.linear import DenseLinear, Int8Linear, Linear
from nioserve.models.rope import interleave_rows, rotate, rotation_table
from nioserve.models.spec import DecoderSpec
from nioserve.models.weights import Weights


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one decoder layer."""

    input_norm: Tensor
    qkv: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    out: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """A model that is ready to run where its weights are, in the type of the dense ones; INT8 computes in float32."""

    def __init__(self, spec: DecoderSpec, weights: Weights, max_model_len: int, cache_dtype: torch.dtype) -> None:
        self.spec, self.cache_dtype, self.device = spec, cache_dtype, weights.device
        self.rotations = rotation_table(spec.rope, spec.head_dim, max_model_len).to(self.device)
        self.embedding, self.embedding_scale = weights.rows("model.embed_tokens.weight")
        self.layers = [self._layer(weights, f"model.layers.{i}") for i in range(spec.num_layers)]
        self.norm = weights.dense("model.norm.weight")
        self.head = self._head(weights)
        weights.finish()

    def _layer(self, weights: Weights, prefix: str) -> Layer:
        attention, mlp, dim = f"{prefix}.self_attn", f"{prefix}.mlp", self.spec.head_dim

        def reorder(name: str, rows: Tensor) -> Tensor:
            return rows if name.endswith("v_proj") else interleave_rows(rows, dim)

        norms = [weights.dense_if_present(f"{attention}.{part}_norm.weight") for part in "qk"]
        return Layer(
            input_norm=weights.dense(f"{prefix}.input_layernorm.weight"),
            qkv=weights.linear([f"{attention}.{part}_proj" for part in "qkv"], reorder),
            query_norm=None if norms[0] is None else interleave_rows(norms[0], dim),
            key_norm=None if norms[1] is None else interleave_rows(norms[1], dim),
            out=weights.linear([f"{attention}.o_proj"]),
            post_norm=weights.dense(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=weights.linear([f"{mlp}.gate_proj", f"{mlp}.up_proj"]),
            down=weights.linear([f"{mlp}.down_proj"]),
        )

    def _head(self, weights: Weights) -> Linear:
        if not self.spec.tie_word_embeddings:
            return weights.linear(["lm_head"])
        if "lm_head.weight" in weights:  # some checkpoints store the tied matrix twice
            weights.rows("lm_head.weight")
        if self.embedding_scale is None:
            return DenseLinear(self.embedding, None)
        return Int8Linear(self.embedding, self.embedding_scale, None, wide=weights.is_wide("lm_head"))

    @property
    def cache_bytes_per_token(self) -> int:
        """Return how much of a cache the keys and values of one token take."""
        spec = self.spec
        return spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim * self.cache_dtype.itemsize

    def new_cache(self, blocks: int) -> KvCache:
        """Return an empty cache of that many blocks."""
        return KvCache(self.spec, blocks, self.cache_dtype, self.device)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], cache: KvCache) -> StepOutput:
        """Run one step and store its keys and values."""
        batch = on_device(build_batch(chunks, BLOCK_SIZE), self.device)
        x = self._embed(batch.tokens)
        rotation = self.rotations.index_select(0, batch.positions).unsqueeze(1)
        for index, layer in enumerate(self.layers):
            x = x + layer.out(self._attention(self._norm(x, layer.input_norm), layer, index, rotation, batch, cache))
            gate, up = layer.gate_up(self._norm(x, layer.post_norm)).chunk(2, dim=-1)
            x = x + layer.down(functional.silu(gate) * up)
        logits = self.head(self._norm(x.index_select(0, batch.logit_rows), self.norm)).to(torch.float32)
        sums = [self._norm(x[first:last], self.norm).to(torch.float32).sum(0) for first, last in batch.pool_spans]
        return StepOutput(logits, torch.stack(sums) if sums else logits.new_empty(0, self.spec.hidden_size))

    def _embed(self, tokens: Tensor) -> Tensor:
        rows = functional.embedding(tokens, self.embedding)
        if self.embedding_scale is None:
            return rows
        return rows.to(torch.float32) * self.embedding_scale.index_select(0, tokens).unsqueeze(1)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self.spec.rms_norm_eps)

    def _attention(self, x: Tensor, layer: Layer, index: int, rotation: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        spec, count = self.spec, x.shape[0]
        heads = layer.qkv(x).view(count, -1, spec.head_dim)
        turning = heads[:, : spec.num_heads + spec.num_kv_heads]
        values = heads[:, spec.num_heads + spec.num_kv_heads :]
        if layer.query_norm is not None and layer.key_norm is not None:
            queries = self._norm(turning[:, : spec.num_heads], layer.query_norm)
            keys = self._norm(turning[:, spec.num_heads :], layer.key_norm)
            turning = torch.cat([queries, keys], dim=1)
        rotated = rotate(turning, rotation)
        queries, keys = rotated[:, : spec.num_heads].to(cache.dtype), rotated[:, spec.num_heads :]
        cache.write(index, batch.slots, torch.stack([keys, values.to(keys.dtype)], dim=1))
        out = torch.empty(count, spec.num_heads * spec.head_dim, dtype=x.dtype, device=x.device)
        for group in batch.groups:
            out[group.first : group.last] = self._attend(queries[group.first : group.last], group, index, cache)
        return out

    def _attend(self, queries: Tensor, group: AttentionGroup, index: int, cache: KvCache) -> Tensor:
        spec = self.spec
        cached = cache.gather(index, group.table, group.sequences)[:, : group.length]
        keys, values = cached[:, :, 0].transpose(1, 2), cached[:, :, 1].transpose(1, 2)
        if group.last - group.first == group.sequences:
            # One query each: heads that share keys and values stand in as its queries, so that those are read once
            # per group and not once per head (twice as fast at 32 sequences).
            grouped = queries.view(group.sequences, spec.num_kv_heads, -1, spec.head_dim)
            out = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask)
            return out.reshape(group.sequences, -1)
        many = queries.transpose(0, 1).unsqueeze(0)
        out = functional.scaled_dot_product_attention(many, keys, values, attn_mask=group.mask, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)
