"""What clients get: completions and chat completions, whole or as server-sent events, in the OpenAI API's form.

Every token is an event of its own. What stays the same in all events of a choice is encoded once, and the events of all
tokens that are there are joined in one go.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import msgspec

from disagg.engine.batch import TokenLogprobs
from disagg.model.tokenizer import NoTokenizer, Tokenizer
from disagg.server.exchange import Piece
from disagg.server.problems import Problem

DONE = b"data: [DONE]\n\n"
_BROKEN = "\ufffd"  # stands for bytes that are no whole character
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Form:
    """What an answer looks like, decided by its request. Choice number i belongs to prompt number i // n."""

    chat: bool
    model: str
    prompt_lens: Sequence[int]
    n: int
    logprobs: bool = False
    token_ids: bool = False
    usage: bool = False  # in a last event
    usage_so_far: bool = False  # in every event


class TokenNames:
    """Tokens as clients see them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._wordless = isinstance(tokenizer, NoTokenizer)
        self._decode = lru_cache(maxsize=1 << 16)(lambda token: tokenizer.decode((token,)))

    def text(self, token: int) -> str | None:
        """Its text; None for one that is no whole text by itself: a part of a character, a special token."""
        text = "" if self._wordless else self._decode(token)
        return None if not text or _BROKEN in text else text

    def name(self, token: int) -> str:
        """Its text, or `token_id:7` where it has none."""
        text = self.text(token)
        return f"token_id:{token}" if text is None else text

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        """One token in the chat API's form."""
        text = self.text(token)
        return {"token": self.name(token), "logprob": logprob, "bytes": None if text is None else list(text.encode())}


@dataclass(slots=True)
class Usage:
    """Counts tokens of all choices; the tokens of a prompt count once, however many choices it has."""

    form: Form
    completion: int = 0
    cached: dict[int, int] = field(default_factory=dict)  # by prompt

    def add(self, piece: Piece) -> None:
        """Count a piece."""
        self.completion += len(piece.tokens)
        self.end(piece)

    def end(self, piece: Piece) -> None:
        """Count what is known at a choice's end."""
        if piece.record is not None:
            prompt = piece.choice // self.form.n
            self.cached[prompt] = max(self.cached.get(prompt, 0), min(piece.record.num_cached, piece.record.prompt_len))

    def body(self) -> dict[str, Any]:
        """The usage object."""
        prompt = sum(self.form.prompt_lens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion,
            "total_tokens": prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


class Events:
    """Pieces as server-sent events. `request_id` is the first choice's in the Cluster, which Records carry too."""

    def __init__(self, form: Form, request_id: str, names: TokenNames) -> None:
        self._form = form
        self._names = names
        self._usage = Usage(form)
        self._begun: set[int] = set()
        envelope = _envelope(form, request_id, "chat.completion.chunk" if form.chat else "text_completion")
        self._start = b"data: " + _encode(envelope)[:-1] + b',"choices":['
        text = b',"delta":{"content":' if form.chat else b',"text":'
        num_choices = form.n * len(form.prompt_lens)
        self._heads = [self._start + b'{"index":%d' % index + text for index in range(num_choices)]
        self._close = b"}" if form.chat else b""  # of the delta
        self._end = b"]%b}\n\n" % (b',"usage":null' if form.usage else b"")
        self._tail = self._close + b',"logprobs":null,"finish_reason":null}' + self._end
        self._plain = not (form.logprobs or form.token_ids or form.usage_so_far)

    def events(self, pieces: Sequence[Piece]) -> bytes:
        """An event for every token of these pieces."""
        parts: list[bytes] = []
        for piece in pieces:
            if self._plain and not piece.finish and piece.choice in self._begun:
                self._usage.completion += len(piece.tokens)
                for text in piece.texts:
                    parts += (self._heads[piece.choice], _encode(text), self._tail)
            else:
                self._usage.end(piece)
                parts += [self._full(piece, place) for place in range(len(piece.texts))]
        return b"".join(parts)

    def last(self) -> bytes:
        """What ends the stream."""
        if not self._form.usage:
            return DONE
        return self._start + b'],"usage":' + _encode(self._usage.body()) + b"}\n\n" + DONE

    def _full(self, piece: Piece, place: int) -> bytes:
        """The event of one of a piece's tokens, with everything that is asked for."""
        form, head, one = self._form, self._heads[piece.choice], slice(place, place + 1)
        self._usage.completion += len(piece.tokens[one])
        if form.chat and piece.choice not in self._begun:
            head = head.replace(b'"delta":{', b'"delta":{"role":"assistant",')
        self._begun.add(piece.choice)
        logprobs = None
        if form.logprobs:
            known = piece.tokens[one], piece.logprobs[one], piece.offsets[one]
            logprobs = _logprobs(form.chat, *known, self._names)
        is_last = place + 1 == len(piece.texts)
        rest: dict[str, Any] = {"logprobs": logprobs, "finish_reason": piece.finish or None if is_last else None}
        if form.token_ids:
            rest["token_ids"] = piece.tokens[one]
        end = b'],"usage":' + _encode(self._usage.body()) + b"}\n\n" if form.usage_so_far else self._end
        return head + _encode(piece.texts[place]) + self._close + b"," + _encode(rest)[1:] + end


class Whole:
    """Pieces as one answer."""

    def __init__(self, form: Form, names: TokenNames) -> None:
        self._form = form
        self._names = names
        self._usage = Usage(form)
        self._choices = [_Choice() for _ in range(form.n * len(form.prompt_lens))]

    def add(self, piece: Piece) -> None:
        """Take a piece."""
        self._usage.add(piece)
        choice = self._choices[piece.choice]
        choice.text += "".join(piece.texts)
        choice.tokens += piece.tokens
        choice.logprobs += piece.logprobs
        choice.offsets += piece.offsets
        choice.finish = piece.finish

    def body(self, request_id: str) -> dict[str, Any]:
        """The answer."""
        form = self._form
        envelope = _envelope(form, request_id, "chat.completion" if form.chat else "text_completion")
        choices = [self._choice(index, choice) for index, choice in enumerate(self._choices)]
        return {**envelope, "choices": choices, "usage": self._usage.body()}

    def _choice(self, index: int, choice: "_Choice") -> dict[str, Any]:
        form, logprobs = self._form, None
        if form.logprobs:
            logprobs = _logprobs(form.chat, choice.tokens, choice.logprobs, choice.offsets, self._names)
        content = (
            {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
            if form.chat
            else {"text": choice.text}
        )
        ids = {"token_ids": choice.tokens} if form.token_ids else {}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": choice.finish, **ids}


@dataclass(slots=True)
class _Choice:
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish: str = ""


def failure(problem: Problem) -> bytes:
    """The last event of a stream that failed after it had begun."""
    return b"data: " + _encode(problem.body()) + b"\n\n"


def _envelope(form: Form, request_id: str, kind: str) -> dict[str, Any]:
    name = f"{'chatcmpl' if form.chat else 'cmpl'}-{request_id}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": form.model}


def _logprobs(
    chat: bool,
    tokens: Sequence[int],
    values: Sequence[TokenLogprobs | None],
    offsets: Sequence[int],
    names: TokenNames,
) -> dict[str, Any]:
    """The logprobs object of these tokens, each with where in the text it begins."""
    known = [
        (token, value, offset)
        for token, value, offset in zip(tokens, values, offsets, strict=True)
        if value is not None
    ]
    if chat:
        content = [
            {**names.entry(token, value.chosen), "top_logprobs": [names.entry(*each) for each in value.top]}
            for token, value, _ in known
        ]
        return {"content": content, "refusal": None}
    return {
        "tokens": [names.name(token) for token, _, _ in known],
        "token_logprobs": [value.chosen for _, value, _ in known],
        "top_logprobs": [_top(token, value, names) for token, value, _ in known],
        "text_offset": [offset for _, _, offset in known],
    }


def _top(token: int, value: TokenLogprobs, names: TokenNames) -> dict[str, float]:
    """The likeliest tokens and the chosen one, by name, as the OpenAI API has it: up to one more than asked for."""
    top: dict[str, float] = {}
    for one, logprob in (*value.top, (token, value.chosen)):
        top.setdefault(names.name(one), logprob)  # of tokens with the same text the likeliest
    return top
