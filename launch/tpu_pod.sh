#!/usr/bin/env bash
# Trains a recipe on a Cloud TPU slice: creates the slice, installs vit_dist on its workers, runs all of them, shows
# worker 0's output, and always deletes the slice. Every command is printed; --dry-run prints them and runs none.
#
#   launch/tpu_pod.sh --zone=us-west4-a --type=v5litepod-256 --before='sudo mount 10.0.0.2:/runs /mnt' \
#     configs/vit_l16_i21k_v5e256.py /mnt/l16 [--config.KEY=VALUE ...]
#
#   --zone=Z --type=T   the zone, and the type of slice: v5litepod-256, v5p-2048 (counted in cores), v6e-64, ...
#   --name=N            the name of the slice (vit-dist-USER)
#   --version=V         the software on its workers (the version that Google documents for jax on that type)
#   --project=P         the project (gcloud's own setting)
#   --spot              a cheaper slice that may be preempted at any time
#   --reserved          of the project's reservation
#   --network=N         the VPC network of its workers (the project's default)
#   --internal-ips      workers without addresses of their own in the Internet; this machine must be in their network,
#                       and they need Cloud NAT or a mirror to install packages
#   --service-account=A as whom the workers read and write buckets (the project's default)
#   --queued            wait in Google's queue until the slice is available; asks every POLL_SECONDS (30)
#   --before=COMMAND    runs on each worker before anything else: mounts, credentials
#   --retries=N         how often to try again when the slice is preempted or cannot be created again, or when the
#                       connection to it is lost (3); waits RETRY_SECONDS (60) each time
#   --keep              do not delete the slice; use an existing one of that name
#
# CONFIG is a file of this checkout. WORKDIR must be the same folder on all workers, such as a mounted Filestore: it
# holds the checkpoints from which the next try resumes, on the same slice if that is still ready. The slice exists as
# long as this script runs, so start it on a machine that does not sleep. Ctrl-C deletes the slice at once.
set -euo pipefail

usage() {
  echo "error: $1; usage: $0 --zone=Z --type=T [OPTION ...] CONFIG WORKDIR [--config.KEY=VALUE ...]" >&2
  exit 2
}

zone='' accelerator='' name=vit-dist-${USER:-tpu} version='' before='' retries=3
common=() kind=() reach=() queued=false keep=false dry_run=false
while [ $# -gt 0 ]; do
  case $1 in
    --zone=*) zone=${1#*=} ;;
    --type=*) accelerator=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --project=*) common=("--project=${1#*=}") ;;
    --before=*) before=${1#*=} ;;
    --retries=*) retries=${1#*=} ;;
    --spot | --reserved) kind+=("$1") ;;
    --network=* | --service-account=*) kind+=("$1") ;;
    --internal-ips)
      kind+=(--internal-ips)
      reach=(--internal-ip)
      ;;
    --queued) queued=true ;;
    --keep) keep=true ;;
    --dry-run) dry_run=true ;;
    -*) usage "$1 is no option" ;;
    *) break ;;
  esac
  shift
done
[ -n "$zone" ] || usage "--zone is missing"
[ -n "$accelerator" ] || usage "--type is missing"
[[ $retries =~ ^[0-9]+$ ]] || usage "--retries=$retries is no whole number"
[ $# -ge 2 ] || usage "CONFIG and WORKDIR are missing"
config=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)
[[ $config != /* && -f $root/$config ]] || usage "there is no $config in $root"
common+=("--zone=$zone" --quiet)
if [ -z "$version" ]; then # cloud.google.com/tpu/docs/runtimes
  case $accelerator in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi

# Commands run in the background and this shell only waits, so that it answers signals at once. It prints the commands
# on stderr; in a dry run, whose result they are, on stdout.
if $dry_run; then exec 3>&1; else exec 3>&2; fi
child=''
run() {
  { printf '%q' "$1" && printf ' %q' "${@:2}" && echo; } >&3
  if $dry_run; then return; fi
  "$@" &
  child=$!
  local code=0
  wait "$child" || code=$?
  child=''
  return "$code"
}

tpu() { run gcloud compute tpus tpu-vm "$@" "${common[@]}"; }
queue() { run gcloud compute tpus queued-resources "$@" "${common[@]}"; }
ssh_to() {
  # A preempted worker does not close the connection: ssh itself must detect it.
  tpu ssh "$name" "--worker=$1" ${reach[@]+"${reach[@]}"} --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4 "--command=$2"
}
pause() {
  sleep "$1" &
  child=$!
  wait "$child"
  child=''
}

package=${TMPDIR:-/tmp}/$name.tar.gz
errors=${TMPDIR:-/tmp}/$name.errors
unless_gone() { # a slice that does not exist is no failure; other errors are printed
  if "$@" 2>"$errors" || grep -q NOT_FOUND "$errors"; then return; fi
  cat "$errors" >&2
  return 1
}
slice_state() { unless_gone tpu describe "$name" '--format=value(state)'; }
queue_state() { unless_gone queue describe "$name" '--format=value(state.state)'; }

exists=false
delete() {
  $exists || return 0
  local how=(tpu delete "$name")
  if $queued; then how=(queue delete "$name" --force); fi
  if $keep; then
    echo "kept: $name in $zone, which costs money until it is deleted" >&2
  elif unless_gone "${how[@]}"; then
    exists=false
  else
    echo "error: could not delete $name in $zone; it costs money" >&2
  fi
}
leave() {
  trap '' INT TERM
  [ -z "$child" ] || kill "$child" 2>/dev/null || true
  delete
  rm -f "$package" "$errors"
}
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

create() { # fails if there is no capacity; ends the script if the name is in use, or if that is unknown
  local found
  if $queued; then found=$(queue_state) || exit 1; else found=$(slice_state) || exit 1; fi
  if $keep && [[ $found == READY || $found == ACTIVE ]]; then
    exists=true
    return
  elif [ -n "$found" ]; then # perhaps somebody else's, so it is not deleted either
    echo "error: there is a $name in $zone already, $found; delete it, choose another --name, or use it by --keep" >&2
    exit 1
  fi
  exists=true # from here on, so that a partly created slice is deleted too
  if ! $queued; then
    tpu create "$name" "--accelerator-type=$accelerator" "--version=$version" ${kind[@]+"${kind[@]}"}
    return
  fi
  queue create "$name" "--node-id=$name" "--accelerator-type=$accelerator" "--runtime-version=$version" \
    ${kind[@]+"${kind[@]}"} || return
  while true; do
    found=$(queue_state) || found=unknown # will be asked again
    if $dry_run; then return; fi
    case $found in
      ACTIVE) return ;;
      '' | FAILED | SUSPENDING | SUSPENDED | DELETING)
        echo "error: the request for $name has come to ${found:-nothing}" >&2
        return 1
        ;;
    esac
    pause "${POLL_SECONDS:-30}"
  done
}

# The commands of the workers. uv installs a Python that is new enough; theirs may not be.
install="mkdir -p vit_dist && tar -xzf vit_dist.tar.gz -C vit_dist && cd vit_dist \
&& PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv \
&& ~/.local/bin/uv venv --quiet --clear --python=3.12 .venv \
&& ~/.local/bin/uv pip install --quiet --constraint=constraints.txt --editable='.[tpu]'"
metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number
arguments=$(printf ' %q' "--config=$config" "--workdir=$1" "${@:2}")
# Worker 0's output goes through tee, so that vit-dist does not fail at a lost connection before it has saved. After a
# lost connection the previous try may still run: it is told to save, and gets less time than the others wait.
stop="tell() { pkill \$1 --pidfile vit_dist/pid --full 'vit-dist train'; } 2>/dev/null
tell -TERM && for _ in {1..200}; do tell -0 || break; sleep 1; done; tell -KILL"
train="$stop
cd vit_dist && rm -f exit_code && worker=\$(curl -sf -H Metadata-Flavor:Google $metadata) || exit 1
if [ \"\$worker\" = 0 ]; then exec > >(exec tee -p train.log); else exec >train.log; fi
exec 2>&1
code=0; (echo \$BASHPID >pid; exec .venv/bin/vit-dist train$arguments) || code=\$?
echo \$code >exit_code; exit \$code"

attempt=0
retry() { # counts a retry and waits, or ends the script if none is left
  if [ "$attempt" -ge "$retries" ]; then
    echo "error: $1, and no retry is left" >&2
    exit 75
  fi
  attempt=$((attempt + 1))
  echo "$1: retry $attempt of $retries" >&2
  pause "${RETRY_SECONDS:-60}"
}

ready=false
while true; do
  if ! $ready; then
    if ! create; then
      [ "$attempt" -gt 0 ] || exit 1 # at the first try a usage error is more likely
      keep=false delete
      retry "no new slice was to be had"
      continue
    fi
    run tar -czf "$package" -C "$root" pyproject.toml constraints.txt README.md vit_dist configs "$config"
    tpu scp "$package" "$name:vit_dist.tar.gz" --worker=all ${reach[@]+"${reach[@]}"}
    [ -z "$before" ] || ssh_to all "$before"
    ssh_to all "$install"
    ready=true
  fi
  if ssh_to all "$train"; then exit 0; fi

  # gcloud's exit code may be that of any worker; worker 0's own tells whether all was saved. There is none if worker 0
  # or the connection to it was lost.
  found=$(slice_state) || exit 1
  code=''
  if [ "$found" = READY ]; then
    code=$(ssh_to 0 'cat vit_dist/exit_code') || code=''
    [ "$code" != 0 ] || exit 0 # only the connection was lost
    if [ -n "$code" ] && [ "$code" != 75 ]; then
      ssh_to all 'hostname; tail -n 30 vit_dist/train.log 2>/dev/null' >&2 || true
      echo "error: worker 0 ended with $code; above is what each said last" >&2
      exit "$code"
    fi
  fi
  retry "the slice is ${found:-deleted}, worker 0's exit code ${code:-unknown}"
  found=$(slice_state) || exit 1 # again: a slice whose run was told to stop is often preempted a moment later
  if [ "$found" != READY ]; then
    ready=false
    keep=false delete
  fi
done
