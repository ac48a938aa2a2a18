#!/usr/bin/env bash
# Trains a recipe by Open MPI's mpirun, one rank a GPU.
#
#   HOSTS=node1:8,node2:8 launch/mpi.sh configs/vit_b16_i1k_8gpu.py /shared/runs/b16
#   HOSTS=localhost:2 launch/mpi.sh configs/digits.py runs/two --config.fake_devices=4      (no GPUs)
#
# HOSTS names each host and how many ranks it gets, the first being the host that this is started on: rank 0, where the
# others call in, must be at the address of mpirun. Checkout and WORKDIR must lie at the same path on all of them.
# A SIGTERM makes all ranks save and end with 75. Nothing is started again: give the same command once more. As root, say
# in a container, mpirun refuses to run unless OMPI_ALLOW_RUN_AS_ROOT and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM are both 1.
set -euo pipefail

if [ $# -lt 2 ] || [ -z "${HOSTS:-}" ]; then
  echo "usage: HOSTS=HOST:RANKS[,HOST:RANKS ...] $0 CONFIG WORKDIR [--config.KEY=VALUE ...]" >&2
  exit 2
fi
config=$1
workdir=$2
shift 2

vit_dist="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/vit-dist"
[ -x "$vit_dist" ] || vit_dist=vit-dist # installed elsewhere, as in the container

# Other hosts get a fresh environment, so what steers the libraries is passed on by name.
passed=()
for name in $(compgen -e); do
  case $name in
    PATH | LD_LIBRARY_PATH | TMPDIR | CUDA_* | JAX_* | NCCL_* | PJRT_* | VIT_DIST_* | XLA_*) passed+=(-x "$name") ;;
  esac
done

mpirun --host "$HOSTS" --map-by slot --bind-to none --mca odls_base_sigkill_timeout 3 "${passed[@]}" \
  "$vit_dist" train --config="$config" --workdir="$workdir" "$@" &
job=$!

# mpirun answers a SIGTERM by killing its ranks in mid-save, so the signal goes past it to those of this host; the ranks
# agree with the others on a step to stop at. A `wait` that a signal has cut short is taken up again.
trap 'pkill -TERM --parent "$job"' TERM
trap 'kill -INT "$job"' INT
while code=0; wait "$job" || code=$?; kill -0 "$job" 2>/dev/null; do :; done
exit "$code"
