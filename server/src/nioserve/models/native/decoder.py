"""A decoder of the Llama family whose whole step is one call of the native kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from nioserve.models.batch import Chunk, StepOutput
from nioserve.models.cache import BLOCK_SIZE
from nioserve.models.device import CPU, zeros
from nioserve.models.native.library import MAX_HEAD_DIM, Ends, Layer, Linear, Shape, Step, pointer
from nioserve.models.rope import rotation_table
from nioserve.models.spec import DecoderSpec
from nioserve.models.weights import Weights

_ALIGNMENT = 64


class NativeCache:
    """Keys and values in the kernels' own order (attention.h), as bfloat16 or int8. Memory is taken as it fills up."""

    def __init__(self, layers: int, blocks: int, block_bytes: int) -> None:
        self._memory = [zeros((blocks * block_bytes + _ALIGNMENT,), torch.uint8, CPU) for _ in range(layers)]
        starts = [memory.data_ptr() for memory in self._memory]
        self.layers = np.array([start + -start % _ALIGNMENT for start in starts], dtype=np.uint64)


class NativeDecoder:
    """Runs INT8 weights on the CPU; computes in float32 between the products."""

    def __init__(
        self, library: ctypes.CDLL, spec: DecoderSpec, weights: Weights, max_model_len: int, *, int8_cache: bool,
        threads: int,
    ) -> None:  # fmt: skip
        self.spec, self._library, self._int8_cache = spec, library, int8_cache
        self._kept: list[object] = []  # what the kernels point at
        # Used again by each step: 6 MB of fresh pages for 32 rows would cost more than to draw from them.
        self._logits = torch.empty(0, spec.vocab_size)
        layers = [self._layer(weights, f"model.layers.{i}") for i in range(spec.num_layers)]
        ends = self._ends(weights)
        weights.finish()
        rotations = torch.view_as_real(rotation_table(spec.rope, spec.head_dim, max_model_len)).transpose(1, 2)
        shape = Shape(
            hidden=spec.hidden_size, intermediate=self._intermediate, heads=spec.num_heads, kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim, vocabulary=spec.vocab_size, norm_eps=spec.rms_norm_eps, int8_cache=int8_cache,
            threads=threads, rotations=self._keep(rotations),
        )  # fmt: skip
        table = (Layer * len(layers))(*layers)
        self._handle = library.nio_decoder_new(shape, table, len(layers), ends)
        if not self._handle:
            raise MemoryError("no memory for the decoder")

    @staticmethod
    def obstacle(spec: DecoderSpec) -> str | None:
        """Return what keeps a model from running here, or None."""
        if spec.head_dim % 16 or spec.head_dim > MAX_HEAD_DIM:
            return f"heads of {spec.head_dim} dimensions"
        return None

    @property
    def cache_bytes_per_token(self) -> int:
        """Return how much of a cache the keys and values of one token take."""
        return self.spec.num_layers * self._layer_block_bytes() // BLOCK_SIZE

    def _layer_block_bytes(self) -> int:
        spec = self.spec
        return int(self._library.nio_cache_block_bytes(spec.num_kv_heads, spec.head_dim, self._int8_cache))

    def new_cache(self, blocks: int) -> NativeCache:
        """Return an empty cache of that many blocks."""
        return NativeCache(self.spec.num_layers, blocks, self._layer_block_bytes())

    def forward(self, chunks: Sequence[Chunk], cache: NativeCache) -> StepOutput:
        """Run one step and store its keys and values; MemoryError when it does not fit."""
        counts = [len(chunk.tokens) for chunk in chunks]
        ends = list(accumulate(counts))
        ids = np.fromiter(chain.from_iterable(chunk.tokens for chunk in chunks), np.int32, ends[-1])
        starts = np.array([chunk.start for chunk in chunks], np.int32)
        first_token = np.array([0, *ends], np.int32)
        positions = np.arange(ends[-1], dtype=np.int32) + np.repeat(starts - first_token[:-1], counts).astype(np.int32)
        sizes = [len(chunk.blocks) for chunk in chunks]
        blocks = np.fromiter(chain.from_iterable(chunk.blocks for chunk in chunks), np.int32, sum(sizes))
        first_block = np.array([0, *accumulate(sizes[:-1])], np.int32)
        wanted = [range(end - chunk.logits, end) for chunk, end in zip(chunks, ends, strict=True)]
        rows = np.array(list(chain.from_iterable(wanted)), np.int32)
        pooled = [(end - n, end) for c, n, end in zip(chunks, counts, ends, strict=True) if c.pool]
        spans = np.array(pooled, np.int32)
        if len(rows) > len(self._logits):
            self._logits = torch.empty(len(rows), self.spec.vocab_size)
        out = StepOutput(self._logits[: len(rows)], torch.empty(len(pooled), self.spec.hidden_size))
        step = Step(
            tokens=len(ids), sequences=len(chunks), logit_rows=len(rows), pooled=len(pooled), ids=ids.ctypes.data,
            positions=positions.ctypes.data, first_token=first_token.ctypes.data, blocks=blocks.ctypes.data,
            first_block=first_block.ctypes.data, rows=rows.ctypes.data, spans=spans.ctypes.data,
            layers=cache.layers.ctypes.data, logits=out.logits.data_ptr(), pooled_sums=out.pooled.data_ptr(),
        )  # fmt: skip
        if self._library.nio_decoder_step(self._handle, step) != 0:
            raise MemoryError(f"no memory for a step of {len(ids)} tokens")
        return out

    def _layer(self, weights: Weights, prefix: str) -> Layer:
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        gate_up = self._linear(weights, [f"{mlp}.gate_proj", f"{mlp}.up_proj"], gated=True)
        self._intermediate = gate_up.columns
        return Layer(
            input_norm=self._keep(weights.dense(f"{prefix}.input_layernorm.weight")),
            qkv=self._linear(weights, [f"{attention}.{part}_proj" for part in "qkv"]).handle,
            query_norm=self._keep(weights.dense_if_present(f"{attention}.q_norm.weight")),
            key_norm=self._keep(weights.dense_if_present(f"{attention}.k_norm.weight")),
            out=self._linear(weights, [f"{attention}.o_proj"]).handle,
            post_norm=self._keep(weights.dense(f"{prefix}.post_attention_layernorm.weight")),
            gate_up=gate_up.handle,
            down=self._linear(weights, [f"{mlp}.down_proj"]).handle,
        )

    def _ends(self, weights: Weights) -> Ends:
        norm = self._keep(weights.dense("model.norm.weight"))
        rows, scale = weights.rows("model.embed_tokens.weight")
        if scale is None:
            raise TypeError("the native decoder runs INT8 weights only")
        if self.spec.tie_word_embeddings:
            if "lm_head.weight" in weights:  # some checkpoints store the tied matrix twice
                weights.rows("lm_head.weight")
            head = self._hold(Linear(self._library, rows, scale, None, wide=weights.is_wide("lm_head")))
            return Ends(tied_embedding=head.handle, norm=norm, head=head.handle)
        head = self._linear(weights, ["lm_head"])
        return Ends(embedding=self._keep(rows), embedding_scale=self._keep(scale), norm=norm, head=head.handle)

    def _linear(self, weights: Weights, prefixes: Sequence[str], *, gated: bool = False) -> Linear:
        parts = weights.parts(prefixes)
        if parts.scale is None:
            raise TypeError("the native decoder runs INT8 weights only")
        return self._hold(Linear(self._library, parts.weight, parts.scale, parts.bias, wide=parts.wide, gated=gated))

    def _hold(self, linear: Linear) -> Linear:
        self._kept.append(linear)
        return linear

    def _keep(self, tensor: Tensor | None) -> int | None:
        """Return the address of a tensor that stays where it is as long as the decoder lives."""
        if tensor is not None:
            tensor = tensor.contiguous()
            self._kept.append(tensor)
        return pointer(tensor)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.nio_decoder_free(self._handle)
