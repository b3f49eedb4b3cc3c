"""A request while it is in the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import Tensor

from nioserve.engine.sampling import SamplerState
from nioserve.engine.speculate import Drafter


@dataclass(slots=True, eq=False)
class Sequence:
    """One request: its tokens so far, how many of them are computed, and the blocks it holds.

    `tokens` only ever grows. The keys and values of the first `computed` ones are in `blocks`; the first `published`
    blocks can be found by others of the department.
    """

    key: tuple[bytes, str]  # which worker, and its name for the request
    tokens: list[int]
    prompt_length: int
    max_tokens: int
    state: SamplerState
    department: str = ""
    long_conversation: bool = False
    embed: bool = False
    drafter: Drafter | None = None
    arrived: float = field(default_factory=time.monotonic)
    scheduled: float | None = None  # when it was first in a step
    ticket: int = -1  # its place in the order of first admission
    cached_tokens: int = 0  # of the prompt, when first admitted
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    published: int = 0
    pooled: Tensor | None = None  # sum of the hidden states computed so far [hidden size]

    @property
    def generated(self) -> int:
        """Return the number of tokens generated so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        """Return the number of tokens that are not computed yet: 1 while it decodes."""
        return len(self.tokens) - self.computed

    def forget(self) -> None:
        """Begin again: nothing is computed. Its blocks must have been released."""
        self.computed = self.published = 0
        self.pooled = None


@dataclass(frozen=True, slots=True)
class Slice:
    """What is computed of a sequence in a step: `count` of its tokens, and after its last one `drafts`, guesses."""

    sequence: Sequence
    count: int
    drafts: tuple[int, ...] = ()

    @property
    def completes(self) -> bool:
        """Return whether all tokens are computed after this, so that the next one can be drawn."""
        return self.count == self.sequence.remaining
