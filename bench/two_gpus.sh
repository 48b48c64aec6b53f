#!/usr/bin/env bash
# What there is to measure on a host with two GPUs, in one go of LIMIT seconds (default 290). $OUT (default:
# bench/results/two_gpus) gets one log, a JSON file for each measurement, and the comparison's folder as compare.tar.gz.
#
#   single    each GPU by itself, both at once: the engine on Qwen3-8B; on Qwen3-0.6B, then serving with 1C
#   link      the hand-off over the link, and what a decode step feels of it
#   serving   2C and 1P1D in turns on the same two loaded workers, one rate of RATES after the other
#   compare   `disagg compare --quick`, where at least 100 s are left
#
# STEPS names the steps to take, on the first two GPUs of CUDA_VISIBLE_DEVICES; serving takes SERVING seconds at most. A
# step that runs out of time is ended; what it has measured is kept. DRY=1 rehearses all of it on two cores, with tiny
# models: no numbers.
set -u
cd "$(dirname "$0")/.." || exit
OUT=${OUT:-bench/results/two_gpus} LIMIT=${LIMIT:-290} STEPS=${STEPS:-single link serving compare}
RATES=${RATES:-16 8 12 20} SECONDS_A_POINT=${SECONDS_A_POINT:-15} SERVING=${SERVING:-400} DRY=${DRY:-}
IFS=, read -ra cards <<< "${CUDA_VISIBLE_DEVICES:-0,1}"
mkdir -p "$OUT"
exec > >(tee "$OUT/two_gpus.log" | grep --line-buffered -v '^{') 2>&1 # the JSON lines are in files of their own
export PYTHONPATH="src:bench${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
[ "$DRY" ] || nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || exit 1

BIG=(--model qwen3-8b) SMALL=(--model qwen3-0.6b) SERVED=(--model qwen3-8b) ONE=cuda:0 BOTH=cuda:0,1
if [ "$DRY" ]; then BIG=(--dry-run) SMALL=(--dry-run) SERVED=(--model tiny --prompt 64 --output 8) ONE=cpu:1 BOTH=cpu:2; fi

left() { echo $((LIMIT - SECONDS)); }

step() { # name, most seconds, command
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  if [ "$limit" -gt "$(left)" ]; then limit=$(left); fi
  if [ "$limit" -lt 5 ]; then echo "== $name: no time left" && return; fi
  echo "== $(date +%T) $name, at most $limit s"
  timeout --kill-after=5 "$limit" "$@"
  local code=$?
  echo "== $(date +%T) $name: exit code $code after $((SECONDS - begin)) s"
}

single() {
  # shellcheck disable=SC2030
  (export CUDA_VISIBLE_DEVICES=${cards[0]} && step engine-8b 120 python3 bench/gpu_engine.py "${BIG[@]}" --out "$OUT/engine_8b.json") \
    > "$OUT/first" 2>&1 &
  (
    export CUDA_VISIBLE_DEVICES=${cards[1]}
    step engine-0.6b 90 python3 bench/gpu_engine.py "${SMALL[@]}" --out "$OUT/engine_06b.json"
    step serving-1c 70 python3 bench/gpu_serving.py "${SERVED[@]}" --budget $ONE --arms 1C --rates 8 \
      --seconds "$SECONDS_A_POINT" --out "$OUT/serving_1c.json"
  ) > "$OUT/second" 2>&1 &
  wait %1 %2
  cat "$OUT/first" "$OUT/second"
  rm "$OUT/first" "$OUT/second"
}

link() {
  step link 40 python3 bench/gpu_transfer.py --owners 1 --out "$OUT/transfer.json"
}

serving() {
  # shellcheck disable=SC2086
  step serving "$SERVING" python3 bench/gpu_serving.py "${SERVED[@]}" --budget $BOTH --arms 1P1D 2C --rates $RATES \
    --seconds "$SECONDS_A_POINT" --out "$OUT/serving.json"
}

compare() {
  if [ "$(left)" -lt 100 ]; then echo "== compare: no time left" && return; fi
  local folder
  folder=$(mktemp -d)
  mkdir "$folder/${SERVED[1]}"
  python3 -c 'import sys, gpu_serving; gpu_serving.write_model(*sys.argv[1:])' "${SERVED[1]}" "$folder/${SERVED[1]}"
  step compare 300 python3 -m disagg compare --budget $BOTH --model "$folder/${SERVED[1]}" --random-weights --quick --requests 2 \
    --max-len 8192 --prompt-len 1024:3072 --output-len 64:192 --out "$folder/compare"
  tar -czf "$OUT/compare.tar.gz" -C "$folder" compare
  rm -r "$folder"
}

for name in $STEPS; do "$name"; done
echo "== $(date +%T) all steps taken, $(left) s left"
