"""Guessing the next tokens from the request's own text, so that one step can yield several.

Answers repeat what they were given: names, code, quotations. Where the last few tokens were seen before, what followed
then is a guess that costs nothing; the model checks all guesses in one step, and those before the first wrong one stand
(prompt lookup decoding: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding). A greedy answer stays the same,
because each token is still the model's most likely one.
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST, _SHORTEST = 3, 2
"""Tokens that must match. One alone guesses wrong more often than right."""

_LONGEST_PAUSE = 64


class Drafter:
    """One sequence's guesses. After wrong ones it pauses, longer each time; a right one ends that."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> where its latest occurrence ends
        self._indexed = 0
        self._pause = self._resume_at = 0

    def propose(self, tokens: Sequence[int], count: int) -> tuple[int, ...]:
        """Return up to `count` guesses of what follows `tokens`, which must be those of the last call, and more."""
        if count < 1 or len(tokens) < self._resume_at:
            return ()
        self._index(tokens)
        for size in range(_LONGEST, _SHORTEST - 1, -1):
            end = self._ends.get(tuple(tokens[-size:]))
            if end is not None:
                period = len(tokens) - end  # what repeats may go on to repeat, beyond what is there yet
                return tuple(tokens[end + place % period] for place in range(count))
        return ()

    def learn(self, length: int, right: int) -> None:
        """Note how many of the last guesses were right; `length` is that of the tokens now."""
        self._pause = 0 if right else min(_LONGEST_PAUSE, 2 * self._pause or 1)
        self._resume_at = length + self._pause

    def _index(self, tokens: Sequence[int]) -> None:
        """Note the n-grams that something follows, so that the tokens' own end is not found as its own precedent."""
        for end in range(max(self._indexed, _SHORTEST), len(tokens)):
            for size in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._ends[tuple(tokens[end - size : end])] = end
        self._indexed = max(self._indexed, len(tokens))
