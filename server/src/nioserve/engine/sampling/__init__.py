"""From logits to tokens, for a whole batch at once.

What is applied, in vLLM's order (docs.vllm.ai, vllm.v1.sample.sampler), each only to the rows that ask for it:

1. log probabilities are read from the raw logits,
2. the grammar's mask, and no end token before `min_tokens`,
3. `logit_bias`,
4. penalties: repetition, then frequency and presence,
5. greedy rows take the largest logit; for the others follow temperature, `min_p`, `top_k`, `top_p`, and a draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nioserve.engine.messages import TokenLogprobs
from nioserve.engine.sampling.draw import argmax, draw
from nioserve.engine.sampling.edit import edit
from nioserve.engine.sampling.logprobs import Reports
from nioserve.engine.sampling.rows import take
from nioserve.engine.sampling.state import SamplerState

__all__ = ["Draw", "SamplerState", "sample"]


class Draw(NamedTuple):
    """One sequence's next token, and what was asked to be told about its probability."""

    token: int
    logprobs: TokenLogprobs | None = None


@torch.inference_mode()
def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[Draw]:
    """Return the next token of each sequence from its row of float32 logits [sequences, vocabulary].

    The logits are overwritten. Nothing else changes but the generators of rows that are drawn; tell each state by
    `accept` what becomes of its token.
    """
    if all(state.plain for state in states):
        return [Draw(token) for token in argmax(logits).tolist()]
    reports = Reports(logits, states)
    edit(logits, states)
    greedy = [row for row, state in enumerate(states) if state.greedy]
    drawn = [row for row, state in enumerate(states) if not state.greedy]
    tokens = torch.empty(len(states), dtype=torch.int64, device=logits.device)
    if greedy:
        tokens[greedy] = argmax(take(logits, greedy))
    if drawn:
        tokens[drawn] = draw(take(logits, drawn), [states[row] for row in drawn])
    chosen = tokens.tolist()
    return [Draw(token, report) for token, report in zip(chosen, reports.of(chosen), strict=True)]
