"""How fast a GPU could be: bytes over the memory's speed or FLOPs over a large product's, whichever takes longer.

Both speeds are measured (gpu_ops.ceilings). See gpu_engine.py and gpu_model.py.
"""

from disagg.model.spec import ModelSpec


class Limits:
    """Of one model on one device, in seconds.

    A step reads every weight once, and the keys and values of all its contexts; a token takes two FLOPs per weight, and
    four per channel and position it attends to. In eight bits a layer's matrices are half the bytes, and their products
    take half the time.
    """

    def __init__(self, spec: ModelSpec, eight_bits: bool, bandwidth: float, peak: float) -> None:
        """`bandwidth` in bytes/s, `peak` in FLOP/s of numbers of two bytes."""
        self._spec, self._bandwidth, self._peak = spec, bandwidth, peak
        self._saved = spec.num_layers * spec.layer_params if eight_bits else 0  # bytes, and FLOPs a token

    @property
    def weights_s(self) -> float:
        """To read them, the output projection included; of the table of embeddings next to nothing."""
        spec = self._spec
        matrices = spec.num_layers * spec.layer_params + spec.vocab_size * spec.hidden_size
        return (2 * matrices - self._saved) / self._bandwidth

    def cache_s(self, positions: float) -> float:
        """To read the keys and values of so many."""
        return positions * self._spec.kv_bytes_per_token("bfloat16") / self._bandwidth

    def decode_s(self, batch: int, context: float) -> float:
        """A step of `batch` decodes."""
        flops = batch * (self._spec.decode_flops(int(context)) - self._saved)
        return max(self.weights_s + self.cache_s(batch * context), flops / self._peak)

    def prefill_s(self, length: int, count: int = 1) -> float:
        """`count` prompts at once."""
        flops = count * (self._spec.prefill_flops(length) - length * self._saved)
        return max(self.weights_s, flops / self._peak)

    def requests_s(self, prompts: list[int], outputs: list[int]) -> float:
        """Many requests at once: all prompts, then as many steps as the longest output needs.

        No strict bound: what reads weights and what computes could share a step.
        """
        positions = sum((n - 1) * p + n * (n - 1) / 2 for p, n in zip(prompts, outputs, strict=True))
        prompts_s = sum(self.prefill_s(length) for length in prompts)
        return prompts_s + (max(outputs) - 1) * self.weights_s + self.cache_s(positions)
