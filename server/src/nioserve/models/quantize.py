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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from nioserve.models import manifest
from nioserve.models.gguf import GgufTensors
from nioserve.models.linear import quantise_rows
from nioserve.models.spec import ModelError, parse_spec, read_json
from nioserve.models.weights import SCALE, Tensors

log = logging.getLogger(__name__)

SHARD_BYTES = 2 << 30
_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class TensorSource(Protocol):
    """Tensors by their Hugging Face names."""

    def names(self) -> list[str]:
        """Return all names, sorted."""
        ...

    def get(self, name: str) -> Tensor:
        """Return one tensor."""
        ...


def quantize(source: Path, target: Path, name: str | None = None, defaults: dict[str, float] | None = None) -> Path:
    """Convert `source` into the model directory `target` and return it.

    Nothing is visible at `target` until everything is written. ModelError when the source is not supported, or when
    the target exists and is not empty. `defaults` (temperature, top_p) are for requests that name none.
    """
    if not source.exists():
        raise ModelError(f"{source}: does not exist")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target}: exists and is not empty; choose another directory or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        tensors, provenance = _from_gguf(source, work) if source.is_file() else _from_directory(source, work)
        config = _finish_configs(work, defaults or {})
        _write_weights(tensors, work, tied=bool(config.get("tie_word_embeddings")))
        scheme = {"scheme": "w8a8", "weights": "int8 per output channel", "activations": "uint8 per token, dynamic"}
        manifest.write(work, name or _default_name(source), scheme, provenance)
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
    return target


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
    _save_tokenizer(source, work)
    # How transformers was called is no part of the model, and would make the hashes depend on its release.
    for key in ("_name_or_path", "_model_name_or_path", "transformers_version", "dtype"):
        config.pop(key, None)
    _write_json(work / "config.json", config)
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


def _finish_configs(work: Path, defaults: dict[str, float]) -> dict[str, Any]:
    """Check the configuration and write down every token that ends an answer; return the configuration."""
    config = read_json(work / "config.json")
    path = work / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    ends = set(parse_spec(config, generation).eos_token_ids)
    # The tokenizer's end token is the one its chat template writes; a base model's configuration may name another.
    ends |= _tokenizer_eos(work)
    if not ends:
        raise ModelError("neither generation_config.json nor the tokenizer names a token that ends an answer")
    _write_json(path, {**generation, **defaults, "eos_token_id": sorted(ends)})
    return config


def _tokenizer_eos(work: Path) -> set[int]:
    from tokenizers import Tokenizer

    path = work / "tokenizer_config.json"
    token = read_json(path).get("eos_token") if path.exists() else None
    text = token.get("content") if isinstance(token, dict) else token
    number = Tokenizer.from_file(str(work / "tokenizer.json")).token_to_id(text) if text else None
    return set() if number is None else {number}


def _quantised(tensors: TensorSource, tied: bool) -> Iterator[tuple[str, Tensor]]:
    for name in tensors.names():
        if (tied and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq"):
            continue
        tensor = tensors.get(name)
        if tensor.ndim == 2:
            yield name, (rows := quantise_rows(tensor))[0]
            yield name + SCALE, rows[1]
        else:
            yield name, tensor.to(torch.float32)


def _write_weights(tensors: TensorSource, work: Path, tied: bool) -> None:
    """Write the tensors in files of at most about 2 GiB, so that memory stays bounded whatever the model's size."""
    shard: dict[str, Tensor] = {}
    number = 0

    def flush() -> None:
        nonlocal shard, number
        number += 1
        save_file(shard, work / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
        log.info("weights written", extra={"file": f"model-{number:05d}.safetensors", "tensors": len(shard)})
        shard = {}

    for name, tensor in _quantised(tensors, tied):
        shard[name] = tensor
        # A matrix and its scales may part ways: the reader looks at all files.
        if sum(item.nbytes for item in shard.values()) >= SHARD_BYTES:
            flush()
    if shard:
        flush()


def _default_name(source: Path) -> str:
    return source.stem if source.is_file() else source.resolve().name


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
