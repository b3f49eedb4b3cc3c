"""Peers that are libraries: driven by the same loads in their own process, but without HTTP, which is in their favour.

An adapter is run as `python -m bench.adapters.NAME MODEL PROMPTS` by the peer's own interpreter, so only the standard
library and the peer may be imported. PROMPTS is a JSON list of lists of token ids. It answers each line on standard
input, a JSON object `{"load": {...}, "tokens": N}`, by one line: `{"window": [from, to], "records": [...]}`.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bench.course import Course, Load, Record

_IDLE_SECONDS = 0.005


class Progress(NamedTuple):
    """`tokens` new tokens of a request at a time; `last` once it is complete."""

    key: int
    time: float
    tokens: int
    last: bool


class Engine(Protocol):
    """What an adapter provides."""

    def add(self, key: int, prompt: list[int], tokens: int) -> None:
        """Take a request for exactly `tokens` greedy tokens."""

    def step(self) -> Iterable[Progress]:
        """Compute for a while; nothing to do is no error."""

    def drop(self) -> None:
        """Forget all requests."""


def run_load(engine: Engine, load: Load, prompts: Iterator[list[int]], tokens: int) -> dict[str, Any]:
    """Drive the engine through a load, as `client.drive` drives a server."""
    course = Course(load, time.monotonic())
    records: dict[int, Record] = {}
    running = 0
    while not course.over(now := time.monotonic()):
        for start in course.due(now):
            prompt, key = next(prompts), len(records)
            records[key] = Record(start, 200, now, prompt_tokens=len(prompt))
            engine.add(key, prompt, tokens)
            running += 1
        if not running:
            time.sleep(_IDLE_SECONDS)
            continue
        for progress in engine.step():
            record = records[progress.key]
            record.times += [progress.time] * progress.tokens
            if progress.last:
                record.finished, record.completion_tokens = progress.time, len(record.times)
                running -= 1
                course.ended(progress.time, well=True)
    engine.drop()
    window = course.window(time.monotonic())
    return {"window": window, "records": [record.to_json() for record in records.values()]}


def serve(engine: Engine, prompts_file: str) -> None:
    """Answer loads from standard input until it ends."""
    prompts = itertools.cycle(json.loads(Path(prompts_file).read_text(encoding="utf-8")))
    answers = sys.stdout
    sys.stdout = sys.stderr  # what the library prints is no answer
    print('{"ready": true}', file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        result = run_load(engine, Load(**asked["load"]), prompts, asked["tokens"])
        print(json.dumps(result), file=answers, flush=True)
