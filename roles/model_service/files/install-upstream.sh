#!/bin/sh
# Install an upstream server into a folder of its own, from the mirror; pip checks each file by the index's hash.
# usage: install-upstream.sh MIRROR_URL TARGET REQUIREMENT...
set -eu
mirror=$1 target=$2
shift 2

rm -rf "$target"
mkdir -p "$(dirname "$target")"
python3 -m venv "$target"
"$target/bin/pip" install --quiet --disable-pip-version-check --no-input --no-cache-dir --only-binary :all: \
  --index-url "$mirror/pypi/" --trusted-host "$(echo "$mirror" | sed 's|.*://||; s|[:/].*||')" "$@"
touch "$target/.complete"
