"""How fast prompts are computed and handed over: running averages of what Records say.

An average is a ratio of sums, tokens over seconds, in which every Record weighs a little less than the next. Only
Records of one attempt that ended well count: the others' times are those of faults.
"""

from dataclasses import dataclass

from disagg.record import Record

_KEPT = 0.95  # weight of the past when a Record comes: the last twenty or so decide
_STALE = 64  # decisions


@dataclass(slots=True)
class _Rate:
    """Tokens per second, None before the first observation."""

    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        self.tokens = _KEPT * self.tokens + tokens
        self.seconds = _KEPT * self.seconds + seconds

    @property
    def value(self) -> float | None:
        return self.tokens / self.seconds if self.seconds > 0 else None


class Speeds:
    """The averages of one deployment, by worker (name.epoch) where it matters."""

    def __init__(self) -> None:
        self._all = _Rate()
        self._prefill: dict[str, _Rate] = {}
        self._handoff = _Rate()
        self._asked = 0  # how often the hand-off's rate was asked for since the last one

    def observe(self, record: Record) -> None:
        """Take in a request that is over."""
        if not record.ok or record.num_attempts > 1:
            return
        chunks = [span for span in record.spans if span.kind == "prefill"]
        workers = {span.worker for span in chunks}
        if len(workers) == 1:  # else the time it took cannot be told apart
            num_tokens = sum(span.amount for span in chunks)
            for rate in (self._all, self._prefill.setdefault(workers.pop(), _Rate())):
                rate.add(num_tokens, record.prefill_busy_s)
        parts = record.e2e_parts()
        if parts is not None and record.handoff_end_at is not None:
            self._handoff.add(record.prompt_len, parts["handoff_wait"] + parts["handoff_copy"] + parts["admission"])
            self._asked = 0

    def forget(self, worker: str) -> None:
        """It is gone; its successor starts with the average of all."""
        self._prefill.pop(worker, None)

    def prefill_rate(self, worker: str) -> float | None:
        """Prompt tokens/s of step time; of all workers where nothing is known of this one, None if of none."""
        own = self._prefill.get(worker)
        return own.value if own is not None and own.value is not None else self._all.value

    def handoff_rate(self) -> float | None:
        """Prompt tokens/s by what hand-offs delayed their requests: wait, copy and admission after the prefill's end.

        What is copied while the prompt is still computed delays nothing and is not in it. None when nothing is known,
        and once in 64 questions without a new hand-off: an average that keeps everybody from handing over would
        otherwise never be mended.
        """
        self._asked += 1
        return self._handoff.value if self._asked % _STALE else None
