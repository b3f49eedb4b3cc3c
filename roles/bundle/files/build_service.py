"""Build the model service's wheel and the requirements that pin it with everything it needs.

usage: build_service.py SERVER WHEELS TARGET

SERVER is the source, WHEELS what gather_wheels.py made. TARGET gets the wheel and `nioserve.txt`. A TARGET made from
equal sources is left as it is.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

EPOCH = "1577836800"  # equal sources give equal wheels: the time stamp in a wheel's ZIP is this one, 2020-01-01


def main() -> None:
    """Entry point."""
    server, wheels, target = map(Path, sys.argv[1:4])
    folders = [server / "native", server / "src"]
    found = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    # What a build in the tree itself has left is made anew.
    made = ("__pycache__", ".egg-info", ".so")
    sources = [server / "pyproject.toml", server / "setup.py"]
    sources += [path for path in found if not any(part.endswith(made) for part in path.parts)]
    digest = hashlib.sha256((wheels / "requirements.txt").read_bytes())
    for path in sources:
        digest.update(f"{path.relative_to(server)}\n".encode() + path.read_bytes())
    stamp = target / "key"
    if stamp.is_file() and stamp.read_text() == digest.hexdigest():
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # A copy, so that the build leaves nothing in the source.
        copy, part = Path(folder, "server"), Path(folder, "wheel")
        for path in sources:
            (copy / path.relative_to(server)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy / path.relative_to(server))
        if (server / "README.md").is_file():
            shutil.copyfile(server / "README.md", copy / "README.md")
        subprocess.run(
            [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--wheel-dir", str(part), str(copy)],
            check=True,
            env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH},
        )
        (wheel,) = part.glob("*.whl")
        name, version = wheel.name.split("-")[:2]
        own = f"{name}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"
        (part / "nioserve.txt").write_text((wheels / "requirements.txt").read_text() + own)
        (part / "key").write_text(digest.hexdigest())
        shutil.rmtree(target, ignore_errors=True)
        part.replace(target)
    print("changed")


if __name__ == "__main__":
    main()
