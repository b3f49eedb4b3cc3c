"""A model run by ONNX Runtime, behind the same scheduler, sampler and cache of blocks as our own decoder.

`nioserve export` makes the directory (backends/export.py). The graph attends by GroupQueryAttention, which wants the
keys and values of each sequence in one piece, and adds to them in place. So beside the blocks there is a row of memory
for each sequence that runs, a lane: filled from the blocks when the sequence joins, in step with them ever after. Rows
of one batch have different lengths, and newcomers join at any step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from nioserve.backends import GRAPH
from nioserve.models.batch import Chunk, StepOutput
from nioserve.models.cache import BLOCK_SIZE
from nioserve.models.spec import ModelError, ModelSpec

log = logging.getLogger(__name__)

_PROVIDERS = ["CPUExecutionProvider"]


class OnnxModel:
    """A CausalModel (models/base.py) on the CPU; keys, values and logits are float32."""

    def __init__(self, directory: Path, spec: ModelSpec) -> None:
        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # A thread that spins while it waits keeps the one that it waits for from its core, as soon as the machine does
        # anything else: measured 17 tokens/s at batch 8 on a busy machine, and 30 without.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        started = time.monotonic()
        try:
            self._session = onnxruntime.InferenceSession(str(directory / GRAPH), options, providers=_PROVIDERS)
        except Exception as error:
            raise ModelError(f"{directory / GRAPH}: ONNX Runtime cannot load it: {error}") from error
        self.spec = spec
        log.info("model loaded", extra={"path": str(directory), "verified": True, "runtime": onnxruntime.__version__,
                                        "seconds": round(time.monotonic() - started, 2)})  # fmt: skip

    @property
    def cache_bytes_per_token(self) -> int:
        """Return what a token takes: in a block, and once more in a lane."""
        return self.spec.num_layers * 2 * self.spec.num_kv_heads * self.spec.head_dim * 4 * 2

    def new_cache(self, blocks: int) -> OnnxCache:
        """Return an empty cache of that many blocks."""
        return OnnxCache(self.spec, blocks)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], cache: OnnxCache) -> StepOutput:
        """Compute the chunks: single tokens in one batch, longer pieces one after the other."""
        rows = cache.enter(chunks)
        singles = [i for i, chunk in enumerate(chunks) if len(chunk.tokens) == 1]
        groups = [singles] if singles else []
        groups += [[i] for i, chunk in enumerate(chunks) if len(chunk.tokens) > 1]
        logits: dict[int, Tensor] = {}
        pooled: dict[int, Tensor] = {}
        for group in groups:
            group.sort(key=lambda i: rows[i])
            self._run([chunks[i] for i in group], rows[group[0]], group, cache, logits, pooled)
        cache.leave(chunks, rows)
        wanted = [logits[i] for i in range(len(chunks)) if i in logits]
        sums = [pooled[i] for i in range(len(chunks)) if i in pooled]
        return StepOutput(
            torch.cat(wanted) if wanted else torch.empty(0, self.spec.vocab_size),
            torch.stack(sums) if sums else torch.empty(0, self.spec.hidden_size),
        )

    def _run(
        self, chunks: Sequence[Chunk], first_row: int, numbers: Sequence[int], cache: OnnxCache,
        logits: dict[int, Tensor], pooled: dict[int, Tensor],
    ) -> None:  # fmt: skip
        """Run chunks of equal length on neighbouring lanes; results go to `logits` and `pooled` by chunk number."""
        count, width = len(chunks), len(chunks[0].tokens)
        lengths = np.array([chunk.start + width for chunk in chunks])
        rows = [index * width + width - k for index, c in enumerate(chunks) for k in range(c.logits, 0, -1)]
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([chunk.tokens for chunk in chunks], dtype=np.int64))
        mask = np.arange(lengths.max()) < lengths[:, None]
        binding.bind_cpu_input("attention_mask", mask.astype(np.int64))
        # No row would be an empty product, which not every kernel takes: then one is computed for nothing.
        binding.bind_cpu_input("logit_rows", np.array(rows or [0], dtype=np.int64))
        for name, pointer in cache.pointers(first_row):
            shape = (count, self.spec.num_kv_heads, cache.capacity, self.spec.head_dim)
            binding.bind_input(f"past_key_values.{name}", "cpu", 0, np.float32, shape, pointer)
            binding.bind_output(f"present.{name}", "cpu", 0, np.float32, shape, pointer)
        out = torch.empty(max(len(rows), 1), self.spec.vocab_size)
        hidden = torch.empty(count, width, self.spec.hidden_size)
        binding.bind_output("logits", "cpu", 0, np.float32, tuple(out.shape), out.data_ptr())
        binding.bind_output("hidden_states", "cpu", 0, np.float32, tuple(hidden.shape), hidden.data_ptr())
        self._session.run_with_iobinding(binding)
        done = 0
        for index, (number, chunk) in enumerate(zip(numbers, chunks, strict=True)):
            if chunk.logits:
                logits[number] = out[done : done + chunk.logits]
                done += chunk.logits
            if chunk.pool:
                pooled[number] = hidden[index].sum(dim=0)


class OnnxCache:
    """Keys and values, each token's twice.

    Blocks: [layers, 2, blocks, kv_heads, BLOCK_SIZE, head_dim]. Lanes: [layers, 2, rows, kv_heads, capacity, head_dim].
    A lane belongs to whoever wrote the slot that its last token went to, and to nobody once another step has passed it
    over.
    """

    def __init__(self, spec: ModelSpec, blocks: int) -> None:
        self._spec = spec
        self._blocks = _zeros((spec.num_layers, 2, blocks, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim))
        self._rows, self.capacity = 0, 0
        self._lanes = torch.empty(0)
        self._owner: dict[int, int] = {}  # slot of a lane's last token -> row

    def enter(self, chunks: Sequence[Chunk]) -> list[int]:
        """Return the lane of each chunk, filled up to its start; single tokens have the first ones, without a gap."""
        self._grow(len(chunks), max(chunk.start + len(chunk.tokens) for chunk in chunks))
        singles = sum(len(chunk.tokens) == 1 for chunk in chunks)
        rows: list[int | None] = [None] * len(chunks)
        free = set(range(len(chunks)))
        for number, chunk in enumerate(chunks):
            row = self._owner.get(_slot(chunk, chunk.start - 1)) if chunk.start else None
            if row is not None and row in free and (row < singles) == (len(chunk.tokens) == 1):
                rows[number] = row
                free.remove(row)
        front = sorted(row for row in free if row < singles)
        back = sorted(row for row in free if row >= singles)
        for number, chunk in enumerate(chunks):
            if rows[number] is None:
                rows[number] = row = (front if len(chunk.tokens) == 1 else back).pop()
                self._fill(row, chunk)
        return [row for row in rows if row is not None]

    def leave(self, chunks: Sequence[Chunk], rows: Sequence[int]) -> None:
        """Copy what the step added to the lanes into the blocks."""
        self._owner = {}
        lanes: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        offsets: list[int] = []
        for chunk, row in zip(chunks, rows, strict=True):
            span = range(chunk.start, chunk.start + len(chunk.tokens))
            lanes += [row] * len(span)
            positions += span
            blocks += [chunk.blocks[position // BLOCK_SIZE] for position in span]
            offsets += [position % BLOCK_SIZE for position in span]
            self._owner[_slot(chunk, span[-1])] = row
        added = self._lanes[:, :, torch.tensor(lanes), :, torch.tensor(positions)]
        self._blocks[:, :, torch.tensor(blocks), :, torch.tensor(offsets)] = added

    def pointers(self, row: int) -> list[tuple[str, int]]:
        """Return where the lanes from `row` on begin, by the graph's names without their first part."""
        return [
            (f"{layer}.{name}", self._lanes[layer, part, row].data_ptr())
            for layer in range(self._spec.num_layers)
            for part, name in enumerate(("key", "value"))
        ]

    def _fill(self, row: int, chunk: Chunk) -> None:
        count = -(-chunk.start // BLOCK_SIZE)
        if count:
            spec, table = self._spec, torch.tensor(chunk.blocks[:count])
            lane = self._lanes[:, :, row].view(spec.num_layers, 2, spec.num_kv_heads, -1, BLOCK_SIZE, spec.head_dim)
            lane[:, :, :, :count] = self._blocks[:, :, table].transpose(2, 3)

    def _grow(self, rows: int, length: int) -> None:
        """Make room, twice as much as before so that it happens seldom; the lanes are filled anew from the blocks."""
        if rows <= self._rows and length <= self.capacity:
            return
        self._rows = max(self._rows, 1 << (rows - 1).bit_length())
        self.capacity = max(self.capacity, BLOCK_SIZE << (-(-length // BLOCK_SIZE) - 1).bit_length())
        spec = self._spec
        self._lanes = _zeros((spec.num_layers, 2, self._rows, spec.num_kv_heads, self.capacity, spec.head_dim))
        self._owner = {}


def _slot(chunk: Chunk, position: int) -> int:
    return chunk.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def _zeros(shape: tuple[int, ...]) -> Tensor:
    # numpy takes zeroed pages from the kernel and touches none: memory is used as the cache fills up.
    return torch.from_numpy(np.zeros(shape, dtype=np.float32))
