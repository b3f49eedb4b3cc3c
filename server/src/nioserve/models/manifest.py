"""The manifest of a versioned model directory: every file with its sha256, the format, and where it came from.

The manifest is verified each time a model is loaded: a directory is either exactly what `nioserve quantize` wrote, or
it is refused with the name of the file that differs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from nioserve.models.spec import ModelError, read_json

FILE_NAME = "manifest.json"
FORMAT = "nioserve-model"
FORMAT_VERSION = 1
_CHUNK = 1 << 20


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as hex, reading it in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def write(directory: Path, name: str, quantisation: dict[str, Any], source: dict[str, Any]) -> None:
    """Write the manifest over all files in `directory`. It holds no time and no path: same input, same bytes."""
    files = {
        str(path.relative_to(directory)): {"sha256": sha256_of(path), "bytes": path.stat().st_size}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": name,
        "quantisation": quantisation,
        "source": source,
        "files": files,
    }
    text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (directory / FILE_NAME).write_text(text, encoding="utf-8")


def read(directory: Path) -> dict[str, Any] | None:
    """Return the manifest, or None for a plain Hugging Face directory; ModelError for a format we do not know."""
    path = directory / FILE_NAME
    if not path.exists():
        return None
    manifest = read_json(path)
    if manifest.get("format") != FORMAT or manifest.get("format_version") != FORMAT_VERSION:
        found = f"{manifest.get('format')!r} version {manifest.get('format_version')!r}"
        raise ModelError(f"{path}: is {found}, this release reads {FORMAT!r} version {FORMAT_VERSION}")
    if not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("name"), str):
        raise ModelError(f"{path}: `files` and `name` are required")
    return manifest


def model_name(directory: Path) -> str:
    """Return the name the model is served under unless the configuration names another."""
    manifest = read(directory)
    return str(manifest["name"]) if manifest else directory.resolve().name


def verify(directory: Path, manifest: dict[str, Any]) -> None:
    """Compare every file with the manifest; ModelError lists each file that is missing, changed or not listed."""
    listed: dict[str, dict[str, Any]] = manifest["files"]
    present = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()} - {FILE_NAME}
    findings = [f"{name}: is missing" for name in sorted(listed.keys() - present)]
    findings += [f"{name}: is not in the manifest" for name in sorted(present - listed.keys())]
    for name in sorted(listed.keys() & present):
        if sha256_of(directory / name) != listed[name].get("sha256"):
            findings.append(f"{name}: sha256 differs from the manifest")
    if findings:
        raise ModelError(f"{directory}: refused, it is not what was converted: " + "; ".join(findings))
