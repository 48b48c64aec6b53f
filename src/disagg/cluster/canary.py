"""One fixed prompt, handed over and not: the greedy tokens must be the same, or this deployment must not serve.

Wrong pages give fluent nonsense while every health check is green. So every pair of workers that could hand over a
request does it once, and is compared with the prefill worker doing all of it.

On GPUs two workers may round differently (the order of a sum depends on the kernel chosen and on the batch), and two
tokens that are all but equally likely then fall either way. There the first difference is forgiven when it is such a
near tie; what follows it is another text, and is not compared.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from disagg.clock import WallClock
from disagg.cluster.router import Route
from disagg.engine.batch import TokenLogprobs
from disagg.errors import DisaggError
from disagg.record import Record
from disagg.request import SamplingParams

if TYPE_CHECKING:
    from disagg.cluster.cluster import Cluster

_PROMPT_LEN = 53  # several pages and a part of one, whatever the page size
_MAX_TOKENS = 12
_LIMIT_S = 120.0
_NEAR_TIE = 0.25  # nats: far above what bf16 rounding makes of a logit, far below what wrong pages do
_TOP = 5  # tokens looked at for a near tie


class _Song(NamedTuple):
    """What one route made of the prompt. Log-probabilities only on GPUs."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    error: str


class Sung(NamedTuple):
    """What a pair of workers made of the prompt."""

    prefill: str
    decode: str
    tokens: list[int]
    expected: list[int]
    error: str  # of the request, if it failed
    near_tie: bool = False  # where they part first, if they do

    @property
    def agrees(self) -> bool:
        """Whether hand-off and colocated computation gave the same tokens, up to a near tie."""
        return not self.error and (self.tokens == self.expected or self.near_tie)


def run(cluster: "Cluster", waiting: Callable[[], None] = lambda: None) -> list[Sung]:
    """Every pair of a prefill and a decode worker, or each worker alone where nothing is handed over.

    Nothing else may be outstanding. `waiting` is called at every turn, and may raise to end it. Colocated runs come
    first, so that a prefix cache holds what a worker computed itself, and not what it was given.
    """
    workers = cluster.workers()
    readers = [worker.name for worker in workers if worker.role != "decode"]
    writers = [worker.name for worker in workers if worker.role == "decode"]
    alone = _sing(cluster, [Route(name, name) for name in readers], waiting)
    if not writers:
        return [_judge(name, name, song, alone[0]) for name, song in zip(readers, alone, strict=True)]
    pairs = [(reader, writer) for reader in range(len(readers)) for writer in writers]
    apart = _sing(cluster, [Route(readers[reader], writer) for reader, writer in pairs], waiting)
    return [
        _judge(readers[reader], writer, song, alone[reader])
        for (reader, writer), song in zip(pairs, apart, strict=True)
    ]


def _judge(prefill: str, decode: str, song: _Song, expected: _Song) -> Sung:
    tie = False
    for mine, theirs, known in zip(song.tokens, expected.tokens, expected.logprobs, strict=False):
        if mine != theirs:
            tie = known is not None and any(one == mine and known.chosen - p <= _NEAR_TIE for one, p in known.top)
            break
    return Sung(prefill, decode, song.tokens, expected.tokens, expected.error or song.error, tie)


def require(cluster: "Cluster", waiting: Callable[[], None] = lambda: None) -> None:
    """Raise DisaggError unless every pair agrees. `waiting`: see `run`."""
    for sung in run(cluster, waiting):
        if not sung.agrees:
            raise DisaggError(complaint(sung))


def complaint(sung: Sung) -> str:
    """What is wrong, as a sentence."""
    if sung.error:
        return f"The canary failed on {sung.prefill} and {sung.decode}: {sung.error}"
    same = next((i for i, (a, b) in enumerate(zip(sung.tokens, sung.expected, strict=False)) if a != b), 0)
    moved, other = f"handed from {sung.prefill} to {sung.decode}", f"{sung.prefill} alone"
    if sung.prefill == sung.decode:
        moved, other = f"run on {sung.prefill}", "another worker"
    return (
        f"The canary died: a prompt {moved} gives other tokens than on {other}, from token {same} on; "
        "not serving wrong answers."
    )


def _sing(cluster: "Cluster", routes: list[Route], waiting: Callable[[], None]) -> list[_Song]:
    """What the canary's prompt becomes on each route."""
    vocab_size, max_len = cluster.info.spec.vocab_size, cluster.engine.max_len
    assert max_len is not None
    room = min(max_len, cluster.num_pages * cluster.engine.page_size)
    num_output = min(_MAX_TOKENS, room // 2)
    prompt = [(7 + 31 * i) % vocab_size for i in range(min(_PROMPT_LEN, room - num_output))]
    logprobs = _TOP if cluster.deployment.budget.kind == "cuda" else None
    params = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True, logprobs=logprobs)
    ids = [cluster.submit(prompt, params, route=route) for route in routes]
    records: dict[str, Record] = {}
    known: dict[str, list[TokenLogprobs | None]] = {one: [] for one in ids}
    clock = WallClock()
    until = clock.now() + _LIMIT_S
    while len(records) < len(ids):
        waiting()
        if clock.now() > until:
            raise DisaggError(f"The canary did not end within {_LIMIT_S:g} s.")
        for update in cluster.poll(0.5):
            known[update.request_id] += update.logprobs
            if update.record is not None:
                records[update.request_id] = update.record
    return [_Song(records[one].tokens, known[one], records[one].error) for one in ids]
