#!/usr/bin/python
# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)

DOCUMENTATION = r"""
module: bundle_fetch
short_description: Fetch a folder of the bundle from the mirror, every file checked by its hash
description:
  - The folder appears whole or not at all. A file that is missing or whose size is another is fetched again, and a
    file that the manifest doesn't name is removed.
options:
  url:
    description: Address of the mirror.
    type: str
    required: true
  artefacts:
    description: The files, as the bundle's manifest lists them.
    type: list
    elements: dict
    required: true
  strip:
    description: Part of the artefacts' paths that the folder stands for.
    type: str
    required: true
  dest:
    description: The folder.
    type: path
    required: true
author: chatnio on-prem authors
"""

EXAMPLES = r"""
- name: Fetch a model
  chatnio.onprem.bundle_fetch:
    url: http://10.0.0.11
    artefacts: "{{ files }}"
    strip: models/smollm2-135m-instruct/1
    dest: /srv/models/smollm2-135m-instruct/1
"""

RETURN = r"""
fetched:
  description: Paths that were fetched, in the folder.
  returned: always
  type: list
  elements: str
"""

import hashlib
import os
import shutil
from pathlib import Path
from urllib.error import URLError
from urllib.parse import quote

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import open_url


def fetch(module: AnsibleModule, url: str, target: Path, expected: str) -> None:
    """Download `url` into `target`; fail the module if it can't be had or its SHA-256 isn't `expected`."""
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open_url(url, timeout=30) as answer, target.open("wb") as stream:
            while piece := answer.read(1 << 20):
                digest.update(piece)
                stream.write(piece)
    except (URLError, OSError) as error:
        module.fail_json(msg=f"{url} can't be had: {error}. Is the mirror up, and does it hold this bundle?")
    if (actual := digest.hexdigest()) != expected:
        module.fail_json(msg=f"{url} is refused: its sha256 is {actual}, the bundle's manifest says {expected}")


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "artefacts": {"type": "list", "elements": "dict", "required": True},
            "strip": {"type": "str", "required": True},
            "dest": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    dest = Path(module.params["dest"])
    wanted = {os.path.relpath(row["path"], module.params["strip"]): row for row in module.params["artefacts"]}
    if not wanted:
        module.fail_json(msg=f"The bundle holds nothing under {module.params['strip']}")
    present = {str(path.relative_to(dest)): path.stat().st_size for path in dest.rglob("*") if path.is_file()}
    stale = sorted(path for path, row in wanted.items() if present.get(path) != row["size"])
    if (not stale and present.keys() == wanted.keys()) or module.check_mode:
        module.exit_json(changed=bool(stale) or present.keys() != wanted.keys(), fetched=stale)

    part = dest.with_name(f".{dest.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for path, row in wanted.items():
        if path in stale:
            fetch(module, f"{module.params['url']}/{quote(row['path'])}", part / path, row["sha256"])
        else:
            (part / path).parent.mkdir(parents=True, exist_ok=True)
            os.link(dest / path, part / path)
        (part / path).chmod(0o644)
    for folder in (part, *(path for path in part.rglob("*") if path.is_dir())):
        folder.chmod(0o755)
    old = dest.with_name(f".{dest.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if dest.exists():
        dest.replace(old)
    part.replace(dest)
    shutil.rmtree(old, ignore_errors=True)
    module.exit_json(changed=True, fetched=stale)


if __name__ == "__main__":
    main()
