"""The model called `seed`: the simplified Transformer of the experiment this project grew from.

    embedding 10,000 x 512 -> 6 x [attention, 8 heads -> add -> LayerNorm -> 4x ReLU -> add -> LayerNorm] -> output

No positions, norm after the residual, random weights. Here it is causal and keeps projected keys and values in pages.
Decision: weights are those PyTorch's own modules draw in that order after `torch.manual_seed(42)`, so biases exist
wherever nn.MultiheadAttention and nn.Linear have them (query, key, value and attention output start at zero).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, layer_norm

from disagg.model.ops import Between, Ops, Step
from disagg.model.spec import ModelSpec


class Seed:
    """Weights packed by `ops`, ready to run. `weights` is what `draw` returns."""

    def __init__(self, spec: ModelSpec, weights: dict[str, Tensor], ops: Ops) -> None:
        self.spec = spec
        self._ops = ops
        self._embedding = weights["embedding.weight"]
        self._head = ops.linear(weights["output.weight"], weights["output.bias"], torch.float32)
        self._layers = []
        for layer in range(spec.num_layers):
            own = {name: weights[f"{layer}.{name}"] for name in _layer_names(weights)}
            self._layers.append(
                (
                    ops.linear(own["attention.in_proj_weight"], own["attention.in_proj_bias"]),
                    ops.linear(own["attention.out_proj.weight"], own["attention.out_proj.bias"]),
                    (own["attention_norm.weight"], own["attention_norm.bias"]),
                    ops.linear(own["expand.weight"], own["expand.bias"]),
                    ops.linear(own["reduce.weight"], own["reduce.bias"]),
                    (own["mlp_norm.weight"], own["mlp_norm.bias"]),
                )
            )

    def forward(self, step: Step, pages: Tensor, between: Between | None = None) -> Tensor:
        """Logits float32 [S, V] of the rows `step.last`; writes the step's keys and values into `pages`.

        With `between`, which is asked before each layer, the last step that it returned counts.
        """
        ops, width, scale = self._ops, (self.spec.hidden_size,), self.spec.head_dim**-0.5
        x = embedding(step.tokens, self._embedding)
        for layer, (qkv, out, attention_norm, expand, reduce, mlp_norm) in enumerate(self._layers):
            if between is not None:
                step, x = between(step, x)
                if not len(x):
                    break
            q = ops.rotate_and_store(qkv(x), step, layer, pages)
            x = layer_norm(x + out(ops.attend(q, layer, pages, step, scale)), width, *attention_norm, self.spec.eps)
            x = layer_norm(x + reduce(expand(x).relu_()), width, *mlp_norm, self.spec.eps)
        return self._head(x if step.last is None else x[step.last])


def draw(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """The weights by name ("embedding.weight", "0.attention.in_proj_weight", ...), float32.

    The random state of the process is left as it was.
    """
    H, wide = spec.hidden_size, spec.intermediate_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules: dict[str, nn.Module] = {"embedding": nn.Embedding(spec.vocab_size, H)}
        for layer in range(spec.num_layers):
            modules[f"{layer}.attention"] = nn.MultiheadAttention(H, spec.num_heads)
            modules[f"{layer}.attention_norm"] = nn.LayerNorm(H, spec.eps)
            modules[f"{layer}.expand"] = nn.Linear(H, wide)
            modules[f"{layer}.reduce"] = nn.Linear(wide, H)
            modules[f"{layer}.mlp_norm"] = nn.LayerNorm(H, spec.eps)
        modules["output"] = nn.Linear(H, spec.vocab_size)
    return {
        f"{prefix}.{name}": tensor.detach()
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def _layer_names(weights: dict[str, Tensor]) -> list[str]:
    """Names of one layer's tensors, without the layer's number."""
    return [name[2:] for name in weights if name.startswith("0.")]
