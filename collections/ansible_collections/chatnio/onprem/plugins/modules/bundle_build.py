#!/usr/bin/python
# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)

DOCUMENTATION = r"""
module: bundle_build
short_description: Lay gathered artefacts out as one signed bundle
description:
  - Links or copies the files of every part into the bundle's folder and removes what no part has any more.
  - Writes the APT repository's indexes and signs them, then writes and signs the manifest over every file.
  - An unchanged set of parts leaves the folder untouched.
options:
  dest:
    description: The bundle's folder.
    type: path
    required: true
  suite:
    description: Name of the Debian release that the packages belong to.
    type: str
    required: true
  gnupg_home:
    description: GnuPG home that holds the one secret key to sign with.
    type: path
    required: true
  parts:
    description:
      - Folders to take files from.
      - A part's C(origins.json), when it has one, maps file names to the addresses they came from.
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: The folder.
        type: path
        required: true
      kind:
        description: What its files are. C(deb) and C(wheel) files are named and versioned by their file names.
        type: str
        required: true
        choices: [deb, wheel, requirements, model]
      name:
        description: Name of the artefact, for a kind whose files don't carry one.
        type: str
      version:
        description: Version of the artefact, for a kind whose files don't carry one.
        type: str
        default: ""
      origin:
        description: Where the files came from, unless C(origins.json) says it.
        type: str
        default: built here
author: chatnio on-prem authors
"""

EXAMPLES = r"""
- name: Lay out the bundle
  chatnio.onprem.bundle_build:
    dest: /var/cache/chatnio/bundle
    suite: bookworm
    gnupg_home: /var/cache/chatnio/gnupg
    parts:
      - {path: /var/cache/chatnio/parts/debian, kind: deb}
      - {path: /var/cache/chatnio/parts/wheels, kind: wheel}
"""

RETURN = r"""
artefacts:
  description: Number of files in the bundle.
  returned: always
  type: int
bytes:
  description: Their size together.
  returned: always
  type: int
"""

import gzip
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.chatnio.onprem.plugins.module_utils.bundle import (
    MANIFEST,
    PUBLIC_KEY,
    SIGNATURE,
    Artefact,
    sha256_of,
    write_manifest,
)


def place(kind: str, file: Path, part: dict[str, Any]) -> tuple[str, str, str]:
    """Return where `file` (relative to its part) goes in the bundle, and the artefact's name and version."""
    if kind == "deb":
        name, version, _arch = file.stem.split("_")
        # A repository's pool knows no epochs, and an escaped colon in a URL is asked for unescaped.
        return f"apt/pool/{file.name.replace('%3a', '.')}", name, version.replace("%3a", ":")
    if kind == "wheel":
        name, version = file.name.split("-")[:2]
        project = re.sub(r"[-_.]+", "-", name).lower()  # PEP 503
        return f"pypi/{project}/{file.name}", project, version
    if kind == "requirements":
        return f"pypi/{file.name}", part["name"], part["version"]
    return f"models/{part['name']}/{part['version']}/{file}", part["name"], part["version"]


def collect(parts: list[dict[str, Any]]) -> Iterator[tuple[Path, str, str, str, str, str]]:
    """Yield (source, path in the bundle, kind, name, version, origin) for every file of every part."""
    for part in parts:
        folder = Path(part["path"])
        index = folder / "origins.json"
        origins = json.loads(index.read_text()) if index.is_file() else {}
        origins = origins.get("origins", origins)
        suffix = {"deb": "*.deb", "wheel": "*.whl", "requirements": "*.txt"}.get(part["kind"], "**/*")
        for source in sorted(folder.glob(suffix)):
            if source.is_file():
                file = source.relative_to(folder)
                path, name, version = place(part["kind"], file, part)
                yield source, path, part["kind"], name, version, origins.get(str(file), part["origin"])


def link(source: Path, target: Path) -> bool:
    """Make `target` the same file as `source`, or a copy where they can't be; say whether that took anything."""
    if target.is_file() and (target.samefile(source) or sha256_of(target) == sha256_of(source)):
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return True


class Signer:
    """gpg with the bundle's key."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.command = ["gpg", "--homedir", module.params["gnupg_home"], "--batch", "--yes", "--armor"]

    def sign(self, how: str, source: Path, target: Path) -> None:
        """Sign `source` into `target`; `how` is C(--clearsign) or C(--detach-sign)."""
        self.module.run_command([*self.command, "--output", str(target), how, str(source)], check_rc=True)

    def public_key(self) -> str:
        """Return the public half, ASCII-armoured."""
        return str(self.module.run_command([*self.command, "--export"], check_rc=True)[1])


def index_apt(module: AnsibleModule, apt: Path, suite: str, signer: Signer) -> None:
    """Write dists/SUITE of the APT repository over pool/, and sign it."""
    binary = apt / "dists" / suite / "main" / "binary-amd64"
    binary.mkdir(parents=True, exist_ok=True)
    packages = module.run_command(["apt-ftparchive", "packages", "pool"], cwd=str(apt), check_rc=True)[1]
    (binary / "Packages").write_text(packages)
    (binary / "Packages.gz").write_bytes(gzip.compress(packages.encode(), mtime=0))
    fields = {
        "Origin": "chatnio",
        "Label": "chatnio",
        "Suite": suite,
        "Codename": suite,
        "Components": "main",
        "Architectures": "amd64",
        "Acquire-By-Hash": "no",
    }
    options = [f"-oAPT::FTPArchive::Release::{key}={value}" for key, value in fields.items()]
    dist = apt / "dists" / suite
    for stale in ("Release", "InRelease"):
        (dist / stale).unlink(missing_ok=True)
    release = module.run_command(["apt-ftparchive", *options, "release", str(dist)], check_rc=True)[1]
    (dist / "Release").write_text(release)
    signer.sign("--clearsign", dist / "Release", dist / "InRelease")


def main() -> None:
    """Entry point."""
    part = {
        "path": {"type": "path", "required": True},
        "kind": {"type": "str", "required": True, "choices": ["deb", "wheel", "requirements", "model"]},
        "name": {"type": "str"},
        "version": {"type": "str", "default": ""},
        "origin": {"type": "str", "default": "built here"},
    }
    module = AnsibleModule(
        argument_spec={
            "dest": {"type": "path", "required": True},
            "suite": {"type": "str", "required": True},
            "gnupg_home": {"type": "path", "required": True},
            "parts": {"type": "list", "elements": "dict", "required": True, "options": part},
        },
    )
    dest, suite = Path(module.params["dest"]), module.params["suite"]
    dest.mkdir(parents=True, exist_ok=True)
    signer = Signer(module)
    changed = False
    about: dict[str, tuple[str, str, str, str]] = {}
    for source, path, kind, name, version, origin in collect(module.params["parts"]):
        changed |= link(source, dest / path)
        about[path] = (kind, name, version, origin)

    generated = {
        f"apt/dists/{suite}/main/binary-amd64/Packages",
        f"apt/dists/{suite}/main/binary-amd64/Packages.gz",
        f"apt/dists/{suite}/Release",
        f"apt/dists/{suite}/InRelease",
    }
    own = {MANIFEST, SIGNATURE, PUBLIC_KEY}
    for found in [entry for entry in dest.rglob("*") if entry.is_file()]:
        if str(found.relative_to(dest)) not in about.keys() | generated | own:
            found.unlink()
            changed = True
    if changed or not all((dest / name).is_file() for name in generated):
        index_apt(module, dest / "apt", suite, signer)
        changed = True
    about |= dict.fromkeys(generated, ("apt-index", suite, "", "built here"))

    artefacts = [
        Artefact(path, kind, name, version, (dest / path).stat().st_size, sha256_of(dest / path), origin)
        for path, (kind, name, version, origin) in about.items()
    ]
    manifest, file = write_manifest(artefacts), dest / MANIFEST
    if not file.is_file() or file.read_text() != manifest or not (dest / SIGNATURE).is_file():
        file.write_text(manifest)
        signer.sign("--detach-sign", file, dest / SIGNATURE)
        (dest / PUBLIC_KEY).write_text(signer.public_key())
        changed = True
    module.exit_json(changed=changed, artefacts=len(artefacts), bytes=sum(artefact.size for artefact in artefacts))


if __name__ == "__main__":
    main()
