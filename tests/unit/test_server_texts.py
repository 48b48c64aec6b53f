"""Token ids to text: all of them, also those that a generated text leaves out."""

import asyncio
from types import SimpleNamespace

import msgspec
import pytest
from test_tokenizer import _gguf_tokenizer

from disagg.model.tokenizer import NoTokenizer
from disagg.server.texts import SHORT_LEN, Texts


def back(tokenizer, *lists):
    """What /detokenize gives for these ids."""

    async def scenario():
        texts = Texts(SimpleNamespace(tokenizer=tokenizer, spec=SimpleNamespace(vocab_size=256)))
        try:
            return [msgspec.json.decode(await texts.decode(msgspec.json.encode(ids))) for ids in lists]
        finally:
            await texts.close()

    return asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_text_with_special_tokens_comes_back():
    """As in vLLM: what /tokenize was given, short or long, begin-of-sequence included where the model adds it."""
    tokenizer = _gguf_tokenizer(pre="smollm", add_bos_token=True)
    texts = ["ab<think>ab", "ab<|end|>ab", "ab<|end|>" * SHORT_LEN]
    assert back(tokenizer, *map(tokenizer.encode, texts)) == ["<|end|>" + text for text in texts]
    assert tokenizer.decode(tokenizer.encode(texts[1])) == "abab", "which a generated text leaves out"


@pytest.mark.parametrize("count", [3, SHORT_LEN])
def test_text_of_a_model_without_a_tokenizer(count):
    """Its token ids, as in completions."""
    assert back(NoTokenizer("none"), [7] * count) == ["7 " * count]
