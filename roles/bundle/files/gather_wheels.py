"""Download the wheels that a lock file pins, with their hashes.

usage: gather_wheels.py LOCK TARGET

pip resolves with this machine's own configuration. TARGET gets the wheels, `requirements.txt` (every project with the
hash of the very file that was gathered) and `origins.json`. A TARGET made from an equal LOCK is left as it is.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def pip(*arguments: str) -> None:
    """Run pip; its own words explain a failure."""
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def main() -> None:
    """Entry point."""
    lock, target = Path(sys.argv[1]), Path(sys.argv[2])
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    key = hashlib.sha256(f"{version}\n{lock.read_text()}".encode()).hexdigest()
    stamp = target / "key"
    if stamp.is_file() and stamp.read_text() == key:
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        part = Path(folder, "wheels")
        report = Path(folder, "report.json")
        only_wheels = ("--only-binary", ":all:")
        pip("install", "--dry-run", "--ignore-installed", *only_wheels, "--report", str(report), "-r", str(lock))
        lines, origins = [], {}
        for item in json.loads(report.read_text())["install"]:
            source, about = item["download_info"], item["metadata"]
            digest = source["archive_info"]["hashes"]["sha256"]
            lines.append(f"{about['name']}=={about['version']} --hash=sha256:{digest}")
            origins[source["url"].rpartition("/")[2].replace("%2B", "+")] = source["url"]
        requirements = Path(folder, "requirements.txt")
        requirements.write_text("\n".join(sorted(lines, key=str.lower)) + "\n")
        pip("download", "--no-deps", *only_wheels, "--require-hashes", "--dest", str(part), "-r", str(requirements))
        shutil.move(requirements, part)
        (part / "origins.json").write_text(json.dumps(origins, indent=1, sort_keys=True))
        (part / "key").write_text(key)
        shutil.rmtree(target, ignore_errors=True)
        part.replace(target)
    print("changed")


if __name__ == "__main__":
    main()
