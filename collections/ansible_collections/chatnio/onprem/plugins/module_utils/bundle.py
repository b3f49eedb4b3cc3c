# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)
"""The bundle's manifest: what an artefact is, how a folder of them is read, written and proved.

A bundle is one folder that carries everything a site installs::

    manifest.json  manifest.json.asc  key.asc
    apt/      a signed APT repository (pool/, dists/)
    pypi/     a Python index (PEP 503 once a web server lists its folders), one folder a project
    models/   NAME/VERSION/, a model directory as `nioserve quantize` writes it
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.asc"
PUBLIC_KEY = "key.asc"
FORMAT = 1


class BundleError(Exception):
    """The bundle can't be trusted or read; the message says which file and why."""


@dataclass(frozen=True, order=True)
class Artefact:
    """One file of the bundle.

    `path` is relative to the bundle's folder, `size` in bytes, `origin` where it came from.
    """

    path: str
    kind: str
    name: str
    version: str
    size: int
    sha256: str
    origin: str


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(artefacts: Iterable[Artefact]) -> str:
    """Return the text of a manifest over `artefacts`: sorted, so that equal bundles have equal manifests."""
    rows = [asdict(artefact) for artefact in sorted(artefacts)]
    return json.dumps({"format": FORMAT, "artefacts": rows}, indent=1, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> list[Artefact]:
    """Read `folder`'s manifest.

    Raises:
        BundleError: there is none, it is no manifest, or a path in it leads out of the folder.
    """
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        artefacts = [Artefact(**row) for row in document["artefacts"]]
        version = document["format"]
    except FileNotFoundError as error:
        raise BundleError(f"{path} is missing: {folder} is no bundle, or was copied in part") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} is no bundle manifest: {error}") from error
    if version != FORMAT:
        raise BundleError(f"{path} has format {version}; this release reads format {FORMAT}")
    for artefact in artefacts:
        if Path(artefact.path).is_absolute() or ".." in Path(artefact.path).parts:
            raise BundleError(f"{path} names {artefact.path}, which is outside of the bundle")
    return artefacts


def verify_signature(folder: Path, public_key: str) -> None:
    """Check that `folder`'s manifest was signed by the key whose ASCII-armoured public half is `public_key`.

    Raises:
        BundleError: no signature, or one by another key, or over another text.
    """
    signature = folder / SIGNATURE
    if not signature.is_file():
        raise BundleError(f"{signature} is missing: an unsigned bundle is not taken")
    with tempfile.TemporaryDirectory() as home:
        keyring = Path(home, "key.gpg")
        keyring.write_bytes(_dearmour(public_key))
        run = subprocess.run(
            ["gpgv", "--homedir", home, "--keyring", str(keyring), str(signature), str(folder / MANIFEST)],
            capture_output=True,
            text=True,
            check=False,
        )
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["gpgv failed"])[-1]
        raise BundleError(f"{folder / MANIFEST} is not signed by the expected key: {reason}")


def _dearmour(armoured: str) -> bytes:
    """Decode an ASCII-armoured key (RFC 9580, section 6.2): gpgv reads keyrings in binary only."""
    import base64
    import binascii

    _head, _, rest = armoured.strip().partition("\n\n")
    body = [line for line in rest.splitlines() if not line.startswith(("-----", "="))]
    try:
        return base64.b64decode("".join(body), validate=True)
    except binascii.Error as error:
        raise BundleError(f"the bundle's public key is not ASCII-armoured OpenPGP: {error}") from error


def find_faults(folder: Path, artefacts: Iterable[Artefact]) -> list[str]:
    """Compare every artefact with its file and return one sentence for each that is missing or differs."""

    def fault(artefact: Artefact) -> str | None:
        path = folder / artefact.path
        if not path.is_file():
            return f"{artefact.path}: missing"
        if path.stat().st_size != artefact.size:
            return f"{artefact.path}: {path.stat().st_size} bytes, the manifest says {artefact.size}"
        actual = sha256_of(path)
        if actual != artefact.sha256:
            return f"{artefact.path}: sha256 is {actual}, the manifest says {artefact.sha256}"
        return None

    with ThreadPoolExecutor() as pool:
        return [found for found in pool.map(fault, sorted(artefacts)) if found]
