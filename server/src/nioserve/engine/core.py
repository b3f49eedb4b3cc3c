"""The engine without its process: requests in, tokens out, one step at a time."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from torch import Tensor

from nioserve.engine.blocks import BlockPool
from nioserve.engine.limits import Limits
from nioserve.engine.messages import FinishReason, Output, Submit
from nioserve.engine.sampler import sample
from nioserve.engine.scheduler import Scheduler, Sequence, Slice
from nioserve.models.base import CausalModel
from nioserve.models.batch import Chunk
from nioserve.models.cache import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did: outputs by worker, and its counts."""

    outputs: dict[bytes, list[Output]]
    tokens: int
    prompt_tokens: int
    generated: int
    queue_times: list[float]


class Engine:
    """Continuous batching over one model."""

    def __init__(self, model: CausalModel, limits: Limits) -> None:
        blocks = -(-limits.kv_cache_tokens // BLOCK_SIZE)
        self.scheduler = Scheduler(
            BlockPool(blocks, BLOCK_SIZE), limits.max_num_seqs, limits.max_num_batched_tokens, limits.max_num_queued
        )
        self._model, self._limits = model, limits
        self._cache = model.new_cache(blocks)
        self._eos = frozenset(model.spec.eos_token_ids)
        self._service_seconds = 1.0  # running mean of a request's time in the engine

    def add(self, worker: bytes, request: Submit) -> bool:
        """Queue a request; False when the queue is full. ValueError when it could never run."""
        limits, length = self._limits, len(request.prompt)
        if not 0 < length < length + request.max_tokens <= limits.max_model_len:
            raise ValueError(f"{length} prompt and {request.max_tokens} new tokens do not fit {limits.max_model_len}")
        if not all(0 <= token < self._model.spec.vocab_size for token in request.prompt):
            raise ValueError("a prompt token is outside the vocabulary")
        return self.scheduler.add(
            Sequence(
                key=(worker, request.request_id),
                tokens=list(request.prompt),
                prompt_length=length,
                max_tokens=request.max_tokens,
                sampling=request.sampling,
                random=random.Random(request.sampling.seed),  # noqa: S311  draws tokens, guards nothing
            )
        )

    def cancel(self, worker: bytes, request_id: str) -> None:
        """Drop a request; no more outputs follow. Unknown ones have just ended."""
        sequence = self.scheduler.find((worker, request_id))
        if sequence is not None:
            self.scheduler.finish(sequence)

    def cancel_worker(self, worker: bytes) -> None:
        """Drop all requests of a worker that is gone."""
        for sequence in self.scheduler.of_worker(worker):
            self.scheduler.finish(sequence)

    def retry_after(self) -> int:
        """Return in how many seconds a place in the queue is likely to be free: 1 to 60."""
        per_second = self._limits.max_num_seqs / max(self._service_seconds, 1e-3)
        return min(60, max(1, round(len(self.scheduler.waiting) / per_second / 2)))

    def step(self) -> StepResult:
        """Run one step: schedule, compute, draw, and hand out."""
        slices = self.scheduler.schedule()
        now = time.monotonic()
        queue_times = []
        for sequence in (part.sequence for part in slices):
            if sequence.scheduled is None:
                sequence.scheduled = now
                queue_times.append(now - sequence.arrived)
        ready = self._compute(slices)
        for part in slices:
            part.sequence.computed += part.count
        # Counted when the prompt is done, so that one computed again after a preemption does not count twice.
        prompt_tokens = sum(sequence.prompt_length for sequence, _ in ready if sequence.generated == 0)
        outputs: dict[bytes, list[Output]] = {}
        for sequence, token in ready:
            outputs.setdefault(sequence.key[0], []).append(self._take(sequence, token))
        return StepResult(outputs, sum(s.count for s in slices), prompt_tokens, len(ready), queue_times)

    def warm_up(self) -> None:
        """Run what the first clients would otherwise wait for: oneDNN builds its code per shape, torch its threads."""
        limits = self._limits
        for count in sorted({1, 2, 4, 8, 16, 32, limits.max_num_seqs}):
            if count <= limits.max_num_seqs:
                self._forward([Chunk([0], 0, [0], 1)] * count)
        longest = min(limits.max_num_batched_tokens, limits.max_model_len, limits.kv_cache_tokens)
        blocks = list(range(-(-longest // BLOCK_SIZE)))
        self._forward([Chunk([0] * longest, 0, blocks, 1)])

    def _compute(self, slices: list[Slice]) -> list[tuple[Sequence, int]]:
        """Run the model and return the next token of each sequence that is complete."""
        if not slices:
            return []
        chunks = [
            Chunk(s.sequence.tokens[s.sequence.computed : s.sequence.computed + s.count], s.sequence.computed,
                  s.sequence.blocks, int(s.completes))
            for s in slices
        ]  # fmt: skip
        logits = self._forward(chunks)
        sequences = [s.sequence for s in slices if s.completes]
        return list(zip(sequences, sample(logits, sequences), strict=True)) if sequences else []

    def _forward(self, chunks: list[Chunk]) -> Tensor:
        return self._model.forward(chunks, self._cache).logits

    def _take(self, sequence: Sequence, token: int) -> Output:
        """Append a token and end the sequence if that was its last."""
        sequence.tokens.append(token)
        reason = None
        if token in self._eos and not sequence.sampling.ignore_eos:
            reason = FinishReason.STOP
        elif sequence.generated >= sequence.max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            self.scheduler.finish(sequence)
            self._service_seconds += 0.1 * (time.monotonic() - sequence.arrived - self._service_seconds)
        # The end token is counted, and is no text: the worker's detokeniser skips special tokens.
        return Output(sequence.key[1], [token], reason)
