#!/bin/sh
# Make the file system that every machine of the lab is an overlay on, from the bundle's packages alone.
# usage: make-base.sh SUITE BUNDLE TARGET PACKAGE,PACKAGE…
set -eu
suite=$1 bundle=$2 target=$3 packages=$4
here=$(dirname "$(realpath "$0")")

part="$target.part"
rm -rf "$part"
mkdir -p "$(dirname "$target")"
# The bundle has no package that merges /usr in a running system: the hook makes it merged from the start.
mmdebstrap --quiet --variant=minbase --include="$packages" \
  --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr \
  --customize-hook='chroot "$1" useradd --create-home --shell /bin/bash ansible' \
  --customize-hook='printf "ansible ALL=(ALL) NOPASSWD: ALL\n" > "$1/etc/sudoers.d/ansible"' \
  --customize-hook='rm -f "$1"/etc/ssh/ssh_host_* "$1/etc/apt/sources.list" "$1"/etc/apt/sources.list.d/*' \
  --customize-hook="cp $here/lab-cgroups.service \"\$1/etc/systemd/system/\"" \
  --customize-hook='chroot "$1" systemctl -q enable systemd-networkd ssh lab-cgroups' \
  --customize-hook=': > "$1/etc/machine-id"' \
  "$suite" "$part" "deb [signed-by=$bundle/key.asc] copy:$bundle/apt $suite main"
mv "$part" "$target"
