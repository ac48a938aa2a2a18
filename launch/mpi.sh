#!/usr/bin/env bash
# Trains a recipe by Open MPI's mpirun, one rank for each GPU.
#
#   HOSTS=node1:8,node2:8 launch/mpi.sh configs/vit_b16_i1k_8gpu.py /shared/runs/b16
#   HOSTS=localhost:2 launch/mpi.sh configs/digits.py runs/two --config.fake_devices=4      (no GPUs)
#
# HOSTS names each host and its number of ranks. The first must be this host, under a name that the others can resolve:
# they connect to rank 0 there, at port PORT (random, 20000 to 29999). Checkout and WORKDIR must have the same path on
# all hosts. SIGTERM makes all ranks save and end with 75; Ctrl-C ends them, and a second one does not wait. There is no
# restart: give the same command again. As root, such as in a container, mpirun refuses to run unless
# OMPI_ALLOW_RUN_AS_ROOT and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM are both 1.
set -euo pipefail

if [ $# -lt 2 ] || [ -z "${HOSTS:-}" ]; then
  echo "usage: HOSTS=HOST:RANKS[,HOST:RANKS ...] $0 CONFIG WORKDIR [--config.KEY=VALUE ...]" >&2
  exit 2
fi
config=$1
workdir=$2
shift 2

vit_dist="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/vit-dist"
[ -x "$vit_dist" ] || vit_dist=vit-dist # installed elsewhere, such as in the container

# The coordinator is set here and the index in each rank: JAX detects Open MPI 4 only.
first=${HOSTS%%,*}
export VIT_DIST_COORDINATOR="${first%%:*}:${PORT:-$((20000 + RANDOM % 10000))}"
# shellcheck disable=SC2016
rank='export VIT_DIST_PROCESSES=$OMPI_COMM_WORLD_SIZE VIT_DIST_PROCESS=$OMPI_COMM_WORLD_RANK
export VIT_DIST_LOCAL_PROCESS=$OMPI_COMM_WORLD_LOCAL_RANK; exec "$@"'

# By this the processes know each other: nobody else who reaches their port can join or end the job.
export VIT_DIST_JOB_SECRET="${VIT_DIST_JOB_SECRET:-$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')}"

# Other hosts get a fresh environment, so the variables that configure the libraries are passed by name.
passed=()
for name in $(compgen -e); do
  case $name in
    PATH | LD_LIBRARY_PATH | TMPDIR | CUDA_* | JAX_* | NCCL_* | PJRT_* | VIT_DIST_* | XLA_*) passed+=(-x "$name") ;;
  esac
done

# mpirun gets a session of its own. Otherwise the terminal's Ctrl-C would reach it too, and at a second one it leaves at
# once while its ranks go on training.
setsid mpirun --host "$HOSTS" --map-by slot --bind-to none --mca odls_base_sigkill_timeout 3 "${passed[@]}" \
  bash -c "$rank" rank "$vit_dist" train --config="$config" --workdir="$workdir" "$@" &
job=$!

# mpirun answers SIGTERM by killing its ranks in the middle of a save, so the signal goes directly to the ranks of this
# host, which agree with the others on a step to stop at. Other children of mpirun may be its connections to the other
# hosts. If no rank has started yet, mpirun itself gets the signal.
ranks=(--parent "$job" --full 'vit-dist train')
interrupted=false
trap 'pkill -TERM "${ranks[@]}" || kill "$job" || true' TERM HUP
trap 'if $interrupted || ! pkill -INT "${ranks[@]}"; then kill "$job" || true; fi; interrupted=true' INT

# A signal interrupts `wait`, which is then called again.
while code=0; wait "$job" || code=$?; kill -0 "$job" 2>/dev/null; do :; done
case $code in
  0 | 75) ;;
  *) if $interrupted; then code=130; fi ;; # whichever rank ended first, and with any code
esac
exit "$code"
