"""One fixed prompt, handed over and not: the greedy tokens must be the same, or this deployment must not serve.

Wrong pages give fluent nonsense while every health check is green. So every pair of workers that could hand over a
request does it once, and is compared with the prefill worker doing all of it.
"""

from typing import TYPE_CHECKING, NamedTuple

from disagg.clock import WallClock
from disagg.cluster.router import Route
from disagg.errors import DisaggError
from disagg.record import Record
from disagg.request import SamplingParams

if TYPE_CHECKING:
    from disagg.cluster.cluster import Cluster

_PROMPT_LEN = 53  # several pages and a part of one, whatever the page size
_MAX_TOKENS = 12
_LIMIT_S = 120.0


class Sung(NamedTuple):
    """What a pair of workers made of the prompt."""

    prefill: str
    decode: str
    tokens: list[int]
    expected: list[int]
    error: str  # of the request, if it failed

    @property
    def agrees(self) -> bool:
        """Whether hand-off and colocated computation gave the same tokens."""
        return not self.error and self.tokens == self.expected


def run(cluster: "Cluster") -> list[Sung]:
    """Every pair of a prefill and a decode worker, or each worker alone where nothing is handed over.

    Nothing else may be outstanding. Colocated runs come first, so that a prefix cache holds what a worker computed
    itself, and not what it was given.
    """
    workers = cluster.workers()
    readers = [worker.name for worker in workers if worker.role != "decode"]
    writers = [worker.name for worker in workers if worker.role == "decode"]
    alone = _tokens(cluster, [Route(name, name) for name in readers])
    if not writers:
        first, _ = alone[0]
        return [Sung(name, name, tokens, first, error) for name, (tokens, error) in zip(readers, alone, strict=True)]
    pairs = [(reader, writer) for reader in range(len(readers)) for writer in writers]
    apart = _tokens(cluster, [Route(readers[reader], writer) for reader, writer in pairs])
    return [
        Sung(readers[reader], writer, tokens, alone[reader][0], alone[reader][1] or error)
        for (reader, writer), (tokens, error) in zip(pairs, apart, strict=True)
    ]


def require(cluster: "Cluster") -> None:
    """Raise DisaggError unless every pair agrees."""
    for sung in run(cluster):
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


def _tokens(cluster: "Cluster", routes: list[Route]) -> list[tuple[list[int], str]]:
    """Tokens, and the error if there is one, of the canary's prompt on each route."""
    vocab_size, max_len = cluster.info.spec.vocab_size, cluster.engine.max_len
    assert max_len is not None
    room = min(max_len, cluster.num_pages * cluster.engine.page_size)
    num_output = min(_MAX_TOKENS, room // 2)
    prompt = [(7 + 31 * i) % vocab_size for i in range(min(_PROMPT_LEN, room - num_output))]
    params = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True)
    ids = [cluster.submit(prompt, params, route=route) for route in routes]
    records: dict[str, Record] = {}
    clock = WallClock()
    until = clock.now() + _LIMIT_S
    while len(records) < len(ids):
        if clock.now() > until:
            raise DisaggError(f"The canary did not end within {_LIMIT_S:g} s.")
        for update in cluster.poll(0.5):
            if update.record is not None:
                records[update.request_id] = update.record
    return [(records[one].tokens, records[one].error) for one in ids]
