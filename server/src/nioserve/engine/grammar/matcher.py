"""One answer's progress through its grammar."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nioserve.engine.grammar.source import explain

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Matcher:
    """Which tokens may come next. A step that goes beyond the bounds ends the answer: `error` then says why."""

    def __init__(
        self, matcher: LLMatcher, vocabulary: int, eos_ids: Iterable[int], on_error: Callable[[], None]
    ) -> None:
        self._matcher, self._vocabulary, self._on_error = matcher, vocabulary, on_error
        self._eos = [token for token in eos_ids if token < vocabulary]

    @property
    def error(self) -> str:
        """What went wrong; nothing if nothing did."""
        return explain(self._matcher) if self._matcher.is_error() else ""

    def allowed(self, *, keep_going: bool) -> NDArray[np.bool_]:
        """Return whether each token may come next [vocabulary]: an end token only where the answer may end.

        With `keep_going` no end token is allowed either, unless nothing else is. Something always is.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, count=self._vocabulary, bitorder="little").view(np.bool_)
        ends = allowed[self._eos]
        if keep_going and ends.any():
            allowed[self._eos] = False
        if not allowed.any():
            allowed[self._eos] = ends if ends.any() else True
        return allowed

    def accept(self, token: int) -> bool:
        """Go on by a token; False when the grammar has failed."""
        # After a failure the library allows an end token, and takes it: that must not pass for a proper end.
        accepted = self._matcher.consume_token(token) and not self._matcher.is_error()
        if not accepted:
            self._on_error()
        return accepted
