#!/usr/bin/env bash
# The whole comparison on two GPUs in one go, within eight minutes: the hand-off over the link, then 2C and 1P1D at
# rising rates on the same two loaded workers, then `disagg compare`. Results are JSON files in $OUT (default:
# bench/results/two_gpus). RATES and SECONDS_A_POINT shorten or lengthen it.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/two_gpus}
RATES=${RATES:-4 8 12 16 20 24}
SECONDS_A_POINT=${SECONDS_A_POINT:-20}
mkdir -p "$OUT"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || exit 1

step() { # name, limit in seconds, command
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "== $name"
  timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.log" | grep -v '^{'
  echo "== $name: exit code ${PIPESTATUS[0]} after $((SECONDS - start)) s"
}

step transfer 90 python3 bench/gpu_transfer.py --out "$OUT/two_gpus_transfer.json"
# shellcheck disable=SC2086
step serving 400 python3 bench/gpu_serving.py --budget cuda:0,1 --arms 2C 1P1D --rates $RATES \
  --seconds "$SECONDS_A_POINT" --out "$OUT/two_gpus_serving.json"
