#!/usr/bin/env bash
# Trains a recipe on a mesh of fake devices: FAKE_DEVICES (8) devices made of this machine's CPU.
#
#   launch/fake_mesh.sh configs/digits.py runs/mesh --config.mesh.fsdp=2 --config.mesh.tensor=2
#   FAKE_DEVICES=4 launch/fake_mesh.sh configs/digits.py runs/four
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: [FAKE_DEVICES=8] $0 CONFIG WORKDIR [--config.KEY=VALUE ...]" >&2
  exit 2
fi
config=$1
workdir=$2
shift 2

vit_dist="$(dirname "$0")/../.venv/bin/vit-dist"
[ -x "$vit_dist" ] || vit_dist=vit-dist # installed elsewhere, such as in the container
exec "$vit_dist" train --config="$config" --workdir="$workdir" --config.fake_devices="${FAKE_DEVICES:-8}" "$@"
