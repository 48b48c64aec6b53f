"""One step on the device: a Batch becomes arrays, the model runs, tokens come back."""

from collections.abc import Callable
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from disagg.cache.storage import KVStorage
from disagg.engine.batch import Batch, Chunk, Output
from disagg.engine.sampler import sample
from disagg.model.load import Loaded
from disagg.model.ops import Step
from disagg.request import Request, SamplingParams

_LONG = 2e9  # multiply-adds of a step: 70 ms of a core. Shorter ones run as one call, which asks nobody
_DECODE_SLOWDOWN = 8  # a decode's attention waits for memory: so many times as long as a chunk's for the same sums


class Runner:
    """Runs batches of one loaded model over one storage. Keeps nothing between steps."""

    ahead = False

    def __init__(self, loaded: Loaded, storage: KVStorage) -> None:
        self.spec = loaded.spec
        self.storage = storage
        self._model = loaded.model
        self._device = torch.device(loaded.device)

    def launch(self, batch: Batch, shed: Callable[[], bool] | None = None) -> Callable[[], Output]:
        """Nothing runs beside the host here: the step is computed when it is collected."""
        return partial(self.run, batch, shed)

    def busy(self) -> bool:
        """Nothing is, between steps."""
        return False

    @torch.inference_mode()
    def run(self, batch: Batch, shed: Callable[[], bool] | None = None) -> Output:
        """Compute the batch's positions, write their keys and values into the requests' pages, and sample.

        Every request in the batch must hold pages for all its positions up to the last one computed here. A long step
        asks `shed` before each layer, and goes on with the rows of those that are left.
        """
        step = make_step(batch, self.storage.page_size, self._device)
        between = partial(self._between, batch, shed) if shed is not None and self._work(batch) >= _LONG else None
        return sample(self._model.forward(step, self.storage.pages, between), batch.sampling())

    def _work(self, batch: Batch) -> float:
        """Multiply-adds of a step, about, each as long as one of a product with a weight."""
        spec = self.spec
        pairs = sum(length * (start + length / 2) for _, start, length, _ in batch.chunks)
        pairs += _DECODE_SLOWDOWN * sum(len(request.tokens) for request in batch.decodes)
        each = batch.num_tokens * spec.layer_params + 2 * pairs * spec.num_heads * spec.head_dim
        return spec.num_layers * each

    def _between(self, batch: Batch, shed: Callable[[], bool], step: Step, hidden: Tensor) -> tuple[Step, Tensor]:
        """See `Between` in model/ops.py."""
        before = _rows(batch)
        if not shed():
            return step, hidden
        left = {request for request, _ in _rows(batch)}
        kept = torch.tensor([request in left for request, rows in before for _ in range(rows)])
        return make_step(batch, self.storage.page_size, self._device), hidden[kept]

    def warm_up(self) -> None:
        """Trigger every lazy compilation and allocation. Scribbles on the first pages: call it before serving."""
        size = self.storage.page_size
        length = min(3 * size + 1, (self.storage.num_pages // 2) * size - 1, self.spec.max_len - 1)
        if length < 1:
            return
        held = -(-(length + 1) // size)
        requests = [
            Request(
                id="warm-up",
                prompt_len=length,
                tokens=[0] * length,
                params=SamplingParams(temperature=float(index), seed=0),
                stop_ids=frozenset(),
                order=0.0,
                num_computed=length,
                pages=list(range(index * held, (index + 1) * held)),
            )
            for index in range(2)
        ]
        self.run(Batch(chunks=[Chunk(request, 0, length, True) for request in requests]))
        for request in requests:
            request.tokens.append(0)
            request.num_computed += 1
        self.run(Batch(decodes=requests))
        self.run(Batch(decodes=requests[:1], chunks=[Chunk(requests[1], 0, length, False)]))


def _rows(batch: Batch) -> list[tuple[Request, int]]:
    """Whose the rows of a step are, in order, and how many."""
    return [(request, 1) for request in batch.decodes] + [(chunk.request, chunk.length) for chunk in batch.chunks]


def make_step(batch: Batch, page_size: int, device: torch.device) -> Step:
    """The arrays of a batch, decodes first, then chunks, in order. See Step for shapes."""
    decodes, chunks = batch.decodes, batch.chunks
    count = len(decodes)
    total = count + batch.num_chunk_tokens
    tokens = np.empty(total, np.int64)
    positions = np.empty(total, np.int64)
    slots = np.empty(total, np.int64)
    query_len = np.ones(count + len(chunks), np.int32)
    context_len = np.empty(count + len(chunks), np.int32)
    if count:
        tokens[:count] = [request.tokens[-1] for request in decodes]
        context_len[:count] = [len(request.tokens) for request in decodes]
        positions[:count] = context_len[:count] - 1
    last = list(range(count))
    row = count
    for index, (request, start, length, samples) in enumerate(chunks, count):
        end = row + length
        tokens[row:end] = request.tokens[start : start + length]
        positions[row:end] = np.arange(start, start + length)
        query_len[index], context_len[index] = length, start + length
        if samples:
            last.append(end - 1)
        row = end
    table = _page_table([*decodes, *(chunk.request for chunk in chunks)], -(-context_len // page_size))
    owner = np.repeat(np.arange(len(table)), query_len)
    slots = table[owner, positions // page_size].astype(np.int64) * page_size + positions % page_size

    def there(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Step(
        tokens=there(tokens),
        positions=there(positions),
        slots=there(slots),
        query_start=there(_starts(query_len)),
        context_len=there(context_len),
        page_table=there(table),
        last=there(np.array(last, np.int64)),
    )


def _page_table(requests: list[Request], num_pages: np.ndarray) -> np.ndarray:
    """int32 [B, most pages]: the pages of each request that its context reaches; the rest is 0 and never read."""
    table = np.zeros((len(requests), int(num_pages.max(initial=1))), np.int32)
    held = (request.pages[:count] for request, count in zip(requests, num_pages.tolist(), strict=True))
    table[np.arange(table.shape[1]) < num_pages[:, None]] = list(chain.from_iterable(held))
    return table


def _starts(query_len: np.ndarray) -> np.ndarray:
    """int32 [B + 1]: first row of each sequence, then the number of rows."""
    starts = np.zeros(len(query_len) + 1, np.int32)
    query_len.cumsum(out=starts[1:])
    return starts
