"""What the sampler remembers of one sequence."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nioserve.engine.messages import FinishReason, Sampling

if TYPE_CHECKING:
    from nioserve.engine.grammar.matcher import Matcher

GREEDY_BELOW = 1e-5
"""Temperatures below are 0, as in vLLM: float32 has no room for the quotient."""


class TokenCounts:
    """How often each token was seen, kept sparse and up to date: what penalties need, without a pass over the text."""

    def __init__(self, prompt: Iterable[int]) -> None:
        """Begin with the prompt's tokens, which count 0 times: penalties on counts are for the answer alone."""
        self._index = {token: position for position, token in enumerate(dict.fromkeys(prompt))}
        room = len(self._index) + 64
        self._ids = np.zeros(room, dtype=np.int64)
        self._counts = np.zeros(room, dtype=np.float32)
        self._ids[: len(self._index)] = list(self._index)

    @property
    def ids(self) -> NDArray[np.int64]:
        """The tokens seen, each once [tokens]."""
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of `ids` is in the answer [tokens]."""
        return self._counts[: len(self._index)]

    def add(self, token: int) -> None:
        """Count one more token of the answer."""
        position = self._index.setdefault(token, len(self._index))
        if position == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[position] = token
        self._counts[position] += 1


class SamplerState:
    """One sequence's sampling: its parameters, its generator, and what its tokens so far make of them.

    `eos_ids` are the model's end tokens; `matcher` belongs to `sampling.grammar` and is there if that is.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], eos_ids: Iterable[int], matcher: Matcher | None = None
    ) -> None:
        if (matcher is None) != (sampling.grammar is None):
            raise ValueError("a grammar needs its matcher, and a matcher its grammar")
        self.sampling = sampling
        self.eos_ids = tuple(eos_ids)
        self.matcher = matcher
        self.random = random.Random(sampling.seed)  # noqa: S311  draws tokens, guards nothing
        self.greedy = sampling.temperature < GREEDY_BELOW
        self.cuts = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        """Whether a draw looks at some of the tokens only."""
        self.counts = self._new_counts(prompt)
        self.generated = 0
        self._never_plain = not self.greedy or bool(
            sampling.logit_bias or self.counts or matcher or sampling.logprobs is not None
        )
        self.plain = self._is_plain()
        """Whether the next token is the largest logit and nothing is told about it: no state is needed to take it."""

    @property
    def holds_off_end(self) -> bool:
        """Whether the answer is shorter than `min_tokens`, so that no end token may come next."""
        return self.generated < self.sampling.min_tokens

    def accept(self, token: int) -> FinishReason | None:
        """Take note that `token` is the next one; return STOP when it ends the answer, ERROR when the grammar fails.

        A grammar's end is an end even with `ignore_eos`: nothing could follow.
        """
        self.generated += 1
        self.plain = self._is_plain()
        if self.counts is not None:
            self.counts.add(token)
        if self.matcher is not None and not self.matcher.accept(token):
            return FinishReason.ERROR
        ends = token in self.eos_ids and (self.matcher is not None or not self.sampling.ignore_eos)
        return FinishReason.STOP if ends else None

    def _is_plain(self) -> bool:
        return not self._never_plain and not self.holds_off_end

    def _new_counts(self, prompt: Sequence[int]) -> TokenCounts | None:
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            return TokenCounts(prompt)
        return TokenCounts(()) if sampling.presence_penalty or sampling.frequency_penalty else None
