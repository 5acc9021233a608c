#!/usr/bin/env bash
# Everything that only a GPU can tell, in one call of under nine minutes: bash bench/gpu.sh OUT_FOLDER
# Runs from a bare checkout with torch, triton and numpy; what it measured lies in OUT_FOLDER afterwards. A part whose
# packages are missing is said to be left out, and does not fail the rest.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bash bench/gpu.sh OUT_FOLDER}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
status=0

part() { # NAME SECONDS COMMAND...: its output on the screen and in OUT_FOLDER/NAME.txt
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" 2>&1 | tee "$out/$name.txt" || status=1
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.txt"
"$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)' |
  tee -a "$out/gpu.txt"
if "$python" -c 'import pytest' 2>/dev/null; then
  settings=(-p no:cacheprovider)
  # pyproject.toml sets the timeout of a plugin; without it pytest takes no settings from there.
  "$python" -c 'import pytest_timeout' 2>/dev/null || settings+=(-c /dev/null --rootdir "$PWD" -q)
  part tests 100 "$python" -m pytest "${settings[@]}" -m gpu tests/test_gpu.py tests/test_train_step.py
  part kernels 80 "$python" -m pytest "${settings[@]}" tests/test_averaging_ops.py tests/test_trust_ratio_kernels.py
else
  echo "== tests: left out, pytest is not installed"
fi
part roofline 130 "$python" bench/roofline.py --out "$out/roofline.json"
for operation in lamb lars average outer-step; do
  part "bench-$operation" 35 "$python" -m fastlocal.bench --device cuda --operation "$operation" --out "$out/bench.jsonl"
done
if "$python" -c 'import cyclopts, rich, matplotlib' 2>/dev/null; then
  part train 60 "$python" -m fastlocal train --device cuda --precision bf16 --workers 8 --epochs 10 \
    --policy val-loss --synthetic-images 50000 --out "$out/train"
else
  echo "== training: left out, it needs the packages of the extra 'train'"
fi
exit "$status"
