#!/usr/bin/env bash
# Trains a recipe by Open MPI's mpirun, one rank a GPU.
#
#   HOSTS=node1:8,node2:8 launch/mpi.sh configs/vit_b16_i1k_8gpu.py /shared/runs/b16
#   HOSTS=localhost:2 launch/mpi.sh configs/digits.py runs/two --config.fake_devices=4      (no GPUs)
#
# HOSTS names each host and how many ranks it gets, the first being the host that this is started on, by the name that
# the others know it by: they call rank 0 there, at port PORT (one by chance of 20000 to 29999). Checkout and WORKDIR
# must lie at the same path on all hosts. A SIGTERM makes all ranks save and end with 75; Ctrl-C ends them, and a second
# one does not wait. Nothing is started again: give the same command once more. As root, say in a container, mpirun
# refuses to run unless OMPI_ALLOW_RUN_AS_ROOT and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM are both 1.
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

# Where the ranks meet is said here, and which is which in each of them, for JAX knows Open MPI 4 only.
first=${HOSTS%%,*}
export VIT_DIST_COORDINATOR="${first%%:*}:${PORT:-$((20000 + RANDOM % 10000))}"
# shellcheck disable=SC2016
rank='export VIT_DIST_PROCESSES=$OMPI_COMM_WORLD_SIZE VIT_DIST_PROCESS=$OMPI_COMM_WORLD_RANK
export VIT_DIST_LOCAL_PROCESS=$OMPI_COMM_WORLD_LOCAL_RANK; exec "$@"'

# Other hosts get a fresh environment, so what steers the libraries is passed on by name.
passed=()
for name in $(compgen -e); do
  case $name in
    PATH | LD_LIBRARY_PATH | TMPDIR | CUDA_* | JAX_* | NCCL_* | PJRT_* | VIT_DIST_* | XLA_*) passed+=(-x "$name") ;;
  esac
done

# In a session of its own, for a Ctrl-C would reach mpirun from the terminal too, and to it a second one means to leave
# at once, with its ranks training on.
setsid mpirun --host "$HOSTS" --map-by slot --bind-to none --mca odls_base_sigkill_timeout 3 "${passed[@]}" \
  bash -c "$rank" rank "$vit_dist" train --config="$config" --workdir="$workdir" "$@" &
job=$!

# mpirun answers a SIGTERM by killing its ranks in mid-save, so the signal goes past it to those of this host; the ranks
# agree with the others on a step to stop at. Its other children may be what keeps the other hosts in touch. Where there
# is no rank yet, mpirun is told itself.
ranks=(--parent "$job" --full 'vit-dist train')
interrupted=false
trap 'pkill -TERM "${ranks[@]}" || kill "$job" || true' TERM HUP
trap 'if $interrupted || ! pkill -INT "${ranks[@]}"; then kill "$job" || true; fi; interrupted=true' INT

# A `wait` that a signal has cut short is taken up again.
while code=0; wait "$job" || code=$?; kill -0 "$job" 2>/dev/null; do :; done
case $code in
  0 | 75) ;;
  *) if $interrupted; then code=130; fi ;; # whichever rank was the first to end, and however
esac
exit "$code"
