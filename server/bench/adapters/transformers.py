"""`transformers.generate`, as people call it: in bfloat16, a batch at a time, the next one when it is complete."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from bench.adapters import Progress, serve

MAX_BATCH = 32


class _Clock(BaseStreamer):  # type: ignore[misc]  # transformers is imported untyped
    """Notes when each step's tokens came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        """Take the prompt, then one token per sequence."""
        self.times.append(time.monotonic())

    def end(self) -> None:
        """Nothing is left to do."""


class TransformersEngine:
    """A static batch of whatever waits."""

    def __init__(self, model: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        self._model.generation_config.pad_token_id = 0
        self._waiting: list[tuple[int, list[int], int]] = []

    def add(self, key: int, prompt: list[int], tokens: int) -> None:
        """Let a request wait for the next batch."""
        self._waiting.append((key, prompt, tokens))

    def step(self) -> Iterable[Progress]:
        """Generate one whole batch; all prompts of a load are of one length."""
        batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
        ids = torch.tensor([prompt for _, prompt, _ in batch])
        tokens, clock = batch[0][2], _Clock()
        with torch.inference_mode():
            self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, streamer=clock,
            )  # fmt: skip
        times = clock.times[1:]  # the first is the prompt's
        return [
            Progress(key, moment, 1, number == len(times) - 1)
            for number, moment in enumerate(times)
            for key, _, _ in batch
        ]

    def drop(self) -> None:
        """Forget what waits; nothing runs between steps."""
        self._waiting.clear()


if __name__ == "__main__":
    torch.set_num_threads(2)
    serve(TransformersEngine(sys.argv[1]), sys.argv[2])
