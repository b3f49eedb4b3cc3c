"""`nioserve quantize`: from a Hugging Face directory or a GGUF file to a versioned INT8 model directory.

The result is deterministic: the same source gives the same bytes, so that a model can be checked against a hash that
was written down elsewhere.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nioserve.models import manifest
from nioserve.models.gguf import GgufTensors
from nioserve.models.linear import quantise_rows
from nioserve.models.smoothing import HEAD, HEAD_ALPHA, SITES, smoothed
from nioserve.models.smoothing import TensorSource as TensorSource
from nioserve.models.spec import DecoderSpec, ModelError, decoder_obstacle, parse_spec, read_json
from nioserve.models.weights import SCALE, Tensors
from nioserve.texts import CALIBRATION, sha256_of_texts, tokenised

log = logging.getLogger(__name__)

SHARD_BYTES = 2 << 30
_LONGEST_TEXT = 2048
_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


WIDE = ("down_proj", "lm_head")
"""The layers that get their activations in 16 bits. What the others lose in 8, smoothing makes good; a down projection
is given products, whose outliers move from token to token, and a head that shares the embedding cannot be smoothed."""


def quantize(
    source: Path,
    target: Path,
    name: str | None = None,
    defaults: dict[str, float] | None = None,
    *,
    smooth: bool = True,
) -> Path:
    """Convert `source` into the model directory `target` and return it.

    `smooth` runs the calibration texts through models of the Llama family to fit the weights to their activations.

    Nothing is visible at `target` until everything is written. ModelError when the source is not supported, or when
    the target exists and is not empty. `defaults` (temperature, top_p) are for requests that name none.
    """
    with staged(source, target) as work:
        tensors, provenance = read_source(source, work)
        config = finish_configs(work, defaults or {})
        scheme = _write_weights(tensors, work, config, smooth)
        manifest.write(work, name or default_name(source), scheme, provenance)
    return target


@contextmanager
def staged(source: Path, target: Path) -> Iterator[Path]:
    """Yield a directory that becomes `target` when all went well, and leaves nothing behind when not.

    ModelError when there is no source, or when the target is not empty.
    """
    if not source.exists():
        raise ModelError(f"{source}: does not exist")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target}: exists and is not empty; choose another directory or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work
        work.chmod(0o755)
        for file in work.iterdir():
            file.chmod(0o644)
            _sync(file)
        _sync(work)
        work.rename(target)  # replaces an empty directory, and fails on one that has been filled meanwhile
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def read_source(source: Path, work: Path) -> tuple[TensorSource, dict[str, Any]]:
    """Write the source's configuration and tokeniser into `work`; return its tensors and provenance."""
    return _from_gguf(source, work) if source.is_file() else _from_directory(source, work)


def _write_weights(tensors: TensorSource, work: Path, config: dict[str, Any], smooth: bool) -> dict[str, Any]:
    """Convert and write the tensors; return what the manifest says of the scheme."""
    spec = parse_spec(config, read_json(work / "generation_config.json"))
    scheme = {"scheme": "w8a8", "weights": "int8 per output channel", "activations": "uint8 per token, dynamic"}
    tied = bool(config.get("tie_word_embeddings"))
    given: Iterable[tuple[str, Tensor]] = ((name, tensors.get(name)) for name in tensors.names())
    if not isinstance(spec, DecoderSpec):
        write_shards(_quantised(given, _matrices(tensors, work), tied), work)
        return scheme
    learnt: dict[str, Any] = {}
    if smooth:
        texts = tokenised(CALIBRATION, work, min(spec.max_model_len, _LONGEST_TEXT)).all()
        given = smoothed(tensors, spec, texts)
        alphas = {site.inputs: site.alpha for site in SITES}
        if not spec.tie_word_embeddings:
            alphas["head"] = HEAD_ALPHA
        learnt = {"smoothing": {"alpha": alphas, "texts_sha256": sha256_of_texts(CALIBRATION)}}
    write_shards(_quantised(given, None, tied), work)
    return {**scheme, **learnt, "wide_activations": list(WIDE)}


def unpack_gguf(source: Path, target: Path) -> None:
    """Write a GGUF file as a plain Hugging Face directory in float32 into the empty directory `target`."""
    tensors, _ = _from_gguf(source, target)
    write_shards(((name, tensors.get(name)) for name in tensors.names()), target)


def _from_directory(source: Path, work: Path) -> tuple[TensorSource, dict[str, Any]]:
    if manifest.read(source) is not None:
        raise ModelError(f"{source}: is a converted model already")
    for file in _COPIED:
        if (source / file).exists():
            shutil.copyfile(source / file, work / file)
    if not (work / "tokenizer.json").exists():
        _save_tokenizer(source, work)
    used = [source / file for file in _COPIED if (source / file).exists()] + sorted(source.glob("*.safetensors"))
    files = {path.name: manifest.sha256_of(path) for path in used}
    return Tensors(source), {"kind": "huggingface", "sha256": files}


def _from_gguf(source: Path, work: Path) -> tuple[TensorSource, dict[str, Any]]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name).to_dict()
    if (obstacle := decoder_obstacle(config)) is not None:
        raise ModelError(f"{source}: GGUF is read for the Llama family only, not {obstacle}; use its directory")
    _save_tokenizer(source, work)
    # How transformers was called is no part of the model, and would make the hashes depend on its release.
    for key in ("_name_or_path", "_model_name_or_path", "transformers_version", "dtype"):
        config.pop(key, None)
    write_json(work / "config.json", config)
    provenance = {"kind": "gguf", "sha256": {source.name: manifest.sha256_of(source)}}
    return GgufTensors(source, config), provenance


def _save_tokenizer(source: Path, work: Path) -> None:
    from transformers import AutoTokenizer

    if source.is_file():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    else:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    tokenizer.save_pretrained(work)
    if not (work / "tokenizer.json").exists():
        raise ModelError(f"{source}: its tokenizer has no fast form (tokenizer.json)")


def finish_configs(work: Path, defaults: dict[str, float]) -> dict[str, Any]:
    """Check the configuration and write down every token that ends an answer; return the configuration."""
    config = read_json(work / "config.json")
    path = work / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    ends = set(parse_spec(config, generation).eos_token_ids)
    # The tokenizer's end token is the one its chat template writes; a base model's configuration may name another.
    ends |= _tokenizer_eos(work)
    if not ends:
        raise ModelError("neither generation_config.json nor the tokenizer names a token that ends an answer")
    write_json(path, {**generation, **defaults, "eos_token_id": sorted(ends)})
    return config


def _tokenizer_eos(work: Path) -> set[int]:
    from tokenizers import Tokenizer

    path = work / "tokenizer_config.json"
    token = read_json(path).get("eos_token") if path.exists() else None
    text = token.get("content") if isinstance(token, dict) else token
    number = Tokenizer.from_file(str(work / "tokenizer.json")).token_to_id(text) if text else None
    return set() if number is None else {number}


def _matrices(tensors: TensorSource, work: Path) -> set[str]:
    """Return the names of the tensors that become INT8 in a model that our own decoders do not run."""
    # Of other architectures only transformers' code knows which matrices are those of linear layers.
    from nioserve.models.hf.load import int8_tensors

    return int8_tensors(work, tensors.names())


def _quantised(
    tensors: Iterable[tuple[str, Tensor]], chosen: set[str] | None, tied: bool
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        if (tied and name == HEAD) or name.endswith("rotary_emb.inv_freq"):
            continue
        if tensor.ndim == 2 and (chosen is None or name in chosen):
            yield name, (rows := quantise_rows(tensor))[0]
            yield name + SCALE, rows[1]
        else:
            yield name, tensor.to(torch.float32)


def write_shards(tensors: Iterable[tuple[str, Tensor]], work: Path) -> None:
    """Write the tensors in files of at most about 2 GiB, so that memory stays bounded whatever the model's size."""
    shard: dict[str, Tensor] = {}
    number = 0

    def flush() -> None:
        nonlocal shard, number
        number += 1
        save_file(shard, work / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
        log.info("weights written", extra={"file": f"model-{number:05d}.safetensors", "tensors": len(shard)})
        shard = {}

    for name, tensor in tensors:
        shard[name] = tensor
        # A matrix and its scales may part ways: the reader looks at all files.
        if sum(item.nbytes for item in shard.values()) >= SHARD_BYTES:
            flush()
    if shard:
        flush()


def default_name(source: Path) -> str:
    """Return what a model is called when nobody says."""
    return source.stem if source.is_file() else source.resolve().name


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object, always in the same form."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
