"""The proof, at each load, that a model counts right here before it serves anyone.

Two prompts computed in pieces, side by side, over our cache must give the logits that the model's own code gives for
each of them alone and whole. State that is lost between steps, attention that we do not see, a mask of its own,
sequences that leak into each other: all of these show.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from nioserve.models.batch import Chunk
from nioserve.models.cache import BLOCK_SIZE
from nioserve.models.hf.attention import NAME
from nioserve.models.hf.cache import PagedCache
from nioserve.models.hf.model import TransformersModel
from nioserve.models.spec import ModelError

log = logging.getLogger(__name__)

_LONGEST = 41
"""Tokens of the longer prompt: it takes more than two blocks."""
_PIECE, _ALONE = 20, 4
"""Tokens of a piece, and how many at the end are computed one by one, as answers are."""
_MOST = 0.85
"""So many rows must agree. A rounding may tip the choice of an expert, and that row is another one."""
_EXACT, _ROUNDED = 1e-3, 0.1
"""How far logits may be off, as a share of their spread: when computed in float32, and in 16 bits."""
_MISTAKES = (TypeError, AttributeError, ValueError, LookupError, RuntimeError)
"""What code raises that was given something it did not expect."""


def prove(model: TransformersModel, *, exact: bool) -> None:
    """Compare our way with the model's own, and learn the shape of its cache; ModelError when they differ.

    `exact` says that the model computes in float32, so that nothing hides a small mistake.
    """
    family = model.spec.family
    length = min(_LONGEST, model.spec.max_model_len)
    generator = torch.Generator().manual_seed(0)
    # Low numbers: at the end of a vocabulary there are tokens that stand for images and the like.
    highest = min(model.spec.vocab_size, 1024)
    prompts = [torch.randint(highest, (size,), generator=generator).tolist() for size in (length, length // 2 + 1)]
    try:
        ours = _in_pieces(model, prompts)
        own = [_own(model, prompt) for prompt in prompts]
    except torch.OutOfMemoryError:
        raise
    except ModelError as error:
        raise ModelError(f"config.json: model_type {family!r} cannot be served: {error}") from error
    except _MISTAKES as error:
        log.info("the model's code failed", exc_info=True)
        raise ModelError(
            f"config.json: model_type {family!r} cannot be served: its code does not work with the engine's cache "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    errors = [_errors(*pair) for pair in zip(ours, own, strict=True)]
    parts = [torch.cat([error[:-_ALONE] for error in errors]), torch.cat([error[-_ALONE:] for error in errors])]
    worst = max(float(part.sort().values[int(_MOST * (len(part) - 1))]) for part in parts if len(part))
    allowed = _EXACT if exact else _ROUNDED
    if not worst <= allowed:  # not a number is no agreement either
        raise ModelError(
            f"config.json: model_type {family!r} cannot be served: over the engine's cache its logits differ from its "
            f"own by {worst:.1%} of their spread, and {allowed:.1%} is allowed"
        )
    log.info("the model agrees with its own code", extra={"difference": f"{worst:.2e}", "allowed": allowed})


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; libraries write pages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _errors(ours: Tensor, own: Tensor) -> Tensor:
    """Return how far each row [rows, vocabulary] is off, as a share of its spread [rows]."""
    return (ours - own).square().mean(dim=-1).sqrt() / own.std(dim=-1).clamp_min(1e-6)


def _in_pieces(model: TransformersModel, prompts: Sequence[list[int]]) -> list[Tensor]:
    """Return each prompt's logits, computed side by side in chunks, in blocks that lie scattered."""
    each = -(-_LONGEST // BLOCK_SIZE)
    total = each * len(prompts)
    blocks = [[total - 1 - (i * len(prompts) + number) for i in range(each)] for number in range(len(prompts))]
    # Always in float32: what a smaller type rounds away is no mistake of ours, and would hide one.
    cache = PagedCache(None, total, torch.float32, model.device)
    found: list[list[Tensor]] = [[] for _ in prompts]
    pieces = [list(_pieces(len(prompt), _PIECE - 7 * number)) for number, prompt in enumerate(prompts)]
    for step in range(max(map(len, pieces))):
        members = [number for number, spans in enumerate(pieces) if step < len(spans)]
        chunks = []
        for number in members:
            first, last = pieces[number][step]
            chunks.append(Chunk(prompts[number][first:last], first, blocks[number], last - first))
        logits = model.forward(chunks, cache).logits
        parts = torch.split(logits, [chunk.logits for chunk in chunks])
        for number, part in zip(members, parts, strict=True):
            found[number].append(part)
    model.learn_shapes(cache)
    return [torch.cat(parts) for parts in found]


def _pieces(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut a prompt into pieces of `size` tokens and, at its end, of one."""
    alone = max(0, length - _ALONE)
    yield from ((first, min(first + size, alone)) for first in range(0, alone, size))
    yield from ((first, first + 1) for first in range(alone, length))


@torch.inference_mode()
def _own(model: TransformersModel, prompt: list[int]) -> Tensor:
    """Return the logits of the model's own code, by its plainest attention and without a cache."""
    network = cast("Any", model.network)
    network.set_attn_implementation("eager")
    try:
        out = network(input_ids=torch.tensor([prompt], device=model.device), use_cache=False)
    finally:
        network.set_attn_implementation(NAME)
    return cast("Tensor", out.logits[0].to(torch.float32))
