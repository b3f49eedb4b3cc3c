"""OpenVINO GenAI's continuous batching, used as a library."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found]  # only in the peer's environment
import openvino_genai  # type: ignore[import-not-found]

from bench.adapters import Progress, serve

CACHE_GIB = 2


class OpenVinoEngine:
    """`ContinuousBatchingPipeline`, a step at a time, greedy."""

    def __init__(self, model: str) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GIB
        scheduler.max_num_seqs = 64
        scheduler.enable_prefix_caching = False
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": 2}
        )
        self._handles: dict[int, Any] = {}
        self._left: dict[int, int] = {}
        self._number = 0

    def add(self, key: int, prompt: list[int], tokens: int) -> None:
        """Queue a request."""
        config = openvino_genai.GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=tokens, ignore_eos=True, do_sample=False
        )
        self._number += 1
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        self._handles[key] = self._pipeline.add_request(self._number, ids, config)
        self._left[key] = tokens

    def step(self) -> Iterable[Progress]:
        """One step of the pipeline, then whatever its requests have to read."""
        self._pipeline.step()
        now = time.monotonic()
        found = []
        for key, handle in list(self._handles.items()):
            if not handle.can_read():
                continue
            (output,) = handle.read().values()
            count = len(output.generated_ids)
            self._left[key] -= count
            last = self._left[key] <= 0
            found.append(Progress(key, now, count, last))
            if last:
                del self._handles[key], self._left[key]
        return found

    def drop(self) -> None:
        """Stop what runs, and let the pipeline free it."""
        for handle in self._handles.values():
            handle.cancel()
        self._handles.clear()
        self._left.clear()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()


if __name__ == "__main__":
    serve(OpenVinoEngine(sys.argv[1]), sys.argv[2])
