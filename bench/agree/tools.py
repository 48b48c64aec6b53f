"""The load generators: how each is installed, asked for the same requests, and what it says of every one of them."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from disagg.model.load import load_info

MODEL = "smollm2"
STREAMS = 2  # requests at a time
EXTRA = {"ignore_eos": True, "temperature": 0}  # so that outputs are as long as asked for, and every token has a text
TEXT = "The capital of France is Paris, a city of two million people on the river Seine. "


class Row(NamedTuple):
    """What somebody says of a request. Milliseconds and tokens."""

    ttft: float
    gap: float  # mean, between tokens
    e2e: float
    prompt: int
    output: int


class Tool(NamedTuple):
    """A load generator: its packages, its command line, and what its export says of each request."""

    packages: tuple[str, ...]
    command: Callable[[str, Path, Path, int], list[str]]  # of the address, the inputs, a folder, how many requests
    rows: Callable[[Path], list[Row]]


def write_inputs(folder: Path, count: int) -> None:
    """The prompts, for both tools: each reads its own names and passes over the others. And the model's tokenizer.

    Every request has an output length of its own, by which the two sides of a run are paired.
    """
    lines: list[dict[str, Any]] = []
    for number in range(count):
        text = f"Note {number}. " + (20 * TEXT)[: 64 + 149 * number % 600]
        lines.append({"text_input": text, "prompt": text})
        lines[-1] |= {"output_length": 16 + number, "output_tokens_count": 16 + number}
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "tokenizer.json").write_text(load_info(MODEL).tokenizer.portable() or "")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def _aiperf(url: str, inputs: Path, folder: Path, count: int) -> list[str]:
    return [
        "aiperf", "profile", "--model", MODEL, "--url", url, "--endpoint-type", "completions", "--streaming",
        "--tokenizer", str(inputs), "--use-server-token-count", "--input-file", str(inputs / "prompts.jsonl"),
        "--custom-dataset-type", "mooncake_trace", "--extra-inputs", json.dumps(EXTRA), "--request-count", str(count),
        "--concurrency", str(STREAMS), "--ui", "none", "--no-gpu-telemetry", "--no-server-metrics",
        "--output-artifact-dir", str(folder),
    ]  # fmt: skip


def _aiperf_rows(folder: Path) -> list[Row]:
    names = ("time_to_first_token", "inter_token_latency", "request_latency", "input_sequence_length",
             "output_sequence_length")  # fmt: skip
    lines = (folder / "profile_export.jsonl").read_text().splitlines()
    return [Row(*(json.loads(line)["metrics"][name]["value"] for name in names)) for line in lines]


def _guidellm(url: str, inputs: Path, folder: Path, count: int) -> list[str]:
    backend = {"kind": "openai_http", "target": url, "request_format": "/v1/completions", "model": MODEL}
    return [
        "guidellm", "run", "--backend", json.dumps({**backend, "extras": {"body": EXTRA}}),
        "--profile", f"kind=concurrent,streams={STREAMS}", "--constraint", f"kind=max_requests,count={count}",
        "--data", f"kind=json_file,path={inputs / 'prompts.jsonl'}",
        "--output", f"kind=json,path={folder / 'benchmarks.json'}",
    ]  # fmt: skip


def _guidellm_rows(folder: Path) -> list[Row]:
    said = json.loads((folder / "benchmarks.json").read_text())["benchmarks"][0]["requests"]["successful"]
    return [
        Row(
            each["time_to_first_token_ms"],
            each["inter_token_latency_ms"],
            each["request_latency"] * 1e3,
            each["prompt_tokens"],
            each["output_tokens"],
        )
        for each in said
    ]


TOOLS = {
    "AIPerf": Tool(("aiperf==0.13.0",), _aiperf, _aiperf_rows),
    # with the build of torch that is here already: another may be gigabytes
    "GuideLLM": Tool(("guidellm==0.8.1", f"torch=={importlib.metadata.version('torch')}"), _guidellm, _guidellm_rows),
}


def install(tool: Tool, home: Path) -> str:
    """Into a virtual environment of its own. Returns why it cannot be, or nothing."""
    venv.create(home, with_pip=True)
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, *tool.packages], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return "" if done.returncode == 0 else (said or ["pip failed"])[-1]


def drive(tool: Tool, home: Path, url: str, inputs: Path, folder: Path, count: int) -> tuple[list[str], list[Row]]:
    """Let it send the prompts to `url`. Returns the command and what it says, by output length. Raises RuntimeError."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = tool.command(url, inputs, folder, count)
    path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [home / "bin" / command[0], *command[1:]], cwd=folder, env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout[-3000:]}")
    return command, sorted(tool.rows(folder), key=lambda row: row.output)
