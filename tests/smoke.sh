#!/usr/bin/env bash
# A minute of vit-dist as a user runs it, in an empty folder: plans and trains twenty steps, asks again, evaluates,
# classifies a picture and a folder, writes features, trains from prepared records, trains a recipe of the user's own, and
# loads the run in Python.
# The one argument is the command to try; `make smoke` gives that of the environment that holds the wheel.
set -euo pipefail
command=$(realpath -s "$1")
python=$(dirname "$command")/python
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PYTHONPATH

# check TEXT EXPRESSION: says and proves something of `result`, a JSON object on stdin's last line.
check() {
  tail -n 1 | "$python" -c "import json, sys; result = json.loads(sys.stdin.read()); assert $2, result"
  echo "smoke: $1"
}

train() { "$command" train --config=digits --workdir="$folder/run" --config.total_steps=20 "$@"; }

"$command" configs | grep digits >/dev/null
"$command" plan --config=digits --target=cpu:4 --json --html=plan.html |
  check "plan fits four devices and lists their collectives" "result['fits'] and result['collectives']"
grep -q "</html>" plan.html
train | tee "$folder/first" | check "train takes 20 steps and evaluates 360 digits" "result['step'] == 20 and result['count'] == 360"
train | check "train on a finished run prints its summary again" "result == json.loads(open('$folder/first').readlines()[-1])"
"$command" checkpoints --workdir="$folder/run" --verify --json | check "every checkpoint is whole" "result and all(row['state'] == 'whole' for row in result)"
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
mkdir digits && cp digit.png digits/1.png && cp digit.png digits/2.png
"$command" predict --workdir="$folder/run" digits --out=classes.csv --attention=maps |
  check "predict writes a table of a folder" "result['images'] == 2 and result['errors'] == 0"
test "$(wc -l <classes.csv)" = 3 && test -s maps/1.rollout.png && test -s maps/2.last.png
"$command" features --workdir="$folder/run" --split=test --what=mean features.parquet |
  check "features writes those of 360 digits" "result['count'] == 360 and result['skipped'] == 0"
"$command" probe --workdir="$folder/run" --shots=5 |
  check "probe classifies 360 digits by neighbours and two regressions" "all(row['count'] == 360 for row in result['probes'].values())"
"$command" prepare --source=digits "$folder/records" | check "prepare makes records of the digits" "result['records'] == 1797"
"$command" prepare --verify "$folder/records" | check "and finds them whole" "result['splits'] == {'train': 1437, 'test': 360}"
train --workdir="$folder/other" --config.data.source=array_record --config.data.path="$folder/records" \
  --config.data.workers=1 --config.data.color_jitter=0.2 | check "train reads them by a worker process" "result['count'] == 360"
cat >mine.py <<'PY'
from vit_dist.configs import digits


def get_config():
    config = digits.get_config()
    config.total_steps, config.batch_size = 3, 48
    return config
PY
"$command" train --config=mine.py --workdir="$folder/mine" |
  check "a recipe of one's own imports the package's" "result['step'] == 3"
"$command" inspect --weights="$folder/run" --json |
  check "inspect says what an earlier run holds" "result['family'] == 'an earlier run, step 20' and result['tensors']"
"$python" - "$folder/run" "$folder/digit.png" <<'PY' | check "load classifies as predict does; what timm says is in the wheel" "len(result) == 5"
import json
import sys

import vit_dist
from vit_dist.weights.timm_architectures import table

assert table()["architectures"]
print(json.dumps(vit_dist.load(sys.argv[1]).predict([sys.argv[2]])[0]))
PY
"$command" export --workdir="$folder/run" --format=timm "$folder/timm" |
  check "export writes a folder for timm" "result['files'] == ['README.md', 'config.json', 'model.safetensors']"
"$command" inspect --weights="$folder/timm" --json | check "which is read as timm's" "result['family'] == 'timm'"
"$command" export --workdir="$folder/run" --format=stablehlo --input=uint8 "$folder/program" |
  check "export writes a program" "'model.stablehlo' in result['files']"
echo "smoke: passed with $("$python" --version)"
