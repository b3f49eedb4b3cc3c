"""The engine without its process: requests in, tokens out, one step at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nioserve.engine.admission import Admission
from nioserve.engine.blocks import BlockPool
from nioserve.engine.grammar.compiler import GrammarCompiler
from nioserve.engine.intake import Intake
from nioserve.engine.limits import Limits
from nioserve.engine.messages import FinishReason, Output, Rejected, Submit
from nioserve.engine.sampling import Draw, sample
from nioserve.engine.scheduler import Scheduler
from nioserve.engine.sequence import Sequence, Slice
from nioserve.models.base import CausalModel
from nioserve.models.batch import Chunk, StepOutput
from nioserve.models.cache import BLOCK_SIZE


@dataclass(slots=True)
class StepResult:
    """What one step did: outputs and late rejections by worker, and its counts."""

    outputs: dict[bytes, list[Output]] = field(default_factory=dict)
    rejected: list[tuple[bytes, Rejected]] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    generated: int = 0
    drafts: int = 0
    accepted: int = 0
    shed: int = 0
    queue_times: list[float] = field(default_factory=list)

    def add(self, sequence: Sequence, output: Output) -> None:
        """Add an output of a sequence."""
        self.outputs.setdefault(sequence.key[0], []).append(output)


class Engine:
    """Continuous batching over one model."""

    def __init__(self, model: CausalModel, limits: Limits, grammars: GrammarCompiler | None = None) -> None:
        blocks = -(-limits.kv_cache_tokens // BLOCK_SIZE)
        self.scheduler = Scheduler(BlockPool(blocks, BLOCK_SIZE), limits)
        self.admission = Admission(self.scheduler, limits)
        self.intake = Intake(model.spec, self.scheduler, self.admission, limits, grammars)
        self.limits = limits
        self._model, self._cache = model, model.new_cache(blocks)
        self._to_shed = 1

    @property
    def has_work(self) -> bool:
        """Return whether a step would do anything, now or soon."""
        return self.scheduler.has_work or len(self.intake.compiling) > 0

    def add(self, worker: bytes, request: Submit) -> Rejected | None:
        """Queue a request, or return why not."""
        return self.intake.submit(worker, request)

    def cancel(self, worker: bytes, request_id: str) -> None:
        """Drop a request; no more outputs follow. Unknown ones have just ended."""
        self.intake.compiling.drop(worker, request_id)
        sequence = self.scheduler.find((worker, request_id))
        if sequence is not None:
            self.scheduler.finish(sequence)

    def cancel_worker(self, worker: bytes) -> None:
        """Drop all requests of a worker that is gone."""
        self.intake.compiling.drop(worker)
        for sequence in self.scheduler.sequences:
            if sequence.key[0] == worker:
                self.scheduler.finish(sequence)

    def step(self) -> StepResult:
        """Run one step: schedule, compute, draw, and hand out. Running out of memory costs the newest requests only."""
        result, started = StepResult(), time.monotonic()
        for worker, request_id in self.intake.queue_compiled():
            result.outputs.setdefault(worker, []).append(Output(request_id, [], FinishReason.ERROR))
        self._expire(result, started)
        slices = self.scheduler.schedule()
        if not slices:
            return result
        for part in slices:
            if part.sequence.scheduled is None:
                part.sequence.scheduled = started
                result.queue_times.append(started - part.sequence.arrived)
        try:
            draws = self._compute(slices)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            self._shed(result)
            return result
        self._to_shed = 1
        for part, drawn in zip(slices, draws, strict=True):
            result.tokens += part.count + len(part.drafts)
            self._take(part, drawn, result)
        self.admission.pace.step(result.tokens, time.monotonic() - started)
        return result

    def warm_up(self) -> None:
        """Run what the first clients would otherwise wait for: oneDNN builds its code per shape, torch its threads."""
        limits = self.limits
        for count in sorted({1, 2, 4, 8, 16, 32, limits.max_num_seqs}):
            if count <= limits.max_num_seqs:
                self._forward([Chunk([0], 0, [0], 1)] * count)
        longest = min(limits.max_num_batched_tokens, limits.max_model_len, limits.kv_cache_tokens)
        blocks = list(range(-(-longest // BLOCK_SIZE)))
        self._forward([Chunk([0] * longest, 0, blocks, 1)])

    def _expire(self, result: StepResult, now: float) -> None:
        """Turn away what has waited too long without ever running."""
        for queue in self.scheduler.queues:
            late = [s for s in queue.waiting if s.scheduled is None and now - s.arrived > self.limits.queue_timeout]
            for sequence in late:
                self.scheduler.finish(sequence)
                worker, request_id = sequence.key
                again = self.admission.retry_after(queue)
                result.rejected.append((worker, Rejected(request_id, "queue_timeout", again)))

    def _compute(self, slices: SequenceOf[Slice]) -> list[list[Draw]]:
        """Run the model; return the draws of each slice: none while a prompt is not complete, one more than guesses."""
        out = self._forward([_chunk(part) for part in slices])
        rows = [0 if part.sequence.embed or not part.completes else 1 + len(part.drafts) for part in slices]
        states = [part.sequence.state for part, count in zip(slices, rows, strict=True) for _ in range(count)]
        draws = iter(sample(out.logits, states) if states else ())
        pooled = iter(out.pooled)
        for part in slices:
            if part.sequence.embed:
                _pool(part.sequence, next(pooled))
        return [[next(draws) for _ in range(count)] for count in rows]

    def _forward(self, chunks: list[Chunk]) -> StepOutput:
        return self._model.forward(chunks, self._cache)

    def _take(self, part: Slice, draws: SequenceOf[Draw], result: StepResult) -> None:
        """Note what a slice gave, and end its sequence if that was its last."""
        sequence = part.sequence
        if not draws:
            self._take_chunk(part, result)
            return
        first = sequence.generated == 0
        tokens: list[int] = []
        reason = None
        for index, draw in enumerate(draws):
            tokens.append(draw.token)
            reason = sequence.state.accept(draw.token)
            if reason is None and sequence.generated + len(tokens) >= sequence.max_tokens:
                reason = FinishReason.LENGTH
            # What comes after holds only if this one was guessed.
            if reason is not None or index == len(part.drafts) or part.drafts[index] != draw.token:
                break
        sequence.tokens.extend(tokens)
        right = len(tokens) - 1
        self.scheduler.advance(sequence, part.count + right)
        if part.drafts and sequence.drafter is not None:
            sequence.drafter.learn(len(sequence.tokens), right)
            result.drafts += len(part.drafts)
            result.accepted += right
        result.generated += len(tokens)
        if first:  # counted here, so that a prompt computed again after a preemption does not count twice
            result.prompt_tokens += sequence.prompt_length
        if reason is not None:
            self.scheduler.finish(sequence)
            self.admission.pace.answered(sequence.generated)
        # The end token is counted, and is no text: the worker's detokeniser skips special tokens.
        logprobs = [draw.logprobs for draw in draws if draw.logprobs is not None] or None
        cached = sequence.cached_tokens if first else 0
        result.add(sequence, Output(sequence.key[1], tokens, reason, logprobs, cached))

    def _take_chunk(self, part: Slice, result: StepResult) -> None:
        """Note a part of a prompt; the last one of an embedding is its answer."""
        sequence, complete = part.sequence, part.completes
        self.scheduler.advance(sequence, part.count)
        if not complete or sequence.pooled is None:
            return
        self.scheduler.finish(sequence)
        result.prompt_tokens += sequence.prompt_length
        unit: list[float] = torch.nn.functional.normalize(sequence.pooled, dim=0).tolist()
        result.add(sequence, Output(sequence.key[1], [], FinishReason.STOP, embedding=unit))

    def _shed(self, result: StepResult) -> None:
        """Give up the newest requests: one, and twice as many each time that this did not help."""
        victims = self.scheduler.running[-self._to_shed :]
        self._to_shed *= 2
        for sequence in victims:
            self.scheduler.finish(sequence)
            result.add(sequence, Output(sequence.key[1], [], FinishReason.ERROR))
        result.shed = len(victims)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _chunk(part: Slice) -> Chunk:
    sequence, start = part.sequence, part.sequence.computed
    tokens = [*sequence.tokens[start : start + part.count], *part.drafts]
    if sequence.embed:
        return Chunk(tokens, start, sequence.blocks, pool=True)
    return Chunk(tokens, start, sequence.blocks, 1 + len(part.drafts) if part.completes else 0)


def _pool(sequence: Sequence, part: Tensor) -> None:
    """Add a chunk's sum to its sequence's; its mean has the same direction, and that is all that is wanted."""
    sequence.pooled = part.clone() if sequence.pooled is None else sequence.pooled + part


def _out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory ran out: torch has a class of its own for that on GPUs only."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
