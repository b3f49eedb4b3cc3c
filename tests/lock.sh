#!/bin/bash
# Resolve server/requirements.in and tests/requirements.in into their lock files. Needs a package index.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"${PYTHON:-python3}" -m venv "$tools"
"$tools/bin/pip" install --quiet pip-tools
for folder in server tests; do
  (
    cd "$folder"
    "$tools/bin/pip-compile" --quiet --strip-extras --no-annotate --no-header --no-emit-index-url --no-emit-find-links \
      --no-emit-trusted-host --output-file requirements.lock requirements.in
    # A local version (torch's +cpu) names one build; which build a site takes is up to its index.
    sed -i -E 's/\+[a-z0-9.]+$//; /^(#|-c|$)/d' requirements.lock
  )
done
