#!/usr/bin/env bash
# Trains a recipe on all GPUs of this machine, one process for each GPU. A crash restarts all from the last save.
#
#   launch/local.sh configs/vit_b16_i1k_8gpu.py runs/b16
#   PROCESSES=4 RESTARTS=0 launch/local.sh configs/vit_b16_i1k_8gpu.py runs/b16 --config.seed=1
#
# Environment variables: PROCESSES, how many GPUs to use, from the first (all); RESTARTS, how often to start again (3).
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: [PROCESSES=N] [RESTARTS=3] $0 CONFIG WORKDIR [--config.KEY=VALUE ...]" >&2
  exit 2
fi
config=$1
workdir=$2
shift 2

vit_dist="$(dirname "$0")/../.venv/bin/vit-dist"
[ -x "$vit_dist" ] || vit_dist=vit-dist # installed elsewhere, such as in the container
exec "$vit_dist" launch ${PROCESSES:+--processes="$PROCESSES"} --restarts="${RESTARTS:-3}" -- \
  train --config="$config" --workdir="$workdir" "$@"
