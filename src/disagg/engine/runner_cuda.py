"""Steps on a GPU, launched without waiting: tokens stay on the device, decode runs as CUDA graphs.

    host      pack arrays ─▶ one copy ─▶ launch graph or kernels ─▶ launch draw ─▶ copy tokens back ─▶ event
    device    ........................... ids[source] ─▶ model ─▶ logits ─▶ ids[:S] ...................

`ids` holds the tokens of the last step, then the arrays of this one. A request whose last token the host does not know
yet takes it from the first part: `source` says where each decode's token lies. A decode step is padded to the next
captured size. Everything is one stream, so a step starts when the one before has ended, and not before.

On a CPU the same code runs without graphs, for tests.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from disagg.cache.storage import KVStorage
from disagg.engine import draw as plain
from disagg.engine.batch import Batch, Chunk, Output, TokenLogprobs
from disagg.engine.graphs import Graphs, ladder
from disagg.engine.sampler import adjust
from disagg.engine.slots import Slots
from disagg.engine.staging import Place, Staging
from disagg.model.load import Loaded
from disagg.model.ops import Step
from disagg.request import Request, SamplingParams

_SIZES = (1, 24, 48, 80, 112, 160, 224, 320, 448, 640, 896, 1280, 1792, 2560, 3584, 5120, 7168)  # prompts of a warm-up
_BYTES_PER_TOKEN = 24  # token, position, slot
_BYTES_PER_ROW = 160  # all other arrays of a request in a step
_BYTES_PER_PAGE = 12  # an entry of the page table and its place


class _Packed(NamedTuple):
    """Where a step's arrays lie. Those of a decode step depend on its padded size alone."""

    tokens: Place  # int64 [T]
    positions: Place  # int64 [T]
    slots: Place  # int64 [T]
    source: Place  # int64 [D], the decodes' tokens, as indices into `ids`
    rows: Place  # int64 [B], slots of the page table
    context_len: Place  # int32 [B]


class _Choosing(NamedTuple):
    """Where the fields of a Choice lie, in their order, and what else there is to do with the logits."""

    places: list[Place]
    filtered: bool
    adjusts: bool


class _Returning(NamedTuple):
    """Results of a step on their way back: pinned memory, valid once `event` has come."""

    tokens: Tensor  # int64 [max_running]
    event: "torch.cuda.Event | None"


class CudaRunner:
    """Runs batches of one loaded model over one storage, with up to two steps launched and not collected.

    A batch has at most `max_running` requests and `max_batch_tokens` positions, or one whole prompt of `max_len`.
    """

    ahead = True

    def __init__(
        self, loaded: Loaded, storage: KVStorage, *, max_running: int, max_batch_tokens: int, max_len: int
    ) -> None:
        self.spec = loaded.spec
        self.storage = storage
        self._model = loaded.model
        self._device = device = torch.device(loaded.device)
        self._max_running = max_running
        self._max_batch_tokens = max_batch_tokens
        self._max_len = max_len
        max_pages = -(-max_len // storage.page_size)
        self._slots = Slots(2 * max_running, max_pages)
        self._table = torch.zeros((2 * max_running, max_pages), dtype=torch.int32, device=device)
        per_row = _BYTES_PER_ROW + _BYTES_PER_PAGE * max_pages
        num_bytes = _BYTES_PER_TOKEN * (max(max_batch_tokens, max_len) + max_running) + per_row * max_running + 4096
        self._staging = Staging(8 * max_running, num_bytes, device)
        self._ids = self._staging.words()
        self._starts = torch.arange(max_running + 1, dtype=torch.int32, device=device)
        on_gpu = device.type == "cuda"
        self._returning = [
            _Returning(
                torch.zeros(max_running, dtype=torch.int64, pin_memory=on_gpu), torch.cuda.Event() if on_gpu else None
            )
            for _ in range(2)
        ]
        self._turn = 0
        self._row: dict[Request, int] = {}  # of the last step's tokens
        self._graphs = Graphs(ladder(max_running) if on_gpu else [], self._forward_decodes)
        self._draw = _pick_draw(device)

    # A step

    @torch.inference_mode()
    def launch(self, batch: Batch, shed: Callable[[], bool] | None = None) -> Callable[[], Output]:
        """Start the batch and return what waits for its tokens. See `Runs`. Nothing is shed: its steps are short.

        Every request in the batch must hold pages for all its positions up to the last one computed here.
        """
        sampling = batch.sampling()
        size = len(batch.decodes) if batch.chunks else self._graphs.padded(len(batch.decodes))
        requests = [*batch.decodes, *(chunk.request for chunk in batch.chunks)]
        self._staging.begin()
        rows = self._slots.assign(requests)
        packed = self._pack(batch, rows, size)
        choosing = self._pack_choice(sampling, rows, batch)
        last = None if not batch.chunks else self._staging.put(_last_rows(batch))
        starts = None if not batch.chunks else self._staging.put(_starts(batch))
        changed = self._slots.changes()
        places = None if changed is None else [self._staging.put(array) for array in changed]
        self._staging.send()
        if places is not None:
            where, pages = map(self._staging.view, places)
            self._table.view(-1).index_copy_(0, where, pages)
        if last is None or starts is None:
            logits = self._graphs.run(size, packed)[: len(sampling)]
        else:
            logits = self._forward_mixed(batch, packed, self._staging.view(starts), self._staging.view(last))
        return self._finish(logits, sampling, choosing)

    def busy(self) -> bool:
        """See `Runs`."""
        event = self._returning[self._turn].event
        return event is not None and not event.query()

    def _pack(self, batch: Batch, rows: np.ndarray, size: int) -> _Packed:
        """Put the arrays of the positions. Decodes first, padded to `size`; then chunks."""
        decodes, staging, page_size = batch.decodes, self._staging, self.storage.page_size
        total = size + batch.num_chunk_tokens
        tokens, positions = np.zeros(total, np.int64), np.zeros(total, np.int64)
        source, slots = np.zeros(size, np.int64), np.full(total, -1, np.int64)
        context_len = np.zeros(size + len(batch.chunks), np.int32)
        table_rows = np.zeros(size + len(batch.chunks), np.int64)
        count = len(decodes)
        if count:
            table_rows[:count] = rows[:count]
            at = positions[:count]
            at[:] = [request.num_computed - 1 for request in decodes]
            context_len[:count] = at + 1
            known = [r.tokens[p] if p < len(r.tokens) else -1 for r, p in zip(decodes, at.tolist(), strict=True)]
            tokens[:count] = known
            slots[:count] = self._slots.pages[rows[:count], at // page_size] * np.int64(page_size) + at % page_size
        row = size
        for index, (request, start, length, _) in enumerate(batch.chunks):
            end = row + length
            tokens[row:end] = request.tokens[start : start + length]
            positions[row:end] = at = np.arange(start, start + length)
            pages = self._slots.pages[rows[count + index]]
            slots[row:end] = pages[at // page_size] * np.int64(page_size) + at % page_size
            table_rows[size + index], context_len[size + index] = rows[count + index], start + length
            row = end
        first = staging.put(tokens)
        source[:] = np.arange(size) + first.at // 8
        behind = np.flatnonzero(tokens[:count] < 0)
        if behind.size:
            source[behind] = [self._row[decodes[index]] for index in behind.tolist()]
        rest = [staging.put(array) for array in (positions, slots, source, table_rows, context_len)]
        return _Packed(first, *rest)

    def _pack_choice(self, sampling: list[Request], rows: np.ndarray, batch: Batch) -> _Choosing:
        """Put the arrays of a Choice."""
        count = len(batch.decodes)
        wanted = [True] * count + [chunk.samples for chunk in batch.chunks]
        mine, known = rows[wanted] if batch.chunks else rows, self._slots
        indices = np.array([request.num_computed - request.prompt_len for request in sampling], np.int64)
        top_k, top_p, min_p = known.top_k[mine], known.top_p[mine], known.min_p[mine]
        arrays = (known.temperature[mine], plain.uniforms(known.seed[mine], indices), top_k, top_p, min_p)
        filtered = bool(top_k.any() or (top_p < 1).any() or min_p.any())
        return _Choosing([self._staging.put(array) for array in arrays], filtered, bool(known.adjusts[mine].any()))

    def _forward_decodes(self, packed: _Packed) -> Tensor:
        """Logits of a decode step; all it reads stays in its place, so that it can be captured."""
        view = self._staging.view
        size = packed.source.shape[0]
        step = Step(
            tokens=self._ids.index_select(0, view(packed.source)),
            positions=view(packed.positions),
            slots=view(packed.slots),
            query_start=self._starts[: size + 1],
            context_len=view(packed.context_len),
            page_table=self._table.index_select(0, view(packed.rows)),
            last=None,
            max_query_len=1,
            max_context_len=self._max_len,
            num_decodes=size,
        )
        return self._model.forward(step, self.storage.pages)

    def _forward_mixed(self, batch: Batch, packed: _Packed, query_start: Tensor, last: Tensor) -> Tensor:
        """Logits of the rows `last` of a step with chunks."""
        view, count = self._staging.view, len(batch.decodes)
        tokens = view(packed.tokens)
        if count:
            tokens[:count] = self._ids.index_select(0, view(packed.source))
        longest = max(
            max((request.num_computed for request in batch.decodes), default=0),
            max(chunk.start + chunk.length for chunk in batch.chunks),
        )
        width = -(-longest // self.storage.page_size)
        step = Step(
            tokens=tokens,
            positions=view(packed.positions),
            slots=view(packed.slots),
            query_start=query_start,
            context_len=view(packed.context_len),
            page_table=self._table[:, :width].index_select(0, view(packed.rows)),
            last=last,
            max_query_len=max(chunk.length for chunk in batch.chunks),
            max_context_len=longest,
            num_decodes=count,
        )
        return self._model.forward(step, self.storage.pages)

    def _finish(self, logits: Tensor, sampling: list[Request], choosing: _Choosing) -> Callable[[], Output]:
        """Draw, and send the tokens to the host."""
        count = len(sampling)
        drawn = self._ids[:count]
        if count:
            temperature, number, top_k, top_p, min_p = map(self._staging.view, choosing.places)
            choice = plain.Choice(temperature, number, top_k, top_p, min_p, choosing.filtered)
            self._draw(adjust(logits, sampling) if choosing.adjusts else logits, choice, drawn)
        self._row = {request: row for row, request in enumerate(sampling)}
        self._turn ^= 1
        returning = self._returning[self._turn]
        returning.tokens[:count].copy_(drawn, non_blocking=True)
        asked = {
            row: _logprobs(logits[row], drawn[row : row + 1], request.params.logprobs)
            for row, request in enumerate(sampling)
            if request.params.logprobs is not None
        }
        if returning.event is not None:
            returning.event.record()
        return partial(_collect, returning, count, asked)

    # Before serving

    def warm_up(self, sizes: Sequence[int] | None = None) -> None:
        """Compile and allocate all that steps need, and capture the decode graphs of `sizes` (None: all of them).

        Runs the largest step there can be. Scribbles on the first page: call it before serving.
        """
        length = min(self._max_len - 1, self._max_batch_tokens)
        count = min(self._max_running, self._max_batch_tokens // length)
        held = [0] * (-(-self._max_len // self.storage.page_size))
        kinds = (SamplingParams(temperature=0), SamplingParams(top_p=0.9, top_k=8, min_p=0.01), SamplingParams())
        requests = [
            Request(
                f"warm-up {n}", length, [0] * length, kinds[n % 3], frozenset(), 0.0, num_computed=length, pages=held
            )
            for n in range(max(count, len(kinds)))
        ]
        self.launch(Batch(chunks=[Chunk(request, 0, length, True) for request in requests[:count]]))()
        for rows in _SIZES:  # the library of products loads its kernels one by one, each for some sizes
            self.launch(Batch(chunks=[Chunk(requests[0], 0, min(rows, length), True)]))()
        for request in requests:
            request.tokens.append(0)
            request.num_computed = length + 1
        for size in reversed(self._graphs.sizes):
            if sizes is None or size in sizes:
                self._capture(size)
        beside = min(2, length)  # a chunk of one position would be one more decode to the kernels
        for kind in range(len(kinds)):
            self.launch(Batch(decodes=requests[kind : kind + 1]))()
            self.launch(Batch(requests[kind : kind + 1], [Chunk(requests[kind - 1], 0, beside, False)]))()
        if sizes is None:
            self._run_beside(requests, Chunk(requests[1], 0, beside, False), held)
        self._row.clear()

    def _run_beside(self, requests: list[Request], chunk: Chunk, held: list[int]) -> None:
        """Decodes beside a chunk run other kernels for other numbers and lengths of them: one step for each."""

        def decode(name: str, num_computed: int) -> Request:
            tokens = [0] * num_computed
            return Request(
                name, 1, tokens, SamplingParams(temperature=0), frozenset(), 0.0, num_computed=num_computed, pages=held
            )

        for length in itertools.takewhile(lambda length: length <= self._max_len, (32 << n for n in range(6))):
            self.launch(Batch([decode(f"warm-up of {length}", length)], [chunk]))()
        short = [decode(f"warm-up short {n}", 2) for n in range(self._max_running)]
        for size in ladder(self._max_running - 1) if self._max_running > 1 else []:
            self.launch(Batch([requests[0], *short[: size - 1]], [chunk]))()

    @torch.inference_mode()
    def _capture(self, size: int) -> None:
        """With inputs of nobody: padding only."""
        self._staging.begin()
        packed = self._pack(Batch(), np.zeros(0, np.int64), size)
        self._staging.send()
        self._graphs.capture(size, packed)


def _collect(returning: _Returning, count: int, asked: dict[int, tuple[Tensor, Tensor]]) -> Output:
    """Wait for a step's results."""
    if returning.event is not None:
        returning.event.synchronize()
    logprobs: list[TokenLogprobs | None] = [None] * count
    for row, (values, ids) in asked.items():
        chosen, *top = values.tolist()
        logprobs[row] = TokenLogprobs(chosen, list(zip(ids.tolist(), top, strict=True)))
    return Output(returning.tokens[:count].tolist(), logprobs)


def _logprobs(logits: Tensor, token: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """On their way to the host: log-probabilities of the chosen and of the `count` likeliest tokens; those tokens."""
    logprobs = logits.log_softmax(dim=-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return _to_host(torch.cat([logprobs.gather(0, token), values])), _to_host(ids)


def _to_host(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)


def _last_rows(batch: Batch) -> np.ndarray:
    """int64 [S]: the rows that sample."""
    ends = len(batch.decodes) + np.cumsum([chunk.length for chunk in batch.chunks])
    wanted = [end - 1 for end, chunk in zip(ends.tolist(), batch.chunks, strict=True) if chunk.samples]
    return np.array([*range(len(batch.decodes)), *wanted], np.int64)


def _starts(batch: Batch) -> np.ndarray:
    """int32 [B + 1]: the first row of each request, then their number."""
    return np.cumsum([0, *[1] * len(batch.decodes), *(chunk.length for chunk in batch.chunks)], dtype=np.int32)


def _pick_draw(device: torch.device) -> Callable[[Tensor, plain.Choice, Tensor], None]:
    if device.type != "cuda":
        return plain.draw
    from disagg.engine.sampler_cuda import draw

    return draw
