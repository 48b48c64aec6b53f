"""What products in eight bits cost in accuracy: a real model reads a text with and without them.

SmolLM2-135M on this project's own documents, in windows of 512 tokens, on the CPU. `float32` is the plain definition of
a model's operations, `fp8` that of `--dtype fp8` (model/fp8.py; its kernels are compared with it on a GPU by
tests/seams/test_ops_cuda_fp8.py), `bfloat16` the same weights rounded to bfloat16, for scale.

    python bench/fp8_accuracy.py [--windows N]

prints a table, then one JSON line.
"""

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from disagg.model.fp8 import Fp8ReferenceOps
from disagg.model.load import load_info, load_model
from disagg.model.ops import Linear, ReferenceOps, Step

MODEL, WINDOW, PAGE_SIZE = "smollm2", 512, 16
TEXTS = ("README.md", "docs/serve.md", "docs/handoff.md", "docs/tour.md")


class Bfloat16Weights(ReferenceOps):
    """Weights of the layers rounded to bfloat16, arithmetic in float32."""

    def linear(self, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Linear:
        """All but the output projection."""
        return super().linear(weight if out_dtype else weight.bfloat16().float(), bias, out_dtype)


def windows(count: int) -> list[Tensor]:
    """int64 [512] each, one after the other out of the texts."""
    folder, tokenizer = Path(__file__).parent.parent, load_info(MODEL).tokenizer
    tokens = [token for name in TEXTS for token in tokenizer.encode((folder / name).read_text())]
    found = [torch.tensor(tokens[start:end]) for start, end in pairwise(range(0, len(tokens), WINDOW))]
    return found[:: max(1, len(found) // count)][:count]


@torch.inference_mode()
def read(ops: ReferenceOps, texts: list[Tensor]) -> list[Tensor]:
    """Log-probabilities float32 [512, V] of what may follow each token."""
    loaded = load_model(MODEL, ops=ops)
    spec, num_pages = loaded.spec, WINDOW // PAGE_SIZE
    pages = torch.zeros(num_pages, spec.num_layers, 2, spec.num_kv_heads, PAGE_SIZE, spec.head_dim)
    positions = torch.arange(WINDOW)
    found = []
    for tokens in texts:
        step = Step(
            tokens, positions, positions, torch.tensor([0, WINDOW], dtype=torch.int32),
            torch.tensor([WINDOW], dtype=torch.int32), torch.arange(num_pages, dtype=torch.int32)[None], None,
        )  # fmt: skip
        found.append(loaded.model.forward(step, pages).log_softmax(-1))
    return found


def compare(texts: list[Tensor], exact: list[Tensor], rounded: list[Tensor]) -> dict[str, float]:
    """Over all tokens but the first of each window."""
    loss = change = agree = divergence = 0.0
    for tokens, a, b in zip(texts, exact, rounded, strict=True):
        a, b, following = a[:-1], b[:-1], tokens[1:, None]
        loss -= b.gather(1, following).sum().item()
        change += (a.gather(1, following) - b.gather(1, following)).sum().item()
        agree += (a.argmax(1) == b.argmax(1)).sum().item()
        divergence += (a.exp() * (a - b)).sum().item()
    count = len(texts) * (WINDOW - 1)
    return {"perplexity": math.exp(loss / count), "loss_change": change / count, "same_first": agree / count,
            "divergence": divergence / count}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=2)
    texts = windows(parser.parse_args().windows)
    exact = read(ReferenceOps(), texts)
    kinds = {"float32": ReferenceOps(), "bfloat16": Bfloat16Weights(), "fp8": Fp8ReferenceOps()}
    rows = {
        name: compare(texts, exact, exact if name == "float32" else read(ops, texts)) for name, ops in kinds.items()
    }
    print(f"{MODEL}, {len(texts)} windows of {WINDOW} tokens; against float32\n")
    print(f"{'':10}{'perplexity':>12}{'loss, nats':>12}{'same likeliest token':>22}{'KL divergence':>15}")
    for name, row in rows.items():
        print(f"{name:10}{row['perplexity']:12.3f}{row['loss_change']:+12.4f}{row['same_first']:22.2%}"
              f"{row['divergence']:15.5f}")  # fmt: skip
    print(json.dumps({"benchmark": "fp8_accuracy", "model": MODEL, "windows": len(texts), "rows": rows}))


if __name__ == "__main__":
    main()
