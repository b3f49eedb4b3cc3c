"""Requests whose grammar is being compiled: admitted, and not in a queue yet."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from nioserve.engine.grammar.compiler import GrammarCompiler
from nioserve.engine.grammar.matcher import Matcher
from nioserve.engine.grammar.source import GrammarError
from nioserve.engine.messages import Grammar, Submit

TIMEOUT_SECONDS = 20.0
"""API workers have tried each grammar before, so this is for an engine that gets no time to compile."""


class Ready(NamedTuple):
    """A request and the matcher for its answer, or what is wrong with its grammar."""

    worker: bytes
    request: Submit
    outcome: Matcher | GrammarError


class _Compiling(NamedTuple):
    request: Submit
    matcher: Future[Matcher]
    since: float


class WaitingRoom:
    """Keeps requests until their grammar is compiled. `compiler` is None where the model's tokeniser is not known."""

    def __init__(self, compiler: GrammarCompiler | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._compiler, self._clock = compiler, clock
        self._compiling: dict[tuple[bytes, str], _Compiling] = {}

    def __len__(self) -> int:
        return len(self._compiling)

    def add(self, worker: bytes, request: Submit, grammar: Grammar) -> bool:
        """Begin to compile; False when there is nothing to do it with."""
        if self._compiler is None:
            return False
        entry = _Compiling(request, self._compiler.request(grammar), self._clock())
        self._compiling[worker, request.request_id] = entry
        return True

    def drop(self, worker: bytes, request_id: str | None = None) -> None:
        """Forget a request, or all of a worker."""
        for key in [key for key in self._compiling if key[0] == worker and request_id in (None, key[1])]:
            self._compiling.pop(key).matcher.cancel()

    def take_ready(self) -> list[Ready]:
        """Return, once, the requests whose grammar is compiled, has failed, or has taken too long."""
        late = self._clock() - TIMEOUT_SECONDS
        done = [key for key, entry in self._compiling.items() if entry.matcher.done() or entry.since < late]
        ready = []
        for worker, request_id in done:
            entry = self._compiling.pop((worker, request_id))
            ready.append(Ready(worker, entry.request, _outcome(entry.matcher)))
        return ready


def _outcome(matcher: Future[Matcher]) -> Matcher | GrammarError:
    if not matcher.done():
        matcher.cancel()
        return GrammarError(f"it was not compiled within {TIMEOUT_SECONDS:.0f} seconds")
    error = matcher.exception()
    if error is None:
        return matcher.result()
    return error if isinstance(error, GrammarError) else GrammarError(f"it cannot be compiled: {error}")
