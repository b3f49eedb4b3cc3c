#!/bin/bash
# Make .venv from the lock file, and install what the unit tests call where Debian hasn't brought it.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
missing=()
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
for tool in gpg:gnupg gpgv:gpgv apt-ftparchive:apt-utils openssl:openssl g++:g++ ssh:openssh-client ip:iproute2; do
  command -v "${tool%%:*}" >/dev/null || missing+=("${tool##*:}")
done
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
