#!/bin/sh
# Install the model service and all it needs into a folder of its own, from the mirror, every file checked by its hash.
# usage: install.sh MIRROR_URL TARGET SHA256
set -eu
mirror=$1 target=$2 sha256=$3

rm -rf "$target"
mkdir -p "$(dirname "$target")"
python3 -m venv "$target"
python3 - "$mirror/pypi/nioserve.txt" "$target/requirements.txt" "$sha256" <<'EOF'
import hashlib
import pathlib
import sys
import urllib.request

url, target, expected = sys.argv[1:]
with urllib.request.urlopen(url, timeout=30) as answer:
    text = answer.read()
actual = hashlib.sha256(text).hexdigest()
if actual != expected:
    sys.exit(f"{url}: sha256 is {actual}, the bundle's manifest says {expected}. Run the mirror role again.")
pathlib.Path(target).write_bytes(text)
EOF
"$target/bin/pip" install --quiet --disable-pip-version-check --no-input --no-cache-dir --no-deps --require-hashes \
  --index-url "$mirror/pypi/" --trusted-host "$(echo "$mirror" | sed 's|.*://||; s|[:/].*||')" \
  --requirement "$target/requirements.txt"
touch "$target/.complete"
