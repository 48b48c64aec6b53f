#!/usr/bin/env bash
# vLLM on the same machine by the same method, in one go of LIMIT seconds (default 560). PEER is a folder with its timing
# scripts (models.py, offline.py, client.py), SITE the folder that vLLM is installed in. $OUT (default:
# bench/results/peer_vllm) gets one log, peer_vllm.json, what offline.py printed for each model (for
# `gpu_engine.py --peer-log`), and the servers' logs as one archive.
#
#   offline   the engine in its own process: Qwen3-8B on the first of GPUS, Qwen3-0.6B on the last, both at once
#   one       one server on the first of GPUS, at RATES_ONE
#   pair      servers on the first two of GPUS, at RATES: colocated, then prefill and decode with NIXL. PAIR_ONCE=1 starts
#             them once, with NIXL configured for both, which saves a minute and may slow the colocated ones
#
# STEPS names the steps to take; what fails is shown, and the next one follows. EXTRA: more flags for servers. DRY=1
# rehearses with a stand-in for vLLM: no numbers.
set -u
cd "$(dirname "$0")/.." || exit
OUT=${OUT:-bench/results/peer_vllm} LIMIT=${LIMIT:-560} STEPS=${STEPS:-offline one pair} GPUS=${GPUS:-0 1} DRY=${DRY:-}
RATES_ONE=${RATES_ONE:-8} RATES=${RATES:-8 16} SECONDS_A_POINT=${SECONDS_A_POINT:-25} START=${START:-200}
PAIR_ONCE=${PAIR_ONCE:-} EXTRA=${EXTRA:-} PEER=$(realpath "${PEER:?a folder with models.py, offline.py and client.py}")
logs=$(mktemp -d) running=()
mkdir -p "$OUT"
exec > >(tee "$OUT/peer_vllm.log") 2>&1

if [ "$DRY" ]; then
  SITE=$logs/site LIMIT=150 SECONDS_A_POINT=2
  mkdir -p "$SITE/vllm/entrypoints/cli"
  cat > "$SITE/vllm/__init__.py" << 'END'
class LLM:
    def __init__(self, *args, **kwargs): pass
    def generate(self, prompts, params, use_tqdm): pass
SamplingParams = dict
END
  cat > "$SITE/vllm/entrypoints/cli/main.py" << 'END'
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self): self.send_response(200), self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200), self.send_header("Content-Type", "application/json"), self.end_headers()
        for _ in range(body["max_tokens"] if body["stream"] else 0):
            self.wfile.write(b'data: {"choices": [0]}\n\n')
        if not body["stream"]: self.wfile.write(b'{"kv_transfer_params": {}}')
if "broken" in sys.argv: sys.exit("broken, as asked")
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
END
else
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || exit 1
fi
export PYTHONPATH=${SITE:-/opt/site} PYTHONUNBUFFERED=1 VLLM_USE_FLASHINFER_SAMPLER=0
export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 VLLM_CACHE_ROOT=${VLLM_CACHE_ROOT:-/tmp/vllm_cache}
export VLLM_NIXL_SIDE_CHANNEL_HOST=127.0.0.1 UCX_TLS=${UCX_TLS:-all}
read -ra gpus <<< "$GPUS"
NIXL='{"kv_connector":"NixlConnector","kv_role":"kv_both"}'

left() { echo $((LIMIT - SECONDS)); }

most() { # of so many seconds, what is left
  if [ "$1" -lt "$(left)" ]; then echo "$1"; else left; fi
}

offline_one() { # GPU, model's folder, name
  local begin=$SECONDS log=$OUT/peer_offline_$3.log
  CUDA_VISIBLE_DEVICES=$1 timeout --kill-after=5 "$(most 300)" python3 "$PEER/offline.py" "$2" > "$log" 2>&1
  local code=$?
  echo "== $(date +%T) offline $3: exit code $code after $((SECONDS - begin)) s"
  tail -n $((code ? 40 : 12)) "$log"
}

offline() {
  offline_one "${gpus[0]}" /tmp/q8 8b > "$logs/first" 2>&1 &
  local first=$!
  if [ ${#gpus[@]} -eq 1 ]; then wait $first; fi
  offline_one "${gpus[-1]}" /tmp/q06 06b
  wait $first
  cat "$logs/first"
}

serve() { # name, GPUs, flags...: starts a server on each GPU and waits for all
  local name=$1 number=0 begin=$SECONDS gpu
  read -ra on <<< "$2"
  shift 2
  command="vllm serve /tmp/q8 --load-format dummy --max-model-len 8192 --no-enable-prefix-caching \
--gpu-memory-utilization 0.85 --no-enable-log-requests $EXTRA $*"
  # shellcheck disable=SC2206
  local words=(${command#vllm })
  set -m # each server leads a group, its engine's process with it
  for gpu in "${on[@]}"; do
    CUDA_VISIBLE_DEVICES=$gpu VLLM_NIXL_SIDE_CHANNEL_PORT=$((5600 + 10 * number)) python3 -m vllm.entrypoints.cli.main \
      "${words[@]}" --host 127.0.0.1 --port $((8100 + 100 * number)) > "$logs/${name}_$number.log" 2>&1 &
    running+=($!)
    number=$((number + 1))
  done
  set +m
  local limit
  limit=$((SECONDS + $(most "$START")))
  for number in "${!on[@]}"; do
    until curl -sf -o /dev/null "http://127.0.0.1:$((8100 + 100 * number))/health"; do
      if [ $SECONDS -ge $limit ] || ! kill -0 "${running[$number]}" 2> /dev/null; then
        echo "== $(date +%T) $name: server $number does not serve after $((SECONDS - begin)) s"
        tail -n 40 "$logs/${name}_$number.log"
        return 1
      fi
      sleep 0.5
    done
  done
  ready=$((SECONDS - begin))
  echo "== $(date +%T) $name: ready after $ready s: $command"
}

drive() { # name, client's mode, rates: a warm-up, then every rate
  local name=$1 mode=$2 rate log
  timeout 60 python3 "$PEER/client.py" "$mode" 2 8 2048 128 /tmp/q8 > "$logs/warm" 2>&1 || tail -n 5 "$logs/warm"
  for rate in $3; do
    if [ "$(left)" -lt $((SECONDS_A_POINT + 5)) ]; then echo "== $name at $rate: no time left" && continue; fi
    log=$logs/${name}_at_$rate.client
    timeout --kill-after=5 "$(most $((SECONDS_A_POINT + 60)))" \
      python3 "$PEER/client.py" "$mode" "$rate" "$SECONDS_A_POINT" 2048 128 /tmp/q8 > "$log" 2>&1
    echo "== $(date +%T) $name at $rate requests/s: exit code $?"
    grep -v '^{' "$log" | sort | uniq -c | head -n 10
    grep '^{' "$log" && keep_point "$name" "$log"
  done
}

keep_point() { # keeps a point: its name, how it was served, what the client printed
  python3 - "$1" "$command" "${on[*]}" "$ready" "$2" >> "$logs/points" << 'END'
import json, sys
name, command, gpus, ready, log = sys.argv[1:]
found = json.loads([line for line in open(log) if line.startswith("{")][-1])
print(json.dumps({"arm": name, "command": command, "gpus": gpus, "ready_s": int(ready)} | found))
END
}

stop() {
  local pid
  if [ ${#running[@]} -eq 0 ]; then return; fi # a wait for none would wait for the log's tee
  for pid in "${running[@]}"; do kill -- "-$pid" 2> /dev/null; done
  for pid in "${running[@]}"; do
    for _ in $(seq 40); do kill -0 -- "-$pid" 2> /dev/null && sleep 0.25; done
    kill -9 -- "-$pid" 2> /dev/null
  done
  wait "${running[@]}" 2> /dev/null
  running=()
}

one() {
  serve 1C "${gpus[0]}" && drive 1C coloc1 "$RATES_ONE"
  stop
}

pair() {
  if [ ${#gpus[@]} -lt 2 ]; then echo "== pair: takes two GPUs" && return; fi
  local both="${gpus[*]:0:2}" nixl=(--kv-transfer-config "$NIXL")
  if [ "$PAIR_ONCE" ]; then
    serve pair "$both" "${nixl[@]}" && drive 2C coloc "$RATES" && drive 1P1D pd "$RATES"
  else
    serve 2C "$both" && drive 2C coloc "$RATES"
    stop
    serve 1P1D "$both" "${nixl[@]}" && drive 1P1D pd "$RATES"
  fi
  stop
}

collect() { # everything that is known so far, in one file
  python3 - "$logs/points" "$OUT" "$STEPS" << 'END'
import importlib.metadata, json, pathlib, re, subprocess, sys
points, out, steps = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
def devices():
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return []
offline = {log.stem.removeprefix("peer_offline_"): re.findall(r"^(?:load s|/tmp/q).*$", log.read_text(), re.M)
           for log in sorted(out.glob("peer_offline_*.log"))}
serving = [json.loads(line) for line in points.read_text().splitlines()] if points.exists() else []
found = {"bench": "peer_vllm", "vllm": version("vllm"), "torch": version("torch"), "devices": devices(), "steps": steps,
         "workload": "Qwen3-8B, random weights; prompts 2048, outputs 128, each +-50 %; Poisson; ms: p50, p90, p99",
         "offline_command": "offline.py MODEL", "offline": offline, "serving": serving}
(out / "peer_vllm.json").write_text(json.dumps(found, indent=1) + "\n")
END
}

end() {
  stop
  collect
  rm -rf "$logs/site"
  tar -czf "$OUT/peer_servers.tar.gz" -C "$logs" .
  rm -r "$logs"
}
trap end EXIT
trap 'exit 143' TERM INT

python3 "$PEER/models.py" || exit
for name in $STEPS; do
  echo "== $(date +%T) $name, $(left) s left"
  "$name"
  collect
done
echo "== $(date +%T) all steps taken, $(left) s left"
