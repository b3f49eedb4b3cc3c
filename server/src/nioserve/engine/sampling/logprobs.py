"""Log probabilities of chosen and of likely tokens, from the logits as the model gave them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nioserve.engine.messages import TokenLogprobs
from nioserve.engine.sampling.rows import take
from nioserve.engine.sampling.state import SamplerState

FLOOR = -9999.0
"""What is said of a token that cannot come: JSON has no infinity, and this is what vLLM says."""


class Reports:
    """The reports of one step. Made before the logits are edited; read when the tokens are chosen."""

    def __init__(self, logits: Tensor, states: Sequence[SamplerState]) -> None:
        self._wanted = [state.sampling.logprobs for state in states]
        self._rows = [row for row, count in enumerate(self._wanted) if count is not None]
        if not self._rows:
            return
        self._logprobs = take(logits, self._rows).log_softmax(dim=-1).nan_to_num_(FLOOR, 0, FLOOR).clamp_min_(FLOOR)
        most = max(count or 0 for count in self._wanted)
        values, tokens = self._logprobs.topk(min(most, logits.shape[1]), dim=-1)
        self._top = [list(zip(*pair, strict=True)) for pair in zip(tokens.tolist(), values.tolist(), strict=True)]

    def of(self, tokens: Sequence[int]) -> list[TokenLogprobs | None]:
        """Return the report of each sequence; None where none was asked for."""
        out: list[TokenLogprobs | None] = [None] * len(self._wanted)
        for index, row in enumerate(self._rows):
            chosen = float(self._logprobs[index, tokens[row]])
            out[row] = TokenLogprobs(chosen, self._top[index][: self._wanted[row]])
        return out
