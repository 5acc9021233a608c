#!/usr/bin/env bash
# Everything that only a GPU can tell, in one call of under nine minutes:
#
#     bash bench/gpu.sh OUT_FOLDER [cuda|cpu] [PARTS]
#
# PARTS, such as "tests kernels queue roofline adopted", are those to run, into an OUT_FOLDER of their own; without it all
# are. Two calls leave each part its time: the second one wants the first one's launch.json in kernels/. Where the
# checkout has no .git, FASTLOCAL_COMMIT=... names the commit in the rows.
#
# Needs a checkout, a CUDA device and a python3 with torch, triton and numpy (PYTHON=... names another one); nothing is
# installed or fetched. pytest, pytest-timeout, timm and pytorch-optimizer are used where they are. CIFAR-100 is used
# if data/cifar-100-python is there (DATA=... names another folder), else synthetic images.
#
# Each part has a time limit of its own, all have one together, and a part that fails does not stop the others.
# OUT_FOLDER holds, as they come:
#     summary.txt      each part, its return code (124: out of time) and seconds; the last line says if all is well
#     log.txt          what the parts printed
#     roofline.json    GB/s of every kernel by block size and warps
#     launch.json      the winners, which the later parts ran with: copy it to kernels/launch.json and commit it
#     steps.jsonl, bench.jsonl, training.jsonl    timings beside PyTorch and other libraries; whole training runs
# On the cpu it only tries its parts out, as far as they go without a GPU, on small sizes.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
out=${1:?usage: bash bench/gpu.sh OUT_FOLDER [cuda|cpu] [PARTS]}
device=${2:-cuda}
wanted=${3:-}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
began=$SECONDS
failed=0
: >"$out/summary.txt"
: >"$out/log.txt"

asked_for() { [ -z "$wanted" ] || [[ " $wanted machine " == *" $1 "* ]]; }

left_out() { # NAME REASON
  printf '%-16s left out: %s\n' "$1" "$2" | tee -a "$out/summary.txt"
}

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 remains=$((505 - SECONDS + began)) start=$SECONDS code
  shift 2
  if ! asked_for "$name"; then
    left_out "$name" "not asked for"
    return 1
  fi
  if [ "$remains" -lt 15 ]; then
    left_out "$name" "no time is left"
    failed=1
    return 1
  fi
  [ "$limit" -le "$remains" ] || limit=$remains
  echo "== $name (at most $limit s)" | tee -a "$out/log.txt"
  # Told to stop as by Ctrl-C, pytest says what has failed so far.
  timeout -s INT -k 15 "$limit" "$@" 2>&1 | tee -a "$out/log.txt"
  code=${PIPESTATUS[0]}
  [ "$code" = 0 ] || failed=1
  printf '%-16s code %3d  %4d s\n' "$name" "$code" "$((SECONDS - start))" | tee -a "$out/summary.txt"
  return "$code"
}

has() { "$python" -c "import $1" 2>/dev/null; }

part machine 30 "$python" - "$device" <<'PYTHON'
import sys
import numpy, torch, triton
print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__, "numpy", numpy.__version__)
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0), "devices:", torch.cuda.device_count())
elif sys.argv[1] == "cuda":
    sys.exit("no CUDA device: nothing here can be measured (add the word cpu to try the parts out)")
PYTHON
[ "$failed" = 0 ] || exit 1
if [ "$device" = cuda ]; then
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv | tee -a "$out/log.txt"
fi

steps=(--no-steps)
if has pytest; then
  settings=(-p no:cacheprovider -W default -ra)
  # pyproject.toml sets the timeout of a plugin; without it pytest takes no settings from there.
  has pytest_timeout || settings+=(-c /dev/null --rootdir "$PWD" -q)
  chosen=()
  [ "$device" = cpu ] || chosen=(-m gpu)
  part tests 110 "$python" -m pytest "${settings[@]}" "${chosen[@]}" tests/test_gpu.py tests/test_train_step.py
  has xdist && settings+=(-n 8) # most of the time goes into compiling
  if [ "$device" = cuda ]; then
    part kernels 110 "$python" -m pytest "${settings[@]}" \
      tests/test_averaging_ops.py tests/test_trust_ratio_kernels.py tests/test_master_weights.py \
      tests/test_progress.py tests/test_float8.py
    # By itself: programs that wait for each other could hang. What has not passed is not adopted.
    part queue 75 "$python" -m pytest "${settings[@]}" tests/test_trust_ratio_queue.py && steps=()
  fi
else
  left_out tests "pytest is not installed"
fi

if [ "$device" = cuda ]; then
  part roofline 110 "$python" bench/roofline.py --adopt --seconds 85 "${steps[@]}" --out "$out/roofline.json"
  asked_for roofline && cp kernels/launch.json "$out/launch.json"
  # The tests before ran with other block sizes and warps than those adopted now.
  if has pytest; then
    part adopted 60 "$python" -m pytest "${settings[@]}" tests/test_trust_ratio_kernels.py tests/test_averaging_ops.py \
      -k "float64_reference or low_precision or same_bits or norm or agrees_with_the_reference"
  fi
  part steps 50 "$python" bench/gpu_steps.py --out "$out/steps.jsonl"
  quick=()
else
  left_out roofline "needs a CUDA device"
  left_out steps "needs a CUDA device"
  quick=(--quick)
fi
part training-8 60 "$python" bench/gpu_training.py --workers 8 --seconds 45 --out "$out/training.jsonl" \
  --device "$device" --data-dir "${DATA:-data}" ${quick:+--epochs 1 --images 2000}
part training-1 75 "$python" bench/gpu_training.py --workers 1 --seconds 60 --out "$out/training.jsonl" \
  --device "$device" --data-dir "${DATA:-data}" ${quick:+--epochs 1 --images 2000}
for operation in lamb lars outer-step average; do
  part "bench-$operation" 40 "$python" -m fastlocal.bench --device "$device" \
    --operation "$operation" --out "$out/bench.jsonl" "${quick[@]}"
done

if [ "$failed" = 0 ]; then
  echo "all parts that ran are well, $((SECONDS - began)) s" | tee -a "$out/summary.txt"
else
  echo "a part failed, see its code above, $((SECONDS - began)) s" | tee -a "$out/summary.txt"
fi
cat "$out/summary.txt"
exit "$failed"
