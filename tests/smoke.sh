#!/usr/bin/env bash
# A minute of vit-dist as a user would run it: plans and trains twenty steps, asks again, evaluates, classifies a picture, and
# trains from prepared records.
# The one argument is the command to try; `make smoke` gives that of its environment.
set -euo pipefail
cd "$(dirname "$0")/.."
command=$1
python=$(dirname "$command")/python
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# check TEXT EXPRESSION: says and proves something of `result`, a JSON object on stdin's last line.
check() {
  tail -n 1 | "$python" -c "import json, sys; result = json.loads(sys.stdin.read()); assert $2, result"
  echo "smoke: $1"
}

train() { "$command" train --config=configs/digits.py --workdir="$folder/run" --config.total_steps=20 "$@"; }

"$command" configs | grep digits >/dev/null
"$command" plan --config=configs/digits.py --target=cpu:4 --json |
  check "plan says that four devices are enough, and who talks" "result['fits'] and result['collectives']"
train | tee "$folder/first" | check "train takes 20 steps and evaluates 360 digits" "result['step'] == 20 and result['count'] == 360"
train | check "train on a finished run prints its summary again" "result == json.loads(open('$folder/first').readlines()[-1])"
"$command" eval --workdir="$folder/run" | check "eval counts 360 of 360" "result['count'] == 360 and 0 < result['loss'] < 10"
"$python" - "$folder/digit.png" <<'PY'
import sys

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

pixels = load_digits().images[0] * 255 / 16
Image.fromarray(pixels.astype(np.uint8)).save(sys.argv[1])
PY
"$command" predict --workdir="$folder/run" --json "$folder/digit.png" | check "predict classifies a file" "result"
"$command" prepare --source=digits "$folder/records" | check "prepare makes records of the digits" "result['records'] == 1797"
"$command" prepare --verify "$folder/records" | check "and finds them whole" "result['splits'] == {'train': 1437, 'test': 360}"
train --workdir="$folder/other" --config.data.source=array_record --config.data.path="$folder/records" \
  --config.data.workers=1 --config.data.color_jitter=0.2 | check "train reads them by a worker process" "result['count'] == 360"
echo "smoke: passed with $("$python" --version)"
