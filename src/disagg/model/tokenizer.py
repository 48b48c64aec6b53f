"""Text to token ids and back: from a Hugging Face folder, from a GGUF file, or none at all.

Importing this file is cheap; transformers is imported when a tokenizer is made.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from disagg.errors import ModelError, RequestError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # a folder without any of them has no tokenizer

_SAID = 200  # characters of what a chat template says when it fails
_MOST_TEXTS = 1 << 18  # texts of single tokens that are kept


class Tokenizer(Protocol):
    """What the front end asks of a tokenizer.

    context: how many ids before a token its text can depend on; 0 where text is nothing but the tokens' bytes in a row.
    """

    context: int

    def encode(self, text: str) -> list[int]:
        """Ids of a plain prompt; begins with the model's begin-of-sequence token if it wants one."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens. Bytes that are no UTF-8 become U+FFFD."""
        ...

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a conversation ([{"role": ..., "content": ...}, ...]) up to where the assistant's answer begins.

        Raises RequestError when the model has no chat template or the template refuses the messages.
        """
        ...

    def encode_chat(self, text: str) -> list[int]:
        """Ids of a conversation's text, as `render` makes it."""
        ...

    def template(self) -> str:
        """JSON from which `render` makes the text whose ids `chat` gives. Raises RequestError when there is none."""
        ...

    def portable(self) -> str | None:
        """JSON from which the `tokenizers` library makes the same tokenizer anywhere; None where it cannot."""
        ...


class NoTokenizer:
    """For models that know only token ids, such as `seed`."""

    context = 0

    def __init__(self, model: str) -> None:
        self._model = model

    def encode(self, text: str) -> list[int]:
        """Raise RequestError: there is nothing to encode with."""
        raise RequestError(f"Model {self._model} has no tokenizer: give the prompt as a list of token ids.")

    def decode(self, ids: Sequence[int]) -> str:
        """No text."""
        return ""

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Raise RequestError, as `encode`."""
        return self.encode("")

    def encode_chat(self, text: str) -> list[int]:
        """Raise RequestError, as `encode`."""
        return self.encode(text)

    def template(self) -> str:
        """Raise RequestError, as `encode`."""
        return str(self.encode(""))

    def portable(self) -> str | None:
        """Nothing."""
        return None


class HuggingFaceTokenizer:
    """A tokenizer of the transformers library."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)  # of tokenizers that are not written in Python
        self._text_of = lru_cache(maxsize=_MOST_TEXTS)(lambda token: self._decode([token]))
        self.context = 0 if type(getattr(self._backend, "decoder", None)).__name__ == "ByteLevel" else 6

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return list(self._tokenizer.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return self._text_of(ids[0]) if len(ids) == 1 else self._decode(list(ids))

    def _decode(self, ids: list[int]) -> str:
        if self._backend is not None:  # what transformers comes to as well, in twice the time
            return str(self._backend.decode(ids, skip_special_tokens=True))
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """See Tokenizer."""
        return self.encode_chat(render(self.template(), messages))

    def encode_chat(self, text: str) -> list[int]:
        """See Tokenizer."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def portable(self) -> str | None:
        """See Tokenizer."""
        return None if self._backend is None else str(self._backend.to_str())

    def template(self) -> str:
        """See Tokenizer."""
        if not self._tokenizer.chat_template:
            raise RequestError("This model has no chat template: use plain completions.")
        try:
            chosen = self._tokenizer.get_chat_template()
        except ValueError as error:
            raise RequestError(f"The model's chat template cannot be used: {str(error)[:_SAID]}.") from error
        return json.dumps({"chat_template": chosen, **self._tokenizer.special_tokens_map}, default=str)


def render(template: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of a conversation up to where the assistant's answer begins, all special tokens already in it.

    `template` is what Tokenizer.template gave: a program of strangers, in the transformers library's sandbox. Raises
    RequestError when it refuses the messages.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        asked: Any = {"conversations": [list(messages)], **json.loads(template)}
        return str(render_jinja_template(**asked, add_generation_prompt=True)[0][0])
    except Exception as error:  # a template is a program: it can fail of anything
        raise RequestError(f"The model's chat template refuses these messages: {str(error)[:_SAID]}.") from error


class Detokenizer:
    """Text of a growing list of ids, without ever showing half a character.

    The concatenation of all `push` and the final `flush` is the text that `decode` gives for all ids after `prompt`.
    The prompt's last ids are needed because some vocabularies write a space depending on what stands before.
    """

    _PATIENCE = 16  # ids without a new character before broken bytes are shown as such

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._context = tokenizer.context
        self._ids = list(prompt[max(0, len(prompt) - self._context) :])
        self._shown = len(self._stable(tokenizer.decode(self._ids)))  # of the text of _ids, what is out already
        self._waiting = 0  # ids since the last new character

    def push(self, ids: Sequence[int]) -> str:
        """Add ids and return the text that can no longer change; often empty while a character is incomplete."""
        if not self._ids and not self._context:  # nothing from before matters: of most tokens this is all
            text = self._tokenizer.decode(ids)
            if text and text[-1] != "\ufffd":
                self._waiting = 0
                return text
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        new = self._advance(self._stable(text))
        self._waiting = 0 if new else self._waiting + len(ids)
        if self._waiting >= self._PATIENCE:
            new, self._waiting = self._advance(text), 0
        if self._shown == len(text) and len(self._ids) > 2 * self._context:
            self._ids = self._ids[len(self._ids) - self._context :]
            self._shown = len(self._tokenizer.decode(self._ids)) if self._ids else 0
        return new

    def flush(self) -> str:
        """What was held back: an unfinished character as U+FFFD. Call once, at the end."""
        return self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, safe: str) -> str:
        new = safe[self._shown :]
        self._shown = max(self._shown, len(safe))
        return new

    @staticmethod
    def _stable(text: str) -> str:
        return text.rstrip("\ufffd")


def from_folder(folder: Path, name: str) -> Tokenizer:
    """The tokenizer of a Hugging Face folder; NoTokenizer when it has none. Raises ModelError when it is broken."""
    if not any((folder / file).exists() for file in _FILES):
        return NoTokenizer(name)
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"The tokenizer in {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    return HuggingFaceTokenizer(loaded)


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Pre(NamedTuple):
    """How a byte-level vocabulary cuts text before merging."""

    patterns: tuple[str, ...]  # applied one after the other, each to the pieces of the one before
    nfc: bool = False
    ignore_merges: bool = False  # a piece that is a token is taken whole
    add_bos: bool = False  # unless the file says otherwise


# GGUF carries only a name for it; what the name means is in llama.cpp, src/llama-vocab.cpp
_DIGITS_THEN_GPT2 = _Pre((r"\p{N}", _GPT2))
_LLAMA3 = _Pre((rf"{_WORD}|\p{{N}}{{1,3}}|{_REST}",), ignore_merges=True, add_bos=True)
_QWEN2 = _Pre((rf"{_WORD}|\p{{N}}|{_REST}",), nfc=True)
_PRE = {
    "gpt-2": _Pre((_GPT2,)),
    "smollm": _DIGITS_THEN_GPT2,
    "starcoder": _DIGITS_THEN_GPT2,
    "refact": _DIGITS_THEN_GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _Pre((_TEKKEN,), ignore_merges=True, add_bos=True),
}
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer and chat template that a GGUF file's metadata describe. Raises ModelError for an unknown kind."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    meta = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = meta.get("model")
    if kind not in kinds:
        raise ModelError(f"GGUF tokenizer {kind!r} is not supported: only {' and '.join(kinds)} are.")
    tokenizer, add_bos = kinds[kind](meta)
    tokens = meta["tokens"]
    types = meta.get("token_type", [])
    named = zip(tokens, types, strict=False)
    added = [(token, kind == _CONTROL) for token, kind in named if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token, yes in added if yes])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, yes in added if not yes])
    names = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id"}
    special = {name: tokens[meta[key]] for name, key in names.items() if key in meta}
    if meta.get("add_bos_token", add_bos) and "bos_token" in special:
        _prepend(tokenizer, special["bos_token"])
    return HuggingFaceTokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, chat_template=metadata.get("tokenizer.chat_template"), **special
        )
    )


def _byte_level(meta: Mapping[str, Any]) -> tuple[Any, bool]:
    """GPT-2's byte-level BPE. Returns (tokenizer, whether a prompt begins with BOS by default)."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = _PRE.get(meta.get("pre", "gpt-2"))
    if pre is None:
        raise ModelError(f"GGUF pre-tokenizer {meta['pre']!r} is not supported: only {', '.join(_PRE)} are.")
    vocabulary = {token: index for index, token in enumerate(meta["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in meta["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentencepiece(meta: Mapping[str, Any]) -> tuple[Any, bool]:
    """Llama 2's SentencePiece BPE: merges are every pair that makes a token, best score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens: list[str] = meta["tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    scores = dict(zip(tokens, meta["scores"], strict=True))
    pairs = []
    for token in tokens:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                pairs.append((-scores[token], vocabulary[left], vocabulary[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(pairs)]
    unknown = tokens[meta.get("unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    space: list[Any] = [normalizers.Replace(" ", "\u2581")]
    stripped = []
    if meta.get("add_space_prefix", True):
        space.insert(0, normalizers.Prepend("\u2581"))
        stripped = [decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer = normalizers.Sequence(space)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    return tokenizer, True


def _prepend(tokenizer: Any, bos: str) -> None:
    """Let every plain prompt begin with `bos`."""
    from tokenizers import processors

    bos_id = tokenizer.token_to_id(bos)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )
