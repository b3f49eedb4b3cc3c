"""Compiling grammars for the model's tokeniser, beside the steps, once for all requests that share one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from nioserve.engine.grammar.matcher import Matcher
from nioserve.engine.grammar.source import GrammarError, build, translate
from nioserve.engine.messages import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KEPT = 32
"""Compiled grammars kept; each holds 16 MB at the very most, and mostly less than one."""


class GrammarCompiler:
    """Compiles in a thread, where the library does not hold up the engine's.

    The first grammar costs more: the library takes 60 MB and a third of a second for a vocabulary of 49152 tokens.
    """

    def __init__(self, tokenizer_file: Path, vocabulary: int, eos_ids: Iterable[int]) -> None:
        self._tokenizer_file, self._vocabulary, self._eos = tokenizer_file, vocabulary, sorted(eos_ids)
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")

    def request(self, grammar: Grammar) -> Future[Matcher]:
        """Return a new matcher, soon; GrammarError is the future's when the grammar cannot be used."""
        with self._lock:
            known = self._known(grammar)
        if known is None:
            return self._threads.submit(self._compile, grammar)
        ready: Future[Matcher] = Future()
        ready.set_result(self._new(grammar, known))
        return ready

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        text = self._tokenizer_file.read_text(encoding="utf-8")
        return LLTokenizer(text, n_vocab=self._vocabulary, eos_token=self._eos)

    def _compile(self, grammar: Grammar) -> Matcher:
        with self._lock:
            known = self._known(grammar)  # compiled for another request while this one waited
        if known is None:
            try:
                tokenizer = self._tokenizer
            except (ValueError, OSError) as error:
                raise GrammarError(f"this model's tokeniser cannot be used with grammars: {error}") from error
            known = build(translate(grammar), tokenizer)
        with self._lock:
            self._compiled[grammar] = known
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return self._new(grammar, known)

    def _known(self, grammar: Grammar) -> LLMatcher | None:
        """Return a compiled grammar, which is then the last to be dropped."""
        if grammar in self._compiled:
            self._compiled.move_to_end(grammar)
        return self._compiled.get(grammar)

    def _new(self, grammar: Grammar, compiled: LLMatcher) -> Matcher:
        return Matcher(compiled.deep_copy(), self._vocabulary, self._eos, partial(self._drop, grammar))

    def _drop(self, grammar: Grammar) -> None:
        """Forget a grammar whose automaton is full: copies share it."""
        with self._lock:
            self._compiled.pop(grammar, None)
