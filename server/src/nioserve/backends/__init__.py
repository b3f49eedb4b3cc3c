"""What can stand behind the gateway besides our own decoder: ONNX Runtime, and any OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path

from nioserve.models import manifest

ONNX = "onnx"
GRAPH = "model.onnx"
"""The file of such a directory that holds the graph; its weights are beside it, in GRAPH.data."""


def kind_of(directory: Path) -> str:
    """Return what runs a model directory by its manifest: `onnx` or `torch`; ModelError when it cannot be read."""
    listed = manifest.read(directory)
    return str(listed["quantisation"].get("kind", "torch")) if listed else "torch"
