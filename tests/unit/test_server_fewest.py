"""A text that surely does not fit is refused before it is tokenized; none that fits ever is."""

import asyncio
import unicodedata
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from test_tokenizer import _gguf_tokenizer, needs_smollm2, sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from disagg.model.load import load_info
from disagg.server.app import create_app
from disagg.server.fewest import _LETTERS, Portable
from disagg.server.guards import Keys
from disagg.server.metrics import Metrics
from disagg.server.state import Settings, State
from disagg.server.turns import Turns


def measure(tokenizer):
    """Of a tokenizer of the library, or of one of ours."""
    portable = tokenizer.to_str() if isinstance(tokenizer, Tokenizer) else tokenizer.portable()
    return msgspec.json.decode(portable, type=Portable).measure()


def byte_level(normalizer=None, letters=_LETTERS, **options):
    """A vocabulary of bytes and two merges."""
    vocabulary = {letter: number for number, letter in enumerate([*letters, "aa", "aaaa"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "a"), ("aa", "aa")], **options))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


TEXTS = st.lists(st.one_of(st.text(max_size=20), st.integers(0, 10**6)), max_size=20).map(tuple)


def written(pieces, vocabulary):
    """A text of these pieces; a number is one of the vocabulary's, the longest first and often."""
    numbers = (piece % 20 if isinstance(piece, int) and piece % 2 else piece for piece in pieces)
    return "".join(vocabulary[one % len(vocabulary)] if isinstance(one, int) else one for one in numbers)


@needs_smollm2
@settings(deadline=None, max_examples=300)
@given(pieces=TEXTS, times=st.integers(1, 30))
def test_no_text_of_smollm2_has_fewer_tokens(pieces, times):
    """Of any characters, special tokens and tokens of the vocabulary, the longest most of all."""
    tokenizer, found, vocabulary = smollm2()
    text = written(pieces, vocabulary) * times
    assert found.fewest(text) <= len(tokenizer.encode(text))


KNOWN = []


def smollm2():
    if not KNOWN:
        tokenizer = load_info("smollm2").tokenizer
        vocabulary = sorted({tokenizer.decode([number]) for number in range(49_152)}, key=len, reverse=True)
        special = ["<|endoftext|>", "<|im_start|>", "\x04", "\x1d", "\U000f0000", "\U00090000"]
        KNOWN.append((tokenizer, measure(tokenizer), special + vocabulary))
    return KNOWN[0]


@needs_smollm2
def test_the_bound_of_smollm2_is_its_longest_token():
    """81 bytes; the longest texts that there are in few tokens are taken, and control characters are none."""
    tokenizer, found, vocabulary = smollm2()
    longest = max(vocabulary, key=len)
    assert found.longest == len(longest.encode()) == 81
    assert found.fewest("\x04" * 10**6) == len(tokenizer.encode("\x04" * 1000)) == 0
    assert found.fewest("a" * 82) == 2


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=60), times=st.integers(1, 5))
def test_no_text_has_fewer_tokens(text, times):
    """Whatever is normalized, spelled in bytes, unknown or dropped."""
    for tokenizer in (
        byte_level(),
        byte_level(normalizers.NFC()),
        byte_level(letters=_LETTERS[:128]),
        byte_level(letters=_LETTERS[:128], unk_token="a"),
        byte_level(letters=_LETTERS[:128], unk_token="a", fuse_unk=True),
        sentencepiece(),
        _gguf_tokenizer(pre="smollm"),
    ):
        for given_text in (text * times, unicodedata.normalize("NFD", text) * times):
            ids = tokenizer.encode(given_text)
            found = measure(tokenizer)
            assert found.fewest(given_text) <= len(ids.ids if isinstance(tokenizer, Tokenizer) else ids)


def test_characters_that_compose():
    """NFC makes one character of four at most, and a bound knows it."""
    assert max(len(unicodedata.normalize("NFD", chr(code))) for code in range(0x110000)) == 4
    tokenizer, text = byte_level(normalizers.NFC()), unicodedata.normalize("NFD", "\u1f82" * 50)
    assert (measure(tokenizer).longest, measure(tokenizer).dropped) == (16, None)
    assert 1 < measure(tokenizer).fewest(text) <= len(tokenizer.encode(text).ids)


def changed(**parts):
    """A byte-level tokenizer with these parts."""
    tokenizer = byte_level()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def with_added(**options):
    tokenizer = changed(normalizer=normalizers.NFC())
    tokenizer.add_tokens([AddedToken("<tool>", **options)])
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")),
        Tokenizer(models.WordPiece({"a": 0, "?": 1}, unk_token="?")),
        Tokenizer(models.Unigram([("a", 0.0), ("?", 0.0)], 1)),
        Tokenizer(models.BPE({"a": 0}, [])),
        Tokenizer(models.BPE({"a": 0, "?": 1}, [], unk_token="?", fuse_unk=True)),
        byte_level(end_of_word_suffix="</w>"),
        byte_level(normalizers.NFC(), letters=_LETTERS[:128]),
        changed(normalizer=normalizers.Replace(Regex(" +"), " ")),
        changed(normalizer=normalizers.Replace("  ", " ")),
        changed(normalizer=normalizers.Strip()),
        changed(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.StripAccents()])),
        changed(pre_tokenizer=pre_tokenizers.Split(" ", "removed")),
        changed(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])),
        with_added(lstrip=True, normalized=False),
        with_added(rstrip=True, normalized=False),
        with_added(normalized=True),
    ],
)
def test_where_a_token_may_be_any_text_there_is_no_bound(tokenizer):
    """Unknown words, what is taken out, white space beside an added token."""
    assert measure(tokenizer) is None


def app(tokenizer):
    info = SimpleNamespace(tokenizer=tokenizer, spec=SimpleNamespace(vocab_size=49_152))
    cluster = SimpleNamespace(info=info, engine=SimpleNamespace(max_len=99, page_size=1), num_pages=99)
    front = SimpleNamespace(cluster=lambda: cluster, workers=[], note=lambda records, exchange: None)
    state = State(Settings(model="m"), front, Metrics(lambda: None))
    return state, create_app(state, Keys([]), frozenset())


def test_what_cannot_fit_is_refused_before_it_is_tokenized(monkeypatch):
    """Completions, also with one such text of many, and chats; a text that may fit is tokenized and counted."""
    tokenizer = _gguf_tokenizer(pre="smollm")  # its longest token is <think>

    async def rendered(texts, messages):
        return messages[0].content

    monkeypatch.setattr("disagg.server.texts.Texts._rendered", rendered)
    state, served = app(tokenizer)
    client = TestClient(served)
    longest = 98 * 7
    for path, body, param in (
        ("/v1/completions", {"prompt": "a" * 3_000_000}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "a" * (longest + 1)]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * (longest + 1)}]}, "messages"),
    ):
        error = client.post(path, json=body).json()["error"]
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")
        assert error["message"].startswith(f"{param} has at least ")
        assert error["message"].endswith(" tokens and this server takes 1 to 98.")
    assert state.texts._process._process is None
    counted = client.post("/v1/completions", json={"prompt": "a" * longest}).json()["error"]["message"]
    assert counted == f"prompt has {longest} tokens and this server takes 1 to 98."


def order_of(lengths, later=()):
    """The order in which work has its turn that waits for a first; `later`: (after how many, length)."""

    async def scenario():
        turns, order, tasks = Turns(), [], []

        async def work(length):
            async with turns.turn(length):
                order.append(length)
                for after, other in later:
                    if after == len(order):
                        tasks.append(asyncio.create_task(work(other)))
                await asyncio.sleep(0)
                await asyncio.sleep(0)

        tasks += [asyncio.create_task(work(length)) for length in lengths]
        while waiting := [task for task in tasks if not task.done()]:
            await asyncio.wait(waiting)
        return order

    return asyncio.run(asyncio.wait_for(scenario(), 10))


def test_the_shortest_text_is_next():
    """Whatever came before it and waits; nothing ends what has begun."""
    assert order_of([500, 400, 30, 400, 20]) == [500, 20, 30, 400, 400]


def test_a_long_text_does_not_wait_for_ever():
    """What comes after as much work as its own has begun no longer overtakes it."""
    assert order_of([5, 100], later=[(count, 30) for count in range(1, 9)])[:5] == [5, 30, 30, 30, 100]


@pytest.mark.parametrize("late", [False, True])
def test_who_gives_up_waiting_holds_up_nobody(late):
    """Also when its turn has come at that moment."""

    async def scenario():
        turns = Turns()

        async def work():
            async with turns.turn(1):
                pass

        async with turns.turn(1):
            tasks = [asyncio.create_task(work()) for _ in range(2)]
            await asyncio.sleep(0)
            if not late:
                tasks[0].cancel()
        if late:
            tasks[0].cancel()
        await tasks[1]
        assert tasks[0].cancelled()
        await work()

    asyncio.run(asyncio.wait_for(scenario(), 10))
