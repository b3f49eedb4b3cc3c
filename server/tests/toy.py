"""A model without weights: its next token depends on all tokens before, read back through the cache's blocks.

What a block holds is a hash of everything up to it. A block that is stale, shared wrongly or written by somebody else
changes every token after it, so an engine that gives the reference's tokens has kept its blocks in order.
"""

from __future__ import annotations

import numpy as np
import torch

from nioserve.engine.core import Engine
from nioserve.engine.limits import Limits, QueueLimits
from nioserve.engine.messages import Sampling, Submit
from nioserve.models.batch import StepOutput
from nioserve.models.cache import BLOCK_SIZE
from nioserve.models.spec import ModelSpec

VOCABULARY = 7  # few, so that texts repeat and guesses are right now and then
HIDDEN = 3
GREEDY = Sampling(temperature=0.0)


def _hash(before: int, token: int) -> int:
    return (before * 31 + token * 17 + 5) % 1009


def _next(state: int) -> int:
    return state * 13 % 101 % VOCABULARY


def answer(prompt: list[int], length: int) -> list[int]:
    """Return what the model says to a prompt when nothing stands between."""
    state, out = 0, []
    for token in prompt:
        state = _hash(state, token)
    for _ in range(length):
        out.append(_next(state))
        state = _hash(state, out[-1])
    return out


class ToyModel:
    """Raises whatever is put into `failures`, one a step."""

    spec = ModelSpec("toy", VOCABULARY, HIDDEN, 1, 1, 1, 4096, (), "float32")
    cache_bytes_per_token = 8

    def __init__(self) -> None:
        self.failures: list[Exception] = []
        self.steps: list[list] = []

    def new_cache(self, blocks: int) -> np.ndarray:
        return np.full(blocks * BLOCK_SIZE, -1)

    def forward(self, chunks, cache) -> StepOutput:
        self.steps.append(list(chunks))
        if self.failures:
            raise self.failures.pop(0)
        rows, pooled = [], []
        for chunk in chunks:
            state = 0 if chunk.start == 0 else int(cache[self._slot(chunk, chunk.start - 1)])
            states = []
            for position, token in enumerate(chunk.tokens, chunk.start):
                state = _hash(state, token)
                cache[self._slot(chunk, position)] = state
                states.append(state)
            rows += [_next(state) for state in states[len(states) - chunk.logits :]]
            if chunk.pool:
                pooled.append([float(sum(s % (n + 2) for s in states)) for n in range(HIDDEN)])
        logits = torch.nn.functional.one_hot(torch.tensor(rows, dtype=torch.int64), VOCABULARY).float()
        return StepOutput(logits, torch.tensor(pooled).view(-1, HIDDEN))

    @staticmethod
    def _slot(chunk, position: int) -> int:
        return chunk.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def toy_engine(**changes) -> Engine:
    """Return an engine over a toy model: 4 seats, 64 tokens a step, 16 blocks, contexts of 128 tokens."""
    limits = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_tokens": 256}
    return Engine(ToyModel(), Limits(**{**limits, **changes}))


def queue(**changes) -> QueueLimits:
    return QueueLimits(**changes)


def submit(engine: Engine, name: str, prompt: list[int], length: int = 4, **changes):
    """Queue a greedy request of worker b"w"; return why not."""
    return engine.add(b"w", Submit(name, prompt, length, **{"sampling": GREEDY, **changes}))


def drain(engine: Engine, steps: int = 10000) -> dict[str, list[int]]:
    """Run until nothing is left; return the tokens of each request."""
    out: dict[str, list[int]] = {}
    for _ in range(steps):
        if not engine.has_work:
            return out
        for output in engine.step().outputs.get(b"w", []):
            out.setdefault(output.request_id, []).extend(output.tokens)
    raise AssertionError("the engine did not finish")
