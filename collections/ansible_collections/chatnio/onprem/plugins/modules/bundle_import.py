#!/usr/bin/python
# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)

DOCUMENTATION = r"""
module: bundle_import
short_description: Prove a bundle and take it over into the folder that the mirror serves
description:
  - Checks the manifest's signature and the SHA-256 of every artefact first. If anything differs, every faulty
    artefact is named and nothing has been changed.
  - Then copies what is new or differs, each file whole before it takes its name, and removes what the manifest
    doesn't name.
  - A run on a bundle that was taken over before compares sizes and times of modification, and reads only what
    was touched since.
options:
  src:
    description: The bundle's folder on this machine, for example where its medium is mounted.
    type: path
    required: true
  dest:
    description: The folder that the mirror serves.
    type: path
    required: true
  public_key:
    description: The ASCII-armoured public key that the bundle has to be signed with.
    type: str
    required: true
author: chatnio on-prem authors
"""

EXAMPLES = r"""
- name: Take the bundle over
  chatnio.onprem.bundle_import:
    src: /srv/bundle
    dest: /srv/mirror
    public_key: "{{ lookup('ansible.builtin.file', 'bundle.asc') }}"
"""

RETURN = r"""
copied:
  description: Paths that were copied.
  returned: always
  type: list
  elements: str
removed:
  description: Paths that were removed.
  returned: always
  type: list
  elements: str
"""

import json
import shutil
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.chatnio.onprem.plugins.module_utils.bundle import (
    MANIFEST,
    PUBLIC_KEY,
    SIGNATURE,
    BundleError,
    find_faults,
    read_manifest,
    sha256_of,
    verify_signature,
)

STATE = ".imported.json"
OWN = (MANIFEST, SIGNATURE, PUBLIC_KEY)


def fingerprint(path: Path) -> list[int]:
    """Return what shows that a file was touched: its size in bytes and time of modification in nanoseconds."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def files_in(folder: Path) -> dict[str, list[int]]:
    """Return the fingerprint of every file below `folder`, by its path in it."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != STATE)
    return {str(path.relative_to(folder)): fingerprint(path) for path in found}


def copy(source: Path, target: Path) -> None:
    """Copy a file so that `target` is never seen in part."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    shutil.copyfile(source, part)
    part.chmod(0o644)
    part.replace(target)


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "src": {"type": "path", "required": True},
            "dest": {"type": "path", "required": True},
            "public_key": {"type": "str", "required": True, "no_log": False},
        },
        supports_check_mode=True,
    )
    src, dest = Path(module.params["src"]), Path(module.params["dest"])
    manifests = (src / MANIFEST, dest / MANIFEST)
    same = all(path.is_file() for path in manifests) and sha256_of(manifests[0]) == sha256_of(manifests[1])
    state = dest / STATE
    present = files_in(dest)
    if same and state.is_file() and json.loads(state.read_text()) == present:
        module.exit_json(changed=False, copied=[], removed=[])
    try:
        verify_signature(src, module.params["public_key"])
        artefacts = read_manifest(src)
    except BundleError as error:
        module.fail_json(msg=f"The bundle is refused and nothing was changed: {error}")
    faults = find_faults(src, artefacts)
    if faults:
        module.fail_json(
            msg=f"The bundle in {src} is refused and nothing was changed; {len(faults)} of its {len(artefacts)} "
            f"artefacts differ from the signed manifest: {'; '.join(faults)}. Copy the bundle again, or gather it "
            "anew.",
            faults=faults,
        )

    wanted = {artefact.path: artefact.sha256 for artefact in artefacts}
    stale = [path for path, digest in wanted.items() if not (dest / path).is_file() or sha256_of(dest / path) != digest]
    strangers = [path for path in present if path not in wanted and path not in OWN]
    if not module.check_mode:
        for path in stale:
            copy(src / path, dest / path)
        for path in strangers:
            (dest / path).unlink()
        for name in OWN:
            copy(src / name, dest / name)
        state.write_text(json.dumps(files_in(dest)))
    module.exit_json(changed=True, copied=sorted(stale), removed=sorted(strangers))


if __name__ == "__main__":
    main()
