"""The best a GPU could do: bytes over the memory's speed, or FLOPs over that of a large product. See gpu_engine.py."""

import torch

from disagg.model.spec import ModelSpec
from disagg.model.weights import expected_shapes


class Limits:
    """Of one model on one device.

    A step reads every weight once, and the keys and values of all its contexts; a prompt takes two FLOPs per weight and
    token, and four per channel and pair of positions. In eight bits a layer's matrices are half the bytes, and their
    products take half the time.
    """

    def __init__(self, spec: ModelSpec, dtype: str, bandwidth: float, peak: float) -> None:
        sizes = {name: torch.Size(dims).numel() for name, dims in expected_shapes(spec).items()}
        total, embedding = sum(sizes.values()), sizes["model.embed_tokens.weight"]
        body = total - embedding * (1 if spec.tied else 2)
        less = 2 if dtype == "fp8" else 1
        self.bandwidth, self.peak = bandwidth, peak
        self.weights = 2 * body / less + 2 * embedding  # bytes of a step; of the table of embeddings next to nothing
        self.kv_token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 2
        self._per_token = 2 * body / less
        self._per_pair = 4 * spec.num_layers * spec.num_heads * spec.head_dim

    def decode_s(self, batch: int, context: float) -> float:
        """A step of `batch` decodes."""
        return (self.weights + batch * self.kv_token * context) / self.bandwidth

    def prompt_s(self, length: int) -> float:
        """Arithmetic of a prompt; every position sees half of the others."""
        return length * (self._per_token + self._per_pair * length / 2) / self.peak

    def prefill_s(self, length: int) -> float:
        """A prompt by itself: the weights have to be read, too."""
        return max(self.prompt_s(length), self.weights / self.bandwidth)

    def requests_s(self, prompts: list[int], outputs: list[int]) -> float:
        """Many requests at once: all prompts, as many steps as the longest output has, every context read each step."""
        positions = sum(n * p + n * (n - 1) / 2 for p, n in zip(prompts, outputs, strict=True))
        steps = max(outputs) * self.weights + positions * self.kv_token
        return sum(map(self.prompt_s, prompts)) + steps / self.bandwidth
