"""Steps on a GPU, launched without waiting: tokens stay on the device, small steps run as CUDA graphs.

    host      pack arrays ─▶ one copy ─▶ launch graph or kernels ─▶ launch draw ─▶ copy tokens back ─▶ event
    device    ........................... ids[source] ─▶ model ─▶ logits ─▶ ids[:S] ...................

`ids` holds the tokens of the last step, then the arrays of this one. A request whose last token the host does not know
yet takes it from the first part: `source` says where each row's token lies. Steps of decodes, and those with a few
short chunks, are padded to the next shape that has a graph; kernel by kernel they would take the host longer than the
device. Of the others, only what kernels are compiled for is padded. Everything is one stream, so a step starts when the
one before has ended, and not before.

On a CPU the same code runs without padding and without graphs, for tests.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from disagg.cache.storage import KVStorage
from disagg.engine import draw as plain
from disagg.engine.batch import Batch, Chunk, Output, TokenLogprobs
from disagg.engine.graphs import MOST_CHUNKS, MOST_ROWS, Graphs, Shape, Shapes
from disagg.engine.packing import BYTES_PER_PAGE, BYTES_PER_POSITION, BYTES_PER_REQUEST, Choosing, Packed, Packer
from disagg.engine.sampler import adjust
from disagg.engine.slots import Slots
from disagg.engine.staging import Staging
from disagg.model.load import Loaded
from disagg.model.ops import Step
from disagg.request import Request, SamplingParams

_EVERY = 256  # rows from one step of a warm-up to the next, beyond those that are padded


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
        num_bytes = BYTES_PER_POSITION * (max(max_batch_tokens, max_len) + max_running) + 4096
        num_bytes += (BYTES_PER_REQUEST + BYTES_PER_PAGE * max_pages) * (max_running + MOST_CHUNKS)
        self._staging = Staging(8 * max_running, num_bytes, device)
        self._ids = self._staging.words()
        self._packer = Packer(self._staging, self._slots, storage.page_size)
        on_gpu = device.type == "cuda"
        self._shapes = Shapes(max_running, max_batch_tokens) if on_gpu else None
        self._returning = [
            _Returning(
                torch.zeros(max_running, dtype=torch.int64, pin_memory=on_gpu), torch.cuda.Event() if on_gpu else None
            )
            for _ in range(2)
        ]
        self._turn = 0
        self._row: dict[Request, int] = {}  # of the last step's tokens
        self._graphs = Graphs(self._forward)
        self._draw = _pick_draw(device)

    # A step

    def launch(self, batch: Batch, shed: Callable[[], bool] | None = None) -> Callable[[], Output]:
        """Start the batch and return what waits for its tokens. See `Runs`. Nothing is shed: its steps are short.

        Every request in the batch must hold pages for all its positions up to the last one computed here.
        """
        return self._launch(batch, self._shape(batch))

    def _shape(self, batch: Batch) -> Shape:
        """What the batch is run as, whether there is a graph for it or not: the same bits with and without."""
        decodes, chunks, rows = len(batch.decodes), len(batch.chunks), batch.num_tokens
        if self._shapes:
            return self._shapes.of(decodes, chunks, rows)
        return Shape(rows, decodes, chunks, decodes + sum(chunk.samples for chunk in batch.chunks))

    @torch.inference_mode()
    def _launch(self, batch: Batch, shape: Shape) -> Callable[[], Output]:
        """An empty batch, in any shape, is a whole forward pass of padding: it writes nothing and yields no token."""
        sampling = batch.sampling()
        self._staging.begin()
        table_rows = self._slots.assign([*batch.decodes, *(chunk.request for chunk in batch.chunks)])
        packed = self._packer.put(batch, table_rows, shape, self._row)
        choosing = self._packer.put_choice(batch, table_rows)
        changed = self._slots.changes()
        places = None if changed is None else [self._staging.put(array) for array in changed]
        self._staging.send()
        if places is not None:
            where, pages = map(self._staging.view, places)
            self._table.view(-1).index_copy_(0, where, pages)
        logits = self._graphs.run(shape, packed)[: len(sampling)]
        return self._finish(logits, sampling, choosing)

    def busy(self) -> bool:
        """See `Runs`."""
        event = self._returning[self._turn].event
        return event is not None and not event.query()

    def _forward(self, packed: Packed) -> Tensor:
        """Logits of a step. All it reads stays in its place, and all else follows from its shape: it can be captured.

        So the host says nothing of how long contexts are, and kernels are those for the longest there may be.
        """
        view = self._staging.view
        step = Step(
            tokens=self._ids.index_select(0, view(packed.source)),
            positions=view(packed.positions),
            slots=view(packed.slots),
            query_start=view(packed.query_start),
            context_len=view(packed.context_len),
            page_table=self._table.index_select(0, view(packed.table_rows)),
            last=view(packed.last) if packed.shape.chunks else None,
            max_query_len=0 if packed.shape.chunks else 1,
            max_context_len=self._max_len,
            num_decodes=packed.shape.decodes,
        )
        return self._model.forward(step, self.storage.pages)

    def _finish(self, logits: Tensor, sampling: list[Request], choosing: Choosing) -> Callable[[], Output]:
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
        """Compile and allocate all that steps need, and capture the graphs of `sizes` rows (None: all of them).

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
        if self._shapes:
            self._run_shapes(self._shapes, sizes)
        for request in requests:
            request.tokens.append(0)
            request.num_computed = length + 1
        for kind in range(len(kinds)):
            self.launch(Batch(decodes=requests[kind : kind + 1]))()
            self.launch(Batch(requests[kind : kind + 1], [Chunk(requests[kind - 1], 0, 1, False)]))()
        self._row.clear()

    def _run_shapes(self, shapes: Shapes, sizes: Sequence[int] | None) -> None:
        """Steps of nobody: whatever kernel a shape needs is compiled, or loaded by the library of products.

        Rows that are not padded come in all numbers; that library's kernels are for some of them each.
        """
        for rows in range(MOST_ROWS + _EVERY // 2, self._max_batch_tokens, _EVERY):
            self._launch(Batch(), shapes.of(0, 1, rows))()
        for shape in shapes.all():
            if sizes is None or shape.rows in sizes:
                self._capture(shape)
            else:
                self._launch(Batch(), shape)()
        most = min(self._max_running, self._max_batch_tokens)
        # The largest step, without a graph. Last, because a capture begins by giving back all memory that torch keeps
        # for later: the first long prompt would have to wait for cudaMalloc.
        self._launch(Batch(), shapes.of(most, MOST_CHUNKS + 1, self._max_batch_tokens))()

    @torch.inference_mode()
    def _capture(self, shape: Shape) -> None:
        """With inputs of nobody: padding only."""
        self._staging.begin()
        packed = self._packer.put(Batch(), self._slots.assign([]), shape, {})
        self._staging.send()
        self._graphs.capture(shape, packed)


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


def _pick_draw(device: torch.device) -> Callable[[Tensor, plain.Choice, Tensor], None]:
    if device.type != "cuda":
        return plain.draw
    from disagg.engine.sampler_cuda import draw

    return draw
