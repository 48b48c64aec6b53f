"""README's table of one GPU, from the committed data: python bench/gpu_table.py [zh]. A test holds README to it."""

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
MODELS = {"Qwen3-8B": "qwen3-8b", "Qwen3-8B, `--dtype fp8`": "qwen3-8b_fp8", "Qwen3-0.6B": "qwen3-0.6b"}
GPUS = {"H200": "_h200", "H100": ""}
ROWS = {  # English, Chinese, digits
    "decode 1, ms": ("decode, batch 1, ms", "解码，批大小 1，ms", 2),
    "decode 8, ms": ("batch 8", "批大小 8", 2),
    "decode 32, ms": ("batch 32", "批大小 32", 2),
    "decode 128, ms": ("batch 128", "批大小 128", 2),
    "256 requests, tok/s": (
        "256 requests, 100 to 1,024 in and out, tokens/s", "256 个请求，输入输出各 100 至 1,024，token/s", 0,
    ),
    "prefill 1x128, ms": ("a prompt of 128, ms", "一个 128 的提示词，ms", 1),
    "prefill 1x512, ms": ("of 512", "512 的", 1),
    "prefill 32x2048, tok/s": ("32 prompts of 2,048, tokens/s", "32 个 2,048 的提示词，token/s", 0),
}  # fmt: skip
HEADS = {"en": ("disagg", "vLLM 0.25.1", "limit"), "zh": ("disagg", "vLLM 0.25.1", "极限")}


def lines(language: str) -> list[str]:
    """The table in Markdown, "en" or "zh"."""
    heads = [f"{gpu}: {head}" if language == "en" else f"{gpu}：{head}" for gpu in GPUS for head in HEADS[language]]
    found = [f"| | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
    for title, model in MODELS.items():
        files = [json.loads((RESULTS / f"gpu_engine_{model}{suffix}.json").read_text()) for suffix in GPUS.values()]
        found.append(f"| **{title}** |" + " |" * len(heads))
        for row, (english, chinese, digits) in ROWS.items():
            cells = [_cell(file[part].get(row), digits) for file in files for part in ("results", "vllm", "limits")]
            found.append(f"| {english if language == 'en' else chinese} | {' | '.join(cells)} |")
    return found


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


if __name__ == "__main__":
    print("\n".join(lines("zh" if "zh" in sys.argv[1:] else "en")))
