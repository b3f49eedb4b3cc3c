"""The engine's attention for transformers' models, registered in their attention interface.

A model's layers hand over queries, keys and values of the flat batch [1, heads, tokens, size]. Keys and values go to
the cache's blocks, and each group of rows attends to its own sequences. What a token may see is asked of the model
itself: its masking code hands over a rule on positions (causal, sliding window, chunks) in place of a tensor, so that
each kind of layer keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from nioserve.models.batch import AttentionGroup, Batch
from nioserve.models.hf.cache import LayerShape, PagedCache
from nioserve.models.spec import ModelError

NAME = "nioserve"

_HARMLESS = {"is_causal", "sliding_window", "position_ids", "use_cache", "output_attentions", "output_router_logits"}
"""Arguments of an attention function that change nothing here. The mask's rule says all that a sliding window does."""


@dataclass(frozen=True)
class Rule:
    """Which keys a query sees: `allows(batch, head, query position, key position)`, broadcast over tensors.

    reach: up to this context the rule is the causal one; None when it always is.
    """

    allows: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    reach: int | None


@dataclass
class Step:
    """One pass through the model. Layers are counted as they call, so that no model needs to number them."""

    batch: Batch
    cache: PagedCache
    calls: int = 0
    masks: dict[tuple[Rule, int], Tensor] = field(default_factory=dict)


_current: ContextVar[Step] = ContextVar("step")


@contextmanager
def running(step: Step) -> Iterator[None]:
    """Make `step` the one that attention calls belong to; ModelError when not every layer of the cache was used."""
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)
    if step.calls != len(step.cache.layers):
        raise ModelError(f"{step.calls} of {len(step.cache.layers)} attention layers were run")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Rule | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,  # noqa: ANN401  whatever a model passes
) -> tuple[Tensor, None]:
    """Store keys and values [1, kv_heads, tokens, size], and return what the queries find, [1, tokens, heads, size].

    softcap: bounds the scores (Gemma 2). s_aux: a score per head that takes its share and has no value (gpt-oss).
    ModelError for what is not understood.
    """
    step = _current.get()
    _check(step, query, attention_mask, {"is_causal": getattr(module, "is_causal", True), **kwargs})
    layer = step.cache.layer(step.calls, LayerShape(key.shape[1], key.shape[3], value.shape[3]))
    step.calls += 1
    layer.write(step.batch.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    queries = query[0].transpose(0, 1).to(layer.keys.dtype)
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    for number, group in enumerate(step.batch.groups):
        mask = _mask(step, attention_mask, number, query.device)
        rows = queries[group.first : group.last].view(group.sequences, -1, *queries.shape[1:])
        keys, values = layer.gather(group.table, group.sequences, group.length)
        if softcap is None and s_aux is None:
            found = _plain(rows, keys, values, mask, scaling)
        else:
            found = _extended(rows, keys, values, mask, scaling, softcap, s_aux)
        out[group.first : group.last] = found.flatten(0, 1)
    return out.unsqueeze(0), None


def _check(step: Step, query: Tensor, rule: Rule | None, kwargs: dict[str, Any]) -> None:
    if query.shape[0] != 1 or query.shape[2] != len(step.batch.tokens):
        raise ModelError(f"its attention runs over {tuple(query.shape)}, not over the tokens of the batch")
    if rule is None and kwargs.get("sliding_window") is not None:
        raise ModelError("it has a sliding window that its mask does not tell of")
    if rule is not None and not isinstance(rule, Rule):
        raise ModelError("it makes attention masks of its own")
    unknown = sorted(k for k, v in kwargs.items() if v is not None and v is not False and k not in _HARMLESS)
    if unknown:
        raise ModelError(f"its attention needs {', '.join(unknown)}, which is not supported")
    if kwargs["is_causal"] is False:
        raise ModelError("its tokens look ahead, it does not generate")


def _mask(step: Step, rule: Rule | None, number: int, device: torch.device) -> Tensor | None:
    """Return a group's mask, bool [sequences, 1, queries, keys] or smaller where it broadcasts; None: all keys."""
    group = step.batch.groups[number]
    if rule is None or rule.reach is None or group.length <= rule.reach:
        return group.mask
    if (rule, number) not in step.masks:
        step.masks[rule, number] = _evaluate(rule, group, step.batch.positions, device)
    return step.masks[rule, number]


def _evaluate(rule: Rule, group: AttentionGroup, positions: Tensor, device: torch.device) -> Tensor:
    queries = positions[group.first : group.last].view(group.sequences, 1, -1, 1)
    keys = torch.arange(group.length, device=device).view(1, 1, 1, -1)
    none = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    return rule.allows(none, none, queries, keys)


def _plain(rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attend from [sequences, queries, heads, size] to [sequences, kv_heads, keys, size]; the result is as `rows`."""
    sequences, count, heads, size = rows.shape
    if count > 1:
        out = functional.scaled_dot_product_attention(
            rows.transpose(1, 2), keys, values, attn_mask=mask, scale=scale, enable_gqa=heads != keys.shape[1]
        )
        return out.transpose(1, 2)
    # One query each: heads that share keys and values stand in as its queries, so that those are read once.
    grouped = rows.reshape(sequences, keys.shape[1], -1, size)
    out = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(sequences, 1, heads, -1)


def _extended(
    rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None,
    softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attend as `_plain` does, with bounded scores or sinks, which no fused kernel knows; in float32."""
    sequences, count, _, size = rows.shape
    grouped = rows.transpose(1, 2).reshape(sequences, keys.shape[1], -1, count, size).to(torch.float32)
    scores = grouped @ keys.unsqueeze(2).transpose(-1, -2).to(torch.float32)
    scores = scores * (size**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
    if sinks is not None:
        column = sinks.to(torch.float32).view(1, keys.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(dim=-1)[..., : keys.shape[2]]
    out = weights @ values.unsqueeze(2).to(torch.float32)
    return out.flatten(1, 2).transpose(1, 2)


def _rule(
    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    local_size: int | None = None,
    use_vmap: bool = False,
    **_others: Any,  # noqa: ANN401  sizes of a batch that is not ours
) -> Rule:
    """Stand in for transformers' mask makers: keep the rule, and let `attend` apply it to each group's positions."""
    if use_vmap:
        raise ModelError("it has an attention mask of its own")
    always = mask_function is causal_mask_function
    return Rule(mask_function, None if always else local_size or 0)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _rule)
