"""Every model family through real processes and hand-offs: the tokens must be those of transformers."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_cluster import assert_idle, two_cores, wait_until
from test_exact import load_into_transformers, needs_smollm2, random_prompts, transformers_greedy

from disagg import LLM, SamplingParams
from disagg.model.load import load_info, resolve
from disagg.testing import tiny_checkpoint

NUM_TOKENS = 20
TEXTS = ["The capital of France is", "def fibonacci(n):\n    ", "Once upon a time, in a small village by the sea,"]
NUM_REAL = 12


@contextmanager
def running(model, deploy, **options):
    """A deployment on two cores that in the end holds no page and leaves no process and no folder."""
    with LLM(str(model), deploy=deploy, budget="cpu:2", **options) as llm:
        left = [llm.cluster._mailbox._folder]
        left += [Path(f"/proc/{worker.process.pid}") for worker in llm.cluster.workers()]
        yield llm
        assert_idle(llm.cluster)
    wait_until(lambda: not any(path.exists() for path in left))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The references are computed beside the workers: threads that wait for each other would slow both."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_prompts():
    """Less than a page, whole pages, many chunks; and three that share three pages."""
    shared = random_prompts(320, [48])[0]
    return [*random_prompts(320, [1, 16, 37, 100]), *(shared + [i] * (5 + 12 * i) for i in range(3))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Writes a tiny checkpoint of each family once, with the tokens transformers generates from it."""
    made = {}

    def get(family):
        if family not in made:
            from transformers import AutoModelForCausalLM

            folder = tiny_checkpoint(family, tmp_path_factory.mktemp(family))
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            made[family] = folder, transformers_greedy(model, tiny_prompts(), NUM_TOKENS)
        return made[family]

    return get


@two_cores
@pytest.mark.parametrize(
    ("family", "deploy", "caching"),
    [
        ("llama", "1P1D", False),
        ("mistral", "1P1D", False),
        ("qwen2", "1P1D", False),
        ("qwen3", "1P1D", False),
        ("qwen2", "2C", False),
        ("qwen2", "2P2D", True),
    ],
)
def test_families_equal_transformers_across_processes(checkpoint, family, deploy, caching):
    """Each family, prompts cut into small chunks and handed over chunk by chunk, gives the tokens of transformers;
    so do several workers of a kind and prefixes found in a cache."""
    folder, expected = checkpoint(family)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    options = {"max_batch_tokens": 24, "kv_bytes": 8 << 20, "prefix_caching": caching}
    with running(folder, deploy, **options) as llm:
        rounds = [llm.generate(tiny_prompts(), params) for _ in range(2)]

    for outputs in rounds:
        assert [done.token_ids for done in outputs] == expected
    longest = rounds[0][3].record
    kinds = [span.kind for span in longest.spans]
    assert kinds.count("prefill") >= 100 // 24
    assert (kinds.count("handoff") > 1) == (deploy != "2C")
    for number, outputs in enumerate(rounds):
        cached = sum(done.record.num_cached for done in outputs)
        assert cached == 0 if not caching else cached >= number * 48


@pytest.fixture(scope="module")
def smollm2_expected():
    """The prompts' ids and the tokens that transformers generates after them."""
    tokenizer = load_info("smollm2").tokenizer
    prompts = [tokenizer.encode(text) for text in TEXTS]
    return transformers_greedy(load_into_transformers(Path(resolve("smollm2").where)), prompts, NUM_REAL)


@pytest.fixture(scope="module", params=["1C", "1P1D", "2P2D"])
def smollm2(request, smollm2_expected):
    """Real weights on each deployment, 12 pages a worker."""
    with running("smollm2", request.param, kv_bytes=4 * 12 * 737_280, max_batch_tokens=8) as llm:
        yield llm


@needs_smollm2
@two_cores
def test_smollm2_equals_transformers_on_every_deployment(smollm2, smollm2_expected):
    """Real weights and texts: colocated and disaggregated workers give the tokens of transformers, one for one."""
    params = SamplingParams(temperature=0, max_tokens=NUM_REAL, ignore_eos=True)

    outputs = smollm2.generate(TEXTS, params)

    assert [done.token_ids for done in outputs] == smollm2_expected
    for done, tokens in zip(outputs, smollm2_expected, strict=True):
        assert done.text == smollm2.tokenizer.decode(tokens)
        assert done.finish_reason == "length"


@needs_smollm2
@two_cores
def test_a_stop_string_over_two_tokens_ends_the_request(smollm2, smollm2_expected):
    """A stop string that begins in one token and ends in the next: the text ends before it, the tokens with the one
    that completes it, and every page is free although the workers were still decoding."""
    tokens = smollm2_expected[2]
    ends = [len(smollm2.tokenizer.decode(tokens[:count])) for count in range(NUM_REAL + 1)]
    text = smollm2.tokenizer.decode(tokens)
    # the last letter of a token with the first two characters of the next, nowhere earlier in the text
    count, at = next(
        (count, ends[count] - 1)
        for count in range(3, NUM_REAL - 1)
        if ends[count + 1] >= ends[count] + 2 and text.find(text[ends[count] - 1 : ends[count] + 2]) == ends[count] - 1
    )
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, stop=("not in it", text[at : at + 3]))

    (done,) = smollm2.generate([TEXTS[2]], params)
    assert_idle(smollm2.cluster)

    assert (done.finish_reason, done.text) == ("stop", text[:at])
    assert done.token_ids == tokens[: count + 1]
