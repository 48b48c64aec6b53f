"""One choice of an exchange, in the deployment's thread: its tokens become text, and a stop string ends it."""

from collections.abc import Callable
from typing import NamedTuple

from disagg.cluster.ledger import Update
from disagg.model.tokenizer import Detokenizer, NoTokenizer, Tokenizer
from disagg.record import Record
from disagg.request import FinishReason
from disagg.server.exchange import Ask, Exchange, Piece
from disagg.text import Detokenizes, Numbers, TextStream


def text_of(tokenizer: Tokenizer, ask: Ask) -> TextStream:
    """Where the tokens of a choice become text."""
    detokenizer: Detokenizes = Numbers() if isinstance(tokenizer, NoTokenizer) else Detokenizer(tokenizer, ask.prompt)
    return TextStream(detokenizer, ask.params.stop)


class Choice(NamedTuple):
    """Where the tokens of one request of the Cluster go."""

    exchange: Exchange
    place: int
    text: TextStream
    offsets: bool  # whether they are asked for

    def piece(self, update: Update, stop: Callable[[], Record | None]) -> Piece:
        """News of it. A stop string ends the request, by calling `stop`, with the token that completed it."""
        stream, record = self.text, update.record
        texts: list[str] = []
        offsets: list[int] = []
        for token in update.tokens:
            texts.append(stream.push((token,)))
            if self.offsets:
                offsets.append(stream.begins_at)
            if stream.stopped:
                break
        tokens, logprobs, finish = update.tokens, update.logprobs, ""
        if len(texts) < len(tokens):
            tokens, logprobs = tokens[: len(texts)], logprobs[: len(texts)]
        if record is not None:
            rest = stream.push((), final=True)
            texts = [*texts[:-1], texts[-1] + rest] if texts else [rest]
        elif stream.stopped:
            record = stop()  # when nothing is left that could fail, or its Record would be lost
        if record is not None:
            finish = FinishReason.STOP if stream.stopped else record.finish_reason
        return Piece(self.place, texts, tokens, logprobs, finish, record, offsets)
