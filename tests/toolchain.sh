#!/bin/bash
# Make .venv from the lock file. Debian keeps `venv` apart from Python, so it may have to be installed first.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
missing=()
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
command -v gpgv >/dev/null || missing+=(gpgv)
command -v gpg >/dev/null || missing+=(gnupg)
if [ ${#missing[@]} -gt 0 ]; then
  [ "$(id -u)" = 0 ] || { echo "Missing: ${missing[*]}. Install them, or run this as root." >&2; exit 1; }
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi

rm -f .venv/.complete
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/requirements.lock
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable server
touch .venv/.complete
