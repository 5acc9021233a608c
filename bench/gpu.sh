#!/usr/bin/env bash
# Everything that only a GPU can tell, in one call of under nine minutes: bash bench/gpu.sh OUT_FOLDER
# Runs from a bare checkout; what it measured lies in OUT_FOLDER afterwards.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bash bench/gpu.sh OUT_FOLDER}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.txt"
python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)' | tee -a "$out/gpu.txt"
status=0
echo "== tests on the GPU"
timeout 200 python3 -m pytest -p no:cacheprovider tests/test_gpu.py tests/test_averaging_ops.py \
  tests/test_trust_ratio_kernels.py tests/test_optim.py 2>&1 |
  tee "$out/tests.txt" || status=1
echo "== averaging and outer step"
timeout 120 python3 bench/averaging.py --device cuda --out "$out/averaging.jsonl" 2>&1 |
  tee "$out/averaging.txt" || status=1
echo "== LARS and LAMB"
timeout 120 python3 bench/gpu_optimizers.py --out "$out/optimizers.jsonl" 2>&1 |
  tee "$out/optimizers.txt" || status=1
echo "== training"
if python3 -c 'import cyclopts, rich, matplotlib'; then
  for workers in 1 8; do
    timeout 100 python3 -m fastlocal train --device cuda --precision bf16 --workers "$workers" --epochs 20 \
      --policy val-loss --synthetic-images 50000 --out "$out/train-k$workers" || status=1
  done
else
  echo "not run: the trainer needs the packages of the extra 'train'" && status=1
fi
exit "$status"
