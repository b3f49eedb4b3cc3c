#!/bin/sh
# Run every scenario, from the bottom up; a failure ends it, with the lab taken down.
set -eu
cd "$(dirname "$0")/.."
export MOLECULE_COMMAND_BORDERS=0

# What a run that was killed has left.
molecule destroy
molecule test --scenario-name bundle
molecule test --scenario-name lab
# These share a lab, each standing on those before it.
set --
for scenario in preflight mirror base network firewall pki redis model_service gateway; do
  set -- "$@" --scenario-name "$scenario"
done
exec molecule test "$@"
