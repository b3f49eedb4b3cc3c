"""`nioserve export`: from a Hugging Face directory or a GGUF file to a versioned INT8 directory for ONNX Runtime.

onnxruntime-genai's model builder makes the graph: weights in blocks of 32 with a scale each, activations quantised in
the same blocks as they come (MatMulNBits, 8 bits, accuracy level 4). It is then fitted to its use (`_fit`).
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import safe_open

from nioserve.backends import GRAPH, ONNX
from nioserve.models import manifest
from nioserve.models import quantize as conversion
from nioserve.models.spec import ModelError, decoder_obstacle, read_json

log = logging.getLogger(__name__)

_BLOCK = 32
_BUILDER = "onnxruntime_genai.models.builder"
_PACKAGES = ("onnx", "onnxruntime_genai", "onnx_ir")
_EMBEDDING = "model.embed_tokens.weight"
_INPUTS = {"input_ids", "attention_mask"}


def export(source: Path, target: Path, name: str | None = None, defaults: dict[str, float] | None = None) -> Path:
    """Convert `source` into the model directory `target` and return it.

    Nothing is visible at `target` until everything is written. `defaults` (temperature, top_p) are for requests that
    name none. ModelError when the source is not supported, the target is not empty, or a package is missing.
    """
    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise ModelError(f"{', '.join(missing)} not installed; exporting needs: pip install 'nioserve[export]'")
    with conversion.staged(source, target) as work:
        tensors, provenance = conversion.read_source(source, work)
        config = conversion.finish_configs(work, defaults or {})
        if (obstacle := decoder_obstacle(config)) is not None:
            raise ModelError(f"{source}: ONNX Runtime is fed models of the Llama family only, not {obstacle}")
        with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as scratch:
            checkpoint = Path(scratch) / "checkpoint"
            parameters = _write_checkpoint(checkpoint, tensors, work, config)
            _build(checkpoint, Path(scratch) / "built")
            _fit(Path(scratch) / "built" / GRAPH, work)
        scheme = {"kind": ONNX, "scheme": "w8a8", "weights": f"int8 per {_BLOCK} inputs",
                  "activations": f"int8 per {_BLOCK} inputs, dynamic", "parameters": parameters}  # fmt: skip
        manifest.write(work, name or conversion.default_name(source), scheme, provenance)
    return target


def _write_checkpoint(folder: Path, tensors: conversion.TensorSource, work: Path, config: dict[str, Any]) -> int:
    """Write what the builder reads: configuration, tokeniser, float32 weights. Return the number of parameters."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    shutil.copytree(work, folder)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]
    conversion.write_json(folder / "config.json", {**config, "architectures": [architecture], "dtype": "float32"})
    tied = bool(config.get("tie_word_embeddings"))
    names = [name for name in tensors.names() if not (tied and name == "lm_head.weight")]
    conversion.write_shards(((name, tensors.get(name).float()) for name in names), folder)
    # Any: safetensors' handles are not typed.
    shards: dict[str, Any] = {file.name: safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))}
    index = {name: file for file, shard in shards.items() for name in shard.keys()}  # noqa: SIM118  not a dict
    conversion.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    return sum(tensors.get(name).numel() for name in names)


def _build(checkpoint: Path, out: Path) -> None:
    """Run the model builder, in a process of its own: it prints, and keeps what it loaded."""
    options = ["accuracy_level=4", f"block_size={_BLOCK}", "shared_embeddings=false"]
    command = [sys.executable, "-m", _BUILDER, "-i", str(checkpoint), "-o", str(out), "-c", str(out / "cache"),
               "-p", "int8", "-e", "cpu", "--extra_options", *options]  # fmt: skip
    log.info("building the graph", extra={"block": _BLOCK})
    done = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, errors="replace"
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ModelError(f"the model builder of onnxruntime-genai failed: {reason}")


def _fit(graph_file: Path, work: Path) -> None:
    """Fit the builder's graph to its use, and write it.

    Logits are computed for `logit_rows`, the rows that are asked for, of all tokens in one row; a prompt's others would
    cost a quarter more for nothing. The last hidden states come out too, for embeddings. And a tied embedding, which
    the builder writes once more in float32, is read from the quantised head: that halves the file.
    """
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(graph_file)
    graph = model.graph
    unknown = {item.name for item in graph.input if not item.name.startswith("past_key_values.")} - _INPUTS
    if unknown:
        raise ModelError(f"the built graph asks for {', '.join(sorted(unknown))}, which the engine does not give")
    head = next(node for node in graph.node if "logits" in node.output)
    settings = {item.name: item.i for item in head.attribute}
    width, vocabulary, hidden = settings["K"], settings["N"], head.input[0]

    def insert_before(node: onnx.NodeProto, *new: onnx.NodeProto) -> None:
        place = next(index for index, item in enumerate(graph.node) if item.name == node.name)
        for offset, item in enumerate(new):
            graph.node.insert(place + offset, item)

    def constant(name: str, values: list[int]) -> None:
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))

    constant("flat_shape", [-1, width])
    insert_before(
        head,
        helper.make_node("Identity", [hidden], ["hidden_states"], "hidden_states"),
        helper.make_node("Reshape", [hidden, "flat_shape"], ["flat_hidden"], "/lm_head/Reshape"),
        helper.make_node("Gather", ["flat_hidden", "logit_rows"], ["head_rows"], "/lm_head/Gather", axis=0),
    )
    head.input[0] = "head_rows"
    graph.input.append(helper.make_tensor_value_info("logit_rows", TensorProto.INT64, ["rows"]))
    graph.output.remove(next(item for item in graph.output if item.name == "logits"))
    graph.output.extend(
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", vocabulary]),
            helper.make_tensor_value_info("hidden_states", TensorProto.FLOAT, ["batch_size", "sequence_length", width]),
        ]
    )
    embedding = next(node for node in graph.node if _EMBEDDING in node.input)
    if _tied(work) and width % settings["block_size"] == 0:
        constant("embedding_shape", [vocabulary, width])
        insert_before(
            embedding,
            helper.make_node("Reshape", [head.input[1], "embedding_shape"], ["embedding_rows"], "/embedding/Reshape"),
            helper.make_node(
                "GatherBlockQuantized", ["embedding_rows", "input_ids", head.input[2]], list(embedding.output),
                "/embedding/Gather", domain="com.microsoft", bits=settings["bits"], block_size=settings["block_size"],
                gather_axis=0, quantize_axis=1,
            ),
        )  # fmt: skip
        graph.node.remove(embedding)
        graph.initializer.remove(next(item for item in graph.initializer if item.name == _EMBEDDING))
    onnx.save(model, work / GRAPH, save_as_external_data=True, location=f"{GRAPH}.data", size_threshold=1024)


def _tied(work: Path) -> bool:
    return bool(read_json(work / "config.json").get("tie_word_embeddings"))
