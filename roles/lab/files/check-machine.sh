#!/bin/sh
# Say everything that keeps this machine from running the lab, at once. Exit code 0 if nothing does.
# usage: check-machine.sh CACHE
set -u
cache=$1
found=0

finding() { # what, found, needed
  printf '  %-10s found: %-28s needed: %s\n' "$1" "$2" "$3" >&2
  found=$((found + 1))
}

[ "$(id -u)" = 0 ] || finding user "$(id -un)" "root, to boot machines and make networks: run it with sudo"

system=$(. /etc/os-release 2>/dev/null && echo "${ID:-unknown} ${VERSION_ID:-}")
[ "$system" = "debian 12" ] || finding system "${system:-unknown}" "Debian 12, whose packages the lab's machines get"

[ "$(uname -m)" = x86_64 ] || finding processor "$(uname -m)" x86_64

python=$("${PYTHON:-python3}" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo none)
[ "$python" = 3.11 ] || finding python "$python" "3.11, as on the lab's machines (PYTHON=… names another interpreter)"

memory=$(awk '/^MemAvailable/ {print int($2 / 1024)}' /proc/meminfo)
[ "$memory" -ge 6000 ] || finding memory "$memory MB free" "6000 MB for three machines and two replicas of the model"

place=$cache
while [ ! -d "$place" ]; do place=$(dirname "$place"); done
disk=$(df -Pm "$place" | awk 'NR == 2 {print $4}')
[ "$disk" -ge 12000 ] || finding disk "$disk MB free on $place" "12000 MB (CHATNIO_CACHE=… names another folder)"

grep -qw overlay /proc/filesystems || modprobe overlay 2>/dev/null || finding kernel "no overlay" "the overlay file system"

if [ "$found" -gt 0 ]; then
  echo "This machine can't run the lab ($found findings, nothing was changed)." >&2
  exit 1
fi
