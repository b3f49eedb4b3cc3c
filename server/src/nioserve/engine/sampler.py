"""Drawing the next token of many sequences at once.

Each draw inverts the cumulative distribution at one uniform number from the sequence's own generator. So a seed gives
the same draws whatever runs beside it; the same text only as far as the logits are the same, which a batch of another
size may change in the last digits.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from nioserve.engine.scheduler import Sequence

_CANDIDATES = 256
"""Tokens looked at for top_p before the whole vocabulary is sorted: nearly always enough, and ten times as fast."""


@torch.inference_mode()
def sample(logits: Tensor, sequences: SequenceOf[Sequence]) -> list[int]:
    """Return the next token of each sequence from its row of float32 logits [sequences, vocabulary]."""
    drawn = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature > 0]
    if not drawn:
        return logits.argmax(dim=-1).tolist()
    tokens = torch.empty(len(sequences), dtype=torch.int64)
    greedy = [row for row in range(len(sequences)) if sequences[row].sampling.temperature == 0]
    if greedy:
        tokens[greedy] = logits[greedy].argmax(dim=-1)
    chosen = [sequences[row] for row in drawn]
    temperatures = torch.tensor([[s.sampling.temperature] for s in chosen])
    # The largest logit becomes 0 first, so that no temperature, however small, overflows.
    shifted = logits[drawn] - logits[drawn].amax(dim=-1, keepdim=True)
    probabilities = torch.softmax(shifted / temperatures.clamp_min(1e-6), dim=-1)
    uniform = torch.tensor([[s.random.random()] for s in chosen])
    top_p = torch.tensor([[s.sampling.top_p] for s in chosen])
    tokens[drawn] = _draw(probabilities, top_p, uniform)
    return tokens.tolist()


def _draw(probabilities: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    whole = top_p.squeeze(1) >= 1
    out = torch.empty(len(probabilities), dtype=torch.int64)
    if whole.any():
        out[whole] = _invert(probabilities[whole].cumsum(dim=-1), uniform[whole])
    if not whole.all():
        out[~whole] = _draw_top_p(probabilities[~whole], top_p[~whole], uniform[~whole])
    return out


def _draw_top_p(probabilities: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Draw from the fewest most likely tokens whose probabilities sum up to top_p."""
    values, indices = probabilities.topk(min(_CANDIDATES, probabilities.shape[-1]), dim=-1)
    cumulative = values.cumsum(dim=-1)
    if (cumulative[:, -1:] < top_p).any():
        values, indices = probabilities.sort(dim=-1, descending=True)
        cumulative = values.cumsum(dim=-1)
    kept = (cumulative - values) < top_p  # the first is always kept, however small top_p
    rank = _invert(torch.where(kept, values, 0).cumsum(dim=-1), uniform)
    return indices.gather(1, rank.unsqueeze(1)).squeeze(1)


def _invert(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Return the first index whose cumulative weight exceeds the uniform share of the total."""
    target = uniform * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    # Rounding may carry the target to the very end, past the last token that has any weight.
    last = (cumulative < cumulative[:, -1:]).sum(dim=-1)
    return torch.minimum(found, last)
