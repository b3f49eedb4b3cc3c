"""Changes to logits before a token is chosen, in place, and only where a sequence asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nioserve.engine.sampling.state import SamplerState

FORBIDDEN = float("-inf")


def edit(logits: Tensor, states: Sequence[SamplerState]) -> None:
    """Apply grammars, `min_tokens`, `logit_bias` and penalties to the logits [sequences, vocabulary]."""
    _mask(logits, list(enumerate(states)))
    _hold_off_end(logits, [(row, s) for row, s in enumerate(states) if s.holds_off_end and s.matcher is None])
    _bias(logits, [(row, state) for row, state in enumerate(states) if state.sampling.logit_bias])
    _penalise(logits, [(row, state) for row, state in enumerate(states) if state.counts is not None])


_Rows = Sequence[tuple[int, SamplerState]]


def _mask(logits: Tensor, rows: _Rows) -> None:
    for row, state in rows:
        if state.matcher is not None:
            forbidden = ~state.matcher.allowed(keep_going=state.holds_off_end)
            logits[row].masked_fill_(torch.from_numpy(forbidden).to(logits.device), FORBIDDEN)


def _hold_off_end(logits: Tensor, rows: _Rows) -> None:
    for row, state in rows:
        logits[row, [token for token in state.eos_ids if token < logits.shape[1]]] = FORBIDDEN


def _bias(logits: Tensor, rows: _Rows) -> None:
    if not rows:
        return
    sizes = [len(state.sampling.logit_bias) for _, state in rows]
    tokens = np.concatenate([np.fromiter(state.sampling.logit_bias, np.int64) for _, state in rows])
    values = np.concatenate([np.fromiter(state.sampling.logit_bias.values(), np.float32) for _, state in rows])
    where = _where(logits, [row for row, _ in rows], sizes, tokens)
    logits[where] += torch.from_numpy(values).to(logits.device)


def _penalise(logits: Tensor, rows: _Rows) -> None:
    """Divide positive logits of tokens seen by the repetition penalty and multiply negative ones (CTRL, 1909.05858,
    as transformers does); then subtract OpenAI's frequency penalty per occurrence in the answer, and presence once.
    """
    if not rows:
        return
    counts = [state.counts for _, state in rows if state.counts is not None]
    sizes = [len(c.ids) for c in counts]
    where = _where(logits, [row for row, _ in rows], sizes, np.concatenate([c.ids for c in counts]))

    def spread(values: Sequence[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), sizes)).to(logits.device)

    repetition = spread([state.sampling.repetition_penalty for _, state in rows])
    frequency = spread([state.sampling.frequency_penalty for _, state in rows])
    presence = spread([state.sampling.presence_penalty for _, state in rows])
    times = torch.from_numpy(np.concatenate([c.counts for c in counts])).to(logits.device)
    seen = logits[where]
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    logits[where] = seen - frequency * times - presence * (times > 0)


def _where(logits: Tensor, rows: list[int], sizes: list[int], tokens: NDArray[Any]) -> tuple[Tensor, Tensor]:
    """Return the index of `sizes[i]` tokens of row `rows[i]` each."""
    repeated = np.repeat(np.array(rows, dtype=np.int64), sizes)
    return torch.from_numpy(repeated).to(logits.device), torch.from_numpy(tokens).to(logits.device)
