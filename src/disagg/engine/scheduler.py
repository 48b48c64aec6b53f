"""Who computes what in the next step. The heart of the engine; numbers only, so the simulator runs this very file.

There are no phases. A request's `num_computed` catches up with `len(tokens)`; prompt, decode, recomputation after a
preemption, prefix hit and pages copied from another worker are the same thing at different distances.

The life of a request:

1. `add` puts it in `_waiting`, oldest first (`order`, then `id`). It holds nothing.
2. `plan` admits the oldest when the pages of *all* its known tokens are free. Two half-read prompts can therefore never
   starve each other. Cached pages count as computed. It is now in `_behind`: RUNNING, positions to go.
3. `plan` gives it chunks, as many positions as the step has room for, until the last known token is in one. Now its
   next token is being sampled. Until `commit` brings it, the request is in no list, only in the batch in flight.
4. `commit` appends the token. The request ends (FINISHED, pages released), or waits for another worker to copy its
   pages (HOLDING, until `release`), or goes to `_ready`: RUNNING, one position to go.
5. `plan` takes all of `_ready` in every step, one position each: back to 4. A request whose pages are full gets one
   more. If none is left, the youngest running request is preempted: pages released, back to 1 with its old age.

`adopt` enters at 5 with pages filled by another worker, or from HOLDING. `abort` leaves from anywhere; pages that a
step in flight may still write are released when it is committed, or when `shed` takes the request out of that step.

Counts advance in `plan`, tokens arrive in `commit`, and batches are committed in the order they were planned. So steps
may be planned ahead. Without `ahead`, a request whose token is still to come is left out of the next plan. With it, the
step after its own may have it, on a token only the device knows (`_early`). Should that token end the request, the
extra step computes one position for nothing: its token is dropped, its pages are released when it is committed.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterable

from disagg.cache.pages import PageHash, PagePool
from disagg.cache.prefix import PrefixCache
from disagg.engine.batch import Batch, Chunk, Committed, Holder, Output, needs_history
from disagg.engine.books import check_books
from disagg.errors import InvariantError, RequestError
from disagg.request import FinishReason, Request, Status


def _age(request: Request) -> tuple[float, str]:
    return request.order, request.id


class Scheduler:
    """Plans the steps of one worker and owns its requests.

    max_batch_tokens: positions computed in a step. Decodes come first: a limit below the number of running requests
        makes the youngest wait.
    max_mixed_tokens: the same for steps that have both decodes and chunks (None: no other limit). A long prompt beside
        them makes each wait for all of it and brings each one token; cut into chunks it brings them a token a chunk.
    enough_tokens: once a step has so many positions no other chunk is taken into it (None: up to the limits). They are
        enough to keep the device busy, and a prompt done early is not kept waiting for those computed beside it.
    max_running: requests computed in a step, and RUNNING ones before another is admitted. `adopt` may go beyond.
    max_len: tokens of a request, prompt and output.
    chunked_prefill: without it, what a request lacks is computed whole in one step: the first such request of a step
        whatever its length, more of them only within `max_batch_tokens`.
    prefix_caching: full pages are shared between requests that begin alike, and kept until the room is needed.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_batch_tokens: int,
        max_running: int,
        max_len: int,
        max_mixed_tokens: int | None = None,
        enough_tokens: int | None = None,
        chunked_prefill: bool = True,
        prefix_caching: bool = False,
    ) -> None:
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_mixed_tokens = min(max_mixed_tokens or max_batch_tokens, max_batch_tokens)
        self.enough_tokens = min(enough_tokens or max_batch_tokens, max_batch_tokens)
        self.max_running = max_running
        self.max_len = max_len
        self.chunked_prefill = chunked_prefill
        self._prefix = PrefixCache(pool) if prefix_caching else None
        self._requests: dict[str, Request] = {}  # WAITING, RUNNING and HOLDING
        self._waiting: list[Request] = []  # oldest first
        self._behind: list[Request] = []  # RUNNING, more than one position to plan; in order of admission
        self._ready: list[Request] = []  # RUNNING, one position to plan
        self._flying: deque[Batch] = deque()  # planned, not committed
        self._ended: list[Request] = []  # but a batch in flight may still write their pages
        self._preempted: list[Request] = []  # to be reported with the next batch
        self.num_running = 0

    @property
    def num_waiting(self) -> int:
        """Requests that hold no page."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether no request is WAITING, RUNNING or HOLDING and no batch is in flight."""
        return not self._requests and not self._flying

    # Coming and going

    def validate(self, request: Request) -> None:
        """Raise RequestError if `request` could never be served here, or if its id is in use.

        Its output must fit even if it is to be decoded elsewhere: after a failed hand-off it goes on here.
        """
        if request.id in self._requests:
            raise RequestError(f"Request id {request.id!r} is in use: choose another.")
        if not 1 <= len(request.tokens) < self.max_len:
            raise RequestError(
                f"The prompt has {len(request.tokens)} tokens and must have 1 to {self.max_len - 1}: "
                f"shorten it (the context is {self.max_len}, with at least one token of output)."
            )
        longest = min(request.prompt_len + request.params.max_tokens, self.max_len)
        needed = self.pool.num_pages_for(longest - 1)  # the last token is never computed
        if needed > self.pool.num_pages:
            raise RequestError(
                f"Prompt and output may need {needed} pages of {self.pool.page_size} tokens and this worker has "
                f"{self.pool.num_pages}: shorten the prompt, lower max_tokens or give the cache more memory."
            )

    def add(self, request: Request, hashes: Iterable[PageHash] | None = None) -> None:
        """Queue a new request by its age. Raises RequestError as `validate` does.

        `hashes` name its first full pages, for callers without text; otherwise they are computed from the tokens.
        """
        self.validate(request)
        self._requests[request.id] = request
        request.status = Status.WAITING
        insort(self._waiting, request, key=_age)
        if self._prefix:
            self._prefix.register(request, hashes)

    def adopt(self, request: Request, hashes: Iterable[PageHash] | None = None) -> None:
        """Run a request whose pages hold its first `num_computed` positions, copied from another worker.

        The caller's reference to the pages becomes ours. They must have room for all known tokens, or for all but the
        last if only that one is to be computed. If it raises, the pages are still the caller's: RequestError as
        `validate` does, InvariantError if counts and pages do not fit.

        A request that is HOLDING here may be adopted too, once its `decode_elsewhere` is unset: nobody came for it.
        """
        num_known, num_computed = len(request.tokens), request.num_computed
        room = len(request.pages) * self.pool.page_size
        one_behind = num_computed == num_known - 1
        if not 0 < num_computed < num_known or room < num_known - one_behind or request.decode_elsewhere:
            raise InvariantError(
                f"Request {request.id!r} cannot be adopted: {num_computed} of {num_known} positions are computed, "
                f"its {len(request.pages)} pages have room for {room}, decode_elsewhere is {request.decode_elsewhere}."
            )
        if request.status is not Status.HOLDING or self._requests.get(request.id) is not request:
            self.validate(request)
            self._requests[request.id] = request
            if self._prefix:
                self._prefix.register(request, hashes)
                self._prefix.publish(request, 0, num_computed)
        request.status = Status.RUNNING
        self.num_running += 1
        (self._ready if one_behind else self._behind).append(request)

    def release(self, request: Request) -> None:
        """Free a HOLDING request, which goes on elsewhere: `finish_reason` stays None. Else raises InvariantError."""
        if request.status is not Status.HOLDING:
            raise InvariantError(f"Request {request.id!r} was released while {request.status.value}, not holding.")
        self._leave(request, None)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> Request | None:
        """End a request now, whatever it is doing, and return it; None if the id is unknown (it may just have ended).

        If a batch in flight contains it, its token is dropped at commit and its pages stay held until then or `shed`.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        for queue in (self._waiting, self._behind, self._ready):
            if request in queue:
                queue.remove(request)
        self._leave(request, reason, in_flight=request in self._in_flight())
        return request

    def _leave(self, request: Request, reason: FinishReason | None, in_flight: bool = False) -> None:
        """The only way out: HOLDING or ended, `request` is ours no more. Its pages may be, while it is in flight."""
        self.num_running -= request.status is Status.RUNNING
        request.status = Status.FINISHED
        request.finish_reason = reason
        del self._requests[request.id]
        if self._prefix:
            self._prefix.forget(request)
        if in_flight:
            self._ended.append(request)
        else:
            self._free(request)

    def _free(self, request: Request) -> None:
        pages, request.pages = request.pages, []  # a new list: others may still look at the old one
        self.pool.release(pages)

    def _in_flight(self) -> set[Request]:
        return {r for batch in self._flying for r in (*batch.decodes, *(chunk.request for chunk in batch.chunks))}

    # A step

    def plan(self, ahead: bool = False) -> Batch | None:
        """The next step; it must be committed. None: nothing can be done before a commit, a release or a new request.

        `ahead`: also on tokens that the step planned last is still sampling, as a device that keeps them can do.
        `num_computed` already counts the positions of this step when this returns.
        """
        batch = Batch()
        if not self._plan_decodes(batch, ahead):
            return None
        self._plan_chunks(batch)
        if not batch.decodes and not batch.chunks:
            return None
        batch.preempted, self._preempted = self._preempted, []
        self._flying.append(batch)
        return batch

    def _plan_decodes(self, batch: Batch, ahead: bool) -> bool:
        """Fill `batch.decodes`. False if somebody has to give way for that, which must wait for the step in flight."""
        candidates, rest = self._ready + (self._early() if ahead else []), []
        limit = min(self.max_running, self.max_batch_tokens)
        if len(candidates) > limit:
            candidates.sort(key=_age)
            candidates, rest = candidates[:limit], candidates[limit:]
        page_size = self.pool.page_size
        growing = [request for request in candidates if not request.num_computed % page_size]
        if growing:
            if ahead and self._flying and len(growing) > self.pool.num_free:
                return False  # the youngest are in flight: to preempt others instead would be unfair
            self._grow(growing)
            candidates = [request for request in candidates if request.status is Status.RUNNING]
        for request in candidates:
            request.num_computed += 1
        batch.decodes = candidates
        self._ready = [r for r in rest if r.status is Status.RUNNING and r.num_computed < len(r.tokens)]
        return True

    def _early(self) -> list[Request]:
        """Those whose next token the last step planned is sampling, and which want another one unless it stops them."""
        running, max_len, early = Status.RUNNING, self.max_len, []
        for request in self._flying[-1].sampling() if self._flying else ():
            num_known, params = len(request.tokens), request.params
            if (
                request.num_computed == num_known  # else it is in the step after that, too
                and num_known + 1 < min(request.prompt_len + params.max_tokens, max_len)
                and request.status is running
                and not request.decode_elsewhere
                and not needs_history(params)
            ):
                early.append(request)
        return early

    def _grow(self, growing: list[Request]) -> None:
        """Give a page to each request that has none for its next position, at the cost of the youngest.

        Those preempted are younger than all that stay, so the order of `growing` does not matter. And if not all that
        are ready fit in this step, the rest goes first: nobody moves up who has not been given a page here.
        """
        for request in growing:
            if request.num_computed < len(request.pages) * self.pool.page_size:
                continue  # adopted with a page in hand
            while request.status is Status.RUNNING:  # it may be the youngest itself
                if pages := self.pool.allocate(1):
                    request.pages += pages
                    break
                self._preempt_youngest()

    def _preempt_youngest(self) -> None:
        """Send the youngest request that no step and no other worker touches back to `_waiting`.

        Recomputing costs arithmetic only: all known tokens are computed again and the next one is sampled as ever.
        """
        flying = self._in_flight()
        queues = (self._ready, self._behind)
        victim = max((r for q in queues for r in q if not r.decode_elsewhere and r not in flying), key=_age)
        queues[victim in self._behind].remove(victim)
        self._free(victim)
        self.num_running -= 1
        victim.status = Status.WAITING
        victim.num_computed = victim.num_cached = 0
        victim.num_preemptions += 1
        self._preempted.append(victim)
        insort(self._waiting, victim, key=_age)

    def _plan_chunks(self, batch: Batch) -> None:
        """First those already admitted, then new ones, oldest first; nobody overtakes the one that lacks room."""
        budget = self.max_mixed_tokens - len(batch.decodes) if batch.decodes else self.max_batch_tokens
        behind, chunks, computed = self._behind, batch.chunks, len(batch.decodes)
        while len(batch.decodes) + len(chunks) < self.max_running:
            if budget <= 0 and (self.chunked_prefill or chunks):
                break
            if chunks and computed >= self.enough_tokens:
                break
            if len(chunks) == len(behind) and not self._admit():
                break
            request = behind[len(chunks)]
            start = request.num_computed
            length = len(request.tokens) - start
            if length > budget:
                if self.chunked_prefill:
                    length = budget
                elif chunks:
                    break
            request.num_computed += length
            chunks.append(Chunk(request, start, length, request.num_computed == len(request.tokens)))
            budget -= length
            computed += length
        if chunks:
            self._behind = [request for request in behind if request.num_computed < len(request.tokens)]

    def _admit(self) -> bool:
        """Move the oldest waiting request to the end of `_behind`, with pages for all its known tokens, if it can."""
        if not self._waiting or self.num_running >= self.max_running:
            return False
        request = self._waiting[0]
        cached = self._prefix.match(request) if self._prefix else []
        fresh = self.pool.allocate(self.pool.num_pages_for(len(request.tokens)) - len(cached))
        if fresh is None:
            self.pool.release(cached)
            return False
        del self._waiting[0]
        request.status = Status.RUNNING
        request.pages = cached + fresh
        request.num_computed = request.num_cached = len(cached) * self.pool.page_size
        self.num_running += 1
        self._behind.append(request)
        return True

    def commit(self, batch: Batch, output: Output) -> Committed:
        """Take in what the oldest batch in flight produced. Raises InvariantError for another batch or a wrong count.

        After a step that failed, abort its requests and commit it with any tokens: that releases their pages.
        """
        sampling = batch.sampling()
        if not self._flying or self._flying[0] is not batch:
            raise InvariantError("A batch was committed twice or before an older one.")
        if len(output.tokens) != len(sampling):
            raise InvariantError(f"A step that samples {len(sampling)} tokens brought {len(output.tokens)}.")
        self._flying.popleft()
        if self._prefix:
            self._publish(batch, self._prefix)
        done = Committed([], [])
        running, max_len, ready = Status.RUNNING, self.max_len, self._ready
        for request, token in zip(sampling, output.tokens, strict=True):
            if request.status is not running:
                continue  # it ended while this step was in flight
            tokens, params = request.tokens, request.params
            tokens.append(token)
            again = request.num_computed == len(tokens)  # the step in flight computes this very token
            num_output = len(tokens) - request.prompt_len
            if token in request.stop_ids and num_output >= params.min_tokens:
                self._leave(request, FinishReason.STOP, again)
                done.finished.append(request)
            elif num_output >= params.max_tokens or len(tokens) >= max_len:
                self._leave(request, FinishReason.LENGTH)
                done.finished.append(request)
            elif request.decode_elsewhere:
                request.status = Status.HOLDING
                self.num_running -= 1
                done.holding.append(request)
            elif not again:
                ready.append(request)
        if self._ended:
            self._free_ended()
        return done

    def shed(self) -> bool:
        """Free what ended but is in flight, for a runner that computes no more of it. Whether there was any."""
        ended = self._ended
        for batch in self._flying if ended else ():
            batch.leave(ended)
        self._free_ended()
        return bool(ended)

    def _publish(self, batch: Batch, prefix: PrefixCache) -> None:
        """Share the pages that this step filled; before tokens are appended, so a decode computed the last position."""
        page_size = self.pool.page_size
        for request in batch.decodes:
            num_computed = len(request.tokens)
            if not num_computed % page_size and request.status is Status.RUNNING:
                prefix.publish(request, num_computed - 1, num_computed)
        for request, start, length, _ in batch.chunks:
            if request.status is Status.RUNNING:
                prefix.publish(request, start, start + length)

    def _free_ended(self) -> None:
        flying = self._in_flight()
        for request in self._ended:
            if request not in flying:
                self._free(request)
        self._ended = [request for request in self._ended if request in flying]

    # Looking after ourselves

    def audit(self) -> list[Holder]:
        """Every request known here and every page it holds, aborted ones with a step in flight included."""
        return [Holder(r.id, r.status, list(r.pages)) for r in (*self._requests.values(), *self._ended)]

    def check(self, others: Iterable[int] = ()) -> None:
        """See `check_books`."""
        check_books(self, others)
