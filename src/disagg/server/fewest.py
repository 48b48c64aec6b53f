"""The fewest tokens that a text can have, told from its length: what cannot fit is refused before it is tokenized.

Of n tokens none stands for more than the longest of the vocabulary does, so a text longer than n times that has more.
This holds where every piece of a text becomes tokens. It does not where a token may stand for any length: an unknown
word of WordLevel or WordPiece, unknown characters in a row, white space around an added token, or what a normalizer or
a cut takes out. Such tokenizers have no Measure. Byte-level ones often lack some bytes, which then become no token at
all: those are not counted.
"""

from typing import Any, NamedTuple

import msgspec

_SHOWN = {*range(33, 127), *range(161, 173), *range(174, 256)}  # bytes that stand for themselves, as in GPT-2
_HIDDEN = [byte for byte in range(256) if byte not in _SHOWN]
_LETTERS = [chr(byte) if byte in _SHOWN else chr(256 + _HIDDEN.index(byte)) for byte in range(256)]
_NEVER = {0xC0, 0xC1, *range(0xF5, 256)}  # in no UTF-8
_MOST_COMPOSED = 4  # characters that one of NFC stands for (Unicode Standard Annex 15)


class Measure(NamedTuple):
    """How much text one token may be. `dropped`: bytes that become no token; None: characters are counted."""

    longest: int
    dropped: bytes | None

    def fewest(self, text: str) -> int:
        """No tokenization of this text has fewer tokens."""
        size = len(text) if self.dropped is None else len(text.encode().translate(None, self.dropped))
        return -(-size // self.longest)


class _Added(msgspec.Struct):
    content: str
    id: int
    special: bool
    normalized: bool
    lstrip: bool
    rstrip: bool


class _Model(msgspec.Struct):
    type: str
    vocab: Any
    unk_token: str | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


class Portable(msgspec.Struct):
    """What is of interest in the JSON of a tokenizer of the `tokenizers` library; merges are not read."""

    model: _Model
    added_tokens: list[_Added]
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None

    def special_ids(self) -> frozenset[int]:
        """Tokens that are no text, such as the end of a sequence."""
        return frozenset(added.id for added in self.added_tokens if added.special)

    def measure(self) -> Measure | None:
        """The longest token; None where nothing of the kind holds."""
        model, normalizers, cuts = self.model, _steps(self.normalizer), _steps(self.pre_tokenizer)
        if model.type != "BPE" or model.continuing_subword_prefix or model.end_of_word_suffix:
            return None
        if any(added.lstrip or added.rstrip or (added.normalized and normalizers) for added in self.added_tokens):
            return None
        merged = [_merges(step) for step in normalizers]
        if not all(merged) or not all(map(_keeps, cuts)):
            return None
        longest = max([*map(len, model.vocab), *(len(added.content.encode()) for added in self.added_tokens), 1])
        byte_level = any(step["type"] == "ByteLevel" for step in cuts)
        unknown = {byte for byte, letter in enumerate(_LETTERS) if letter not in model.vocab}
        if byte_level and not normalizers:
            return Measure(longest, bytes(sorted(unknown)))
        if unknown - _NEVER if byte_level else not _knows_all(model):
            return None
        for count in merged:
            longest *= count
        return Measure(longest, None)


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as one list."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [one for inner in step.get("normalizers") or step.get("pretokenizers") or () for one in _steps(inner)]


def _merges(normalizer: dict[str, Any]) -> int:
    """How many characters may become one; 0: any number, or it is not known."""
    kind = normalizer["type"]
    if kind == "Replace":
        return int(len(normalizer["pattern"].get("String", "")) == len(normalizer["content"]) > 0)
    return {"NFC": _MOST_COMPOSED, "Prepend": 1}.get(kind, 0)


def _keeps(cut: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer only cuts, and takes nothing out."""
    return cut["type"] in ("ByteLevel", "Digits", "Metaspace") or (
        cut["type"] == "Split" and cut["behavior"] != "Removed"
    )


def _knows_all(model: _Model) -> bool:
    """Whether each character that is not in the vocabulary is tokens of its own: of its bytes, or the unknown one."""
    if model.byte_fallback and all(f"<0x{byte:02X}>" in model.vocab for byte in range(256)):
        return True
    return model.unk_token in model.vocab and not model.fuse_unk
