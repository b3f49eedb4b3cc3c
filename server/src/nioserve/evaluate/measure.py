"""Running a model over texts exactly as the engine does, and noting what it says at each token.

Texts go through in chunks, as prompts do; answers token by token in one batch, as they are generated.
"""

from __future__ import annotations

import logging
import resource
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nioserve.backends import GRAPH, ONNX, kind_of
from nioserve.models import manifest
from nioserve.models.base import CausalModel
from nioserve.models.batch import Chunk
from nioserve.models.cache import BLOCK_SIZE
from nioserve.models.loader import load
from nioserve.models.quantize import unpack_gguf
from nioserve.models.spec import ModelError, load_spec
from nioserve.models.weights import SCALE, Tensors
from nioserve.texts import EVALUATION, tokenised

log = logging.getLogger(__name__)

ANSWER_TOKENS = 64
_CHUNK_TOKENS = 512
_LONGEST = 1024


@dataclass(frozen=True, slots=True)
class Section:
    """What a model said at each token of some texts but the first ones: lists of the same length."""

    targets: list[int]  # the tokens that came
    tops: list[int]  # the most likely tokens
    log_probabilities: list[float]  # of the targets, natural logarithm


@dataclass(frozen=True, slots=True)
class Measurement:
    """One model over the texts, and over answers where there were any."""

    name: str
    sections: dict[str, Section]
    answers: list[list[int]]
    weight_bytes: int
    fp16_bytes: int  # the same weights in 16 bits
    peak_bytes: int  # resident memory of the process that ran it


def measure(source: Path, dtype: str, answers: list[list[int]] | None) -> Measurement:
    """Run a model directory or GGUF file in a process of its own, so that its peak memory is its own.

    Without `answers` the model writes them, greedily. ModelError when it cannot be loaded.
    """
    if not source.exists():
        raise ModelError(f"{source}: does not exist")
    log.info("measuring", extra={"model": str(source), "dtype": dtype})
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        if source.is_dir():
            return pool.submit(measure_here, source, source.resolve().name, dtype, answers).result()
        with tempfile.TemporaryDirectory(prefix="nioserve-") as directory:
            # In a process of its own too: reading GGUF is no part of running the model.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as unpacker:
                unpacker.submit(unpack_gguf, source, Path(directory)).result()
            return pool.submit(measure_here, Path(directory), source.name, dtype, answers).result()


def measure_here(directory: Path, name: str, dtype: str, answers: list[list[int]] | None) -> Measurement:
    """Run a model directory in this process, whose peak memory is then reported."""
    length = min(load_spec(directory).max_model_len, _LONGEST)
    texts = tokenised(EVALUATION, directory, length)
    model = load(directory, dtype, length)
    sections = {
        kind: score(model, group)
        for kind, group in (("english", texts.english), ("chats", texts.chats), ("chinese", texts.chinese))
        if group
    }
    prompts = [prompt for prompt in texts.prompts if len(prompt) + ANSWER_TOKENS <= length]
    found, sections["answers"] = answer(model, prompts, answers)
    stored, fp16 = _weight_bytes(directory)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    listed = manifest.read(directory)
    return Measurement(str(listed["name"]) if listed else name, sections, found, stored, fp16, peak)


def score(model: CausalModel, texts: Sequence[Sequence[int]]) -> Section:
    """Run texts, one after the other, in chunks; the last token of each is only a target."""
    section = Section([], [], [])
    for text in texts:
        blocks = range(-(-len(text) // BLOCK_SIZE))
        cache = model.new_cache(len(blocks))
        for start in range(0, len(text) - 1, _CHUNK_TOKENS):
            end = min(start + _CHUNK_TOKENS, len(text) - 1)
            chunk = Chunk(text[start:end], start, blocks[: -(-end // BLOCK_SIZE)], logits=end - start)
            _note(section, model.forward([chunk], cache).logits, text[start + 1 : end + 1])
    return section


def answer(
    model: CausalModel, prompts: Sequence[Sequence[int]], answers: list[list[int]] | None
) -> tuple[list[list[int]], Section]:
    """Run all answers together, a token of each a step: the given ones, or greedy ones up to an end token."""
    section = Section([], [], [])
    if not prompts:
        return [], section
    ends = set(model.spec.eos_token_ids)
    each = max(-(-(len(prompt) + ANSWER_TOKENS) // BLOCK_SIZE) for prompt in prompts)
    blocks = [range(i * each, (i + 1) * each) for i in range(len(prompts))]
    cache = model.new_cache(each * len(prompts))
    written: list[list[int]] = [[] for _ in prompts]
    chunks = [
        Chunk(prompt, 0, mine[: -(-len(prompt) // BLOCK_SIZE)], logits=1)
        for prompt, mine in zip(prompts, blocks, strict=True)
    ]
    running = list(range(len(prompts)))
    # Copied: a model may use one buffer for the logits of all its steps.
    rows = torch.cat([model.forward([chunk], cache).logits.clone() for chunk in chunks])
    while True:
        if answers is None:
            chosen = [int(token) for token in rows.argmax(dim=-1)]
        else:
            chosen = [answers[i][len(written[i])] for i in running]
        _note(section, rows, chosen)
        for i, token in zip(running, chosen, strict=True):
            written[i].append(token)
        if answers is None:
            running = [i for i in running if len(written[i]) < ANSWER_TOKENS and written[i][-1] not in ends]
        else:
            running = [i for i in running if len(written[i]) < len(answers[i])]
        if not running:
            return written, section
        steps = []
        for i in running:
            position = len(prompts[i]) + len(written[i]) - 1
            steps.append(Chunk(written[i][-1:], position, blocks[i][: position // BLOCK_SIZE + 1], logits=1))
        rows = model.forward(steps, cache).logits


def _note(section: Section, logits: Tensor, targets: Sequence[int]) -> None:
    wanted = torch.tensor(targets).unsqueeze(1)
    logits = logits.to("cpu", torch.float32)
    section.targets.extend(targets)
    section.tops.extend(logits.argmax(dim=-1).tolist())
    section.log_probabilities.extend((logits.gather(1, wanted)[:, 0] - logits.logsumexp(dim=-1)).tolist())


def _weight_bytes(directory: Path) -> tuple[int, int]:
    """Return the bytes of the weights as they are stored, and as they would be in 16 bits."""
    if kind_of(directory) == ONNX:
        # The graph's file holds its tables of cosines too, which count against it.
        scheme = (manifest.read(directory) or {})["quantisation"]
        return (directory / f"{GRAPH}.data").stat().st_size, 2 * int(scheme["parameters"])
    tensors = Tensors(directory)
    stored = fp16 = 0
    for name in tensors.names():
        tensor: Any = tensors.get(name)
        stored += tensor.nbytes
        fp16 += 0 if name.endswith(SCALE) else 2 * tensor.numel()
    return stored, fp16
