"""Scheduler: steps in flight, planned on tokens to come, and requests that end meanwhile."""

from fake_worker import VOCABULARY, FakeWorker, chunks, decodes, oracle, request

from disagg.engine.batch import Committed
from disagg.request import FinishReason, Status

# Aborting


def test_abort_of_a_request_that_is_not_in_flight_frees_at_once() -> None:
    """Waiting, running or holding; an unknown id is nobody's fault."""
    worker = FakeWorker(max_running=2)
    waiting, running = request("waiting", 4, order=3), request("running", 4, order=1)
    holding = request("holding", 4, decode_elsewhere=True, order=0)
    for wanted in (holding, running, waiting):
        worker.scheduler.add(wanted)
    worker.scheduler.add(request("other", 4, order=2))
    worker.step()
    for wanted in (waiting, running, holding):
        assert worker.abort(wanted.id) is wanted
        assert (wanted.status, wanted.finish_reason, wanted.pages) == (Status.FINISHED, FinishReason.ABORT, [])
        assert worker.abort(wanted.id) is None
        worker.scheduler.check()
    worker.drain()
    assert [r.id for r in worker.finished] == ["other"]


def test_abort_in_flight_keeps_the_pages_until_commit() -> None:
    """The step may still write them; its token is dropped; the request is not reported a second time."""
    worker = FakeWorker(num_pages=2)
    victim = request("victim", 5)
    worker.scheduler.add(victim)
    worker.plan()
    worker.abort("victim")
    assert victim.status is Status.FINISHED
    assert worker.scheduler.audit() == [("victim", Status.FINISHED, [0, 1])]
    worker.scheduler.check()
    successor = request("victim", 5, order=1)  # the name is free again
    worker.scheduler.add(successor)
    assert worker.plan() is None
    assert worker.commit() == Committed([], [])
    assert victim.num_output == 0
    assert chunks(worker.plan()) == [("victim", 0, 5, True)]
    worker.commit()
    worker.drain()
    assert successor.tokens == oracle(successor, 64)[0]


def test_shedding_frees_the_pages_before_the_commit() -> None:
    """Whoever computes the step stops computing an aborted request: others keep their places, nobody gets its token."""
    worker = FakeWorker(num_pages=6, max_batch_tokens=20)
    first, victim, last = (request(name, 6, order=order) for order, name in enumerate(("first", "victim", "last")))
    worker.scheduler.add(first)
    worker.step()
    for wanted in (victim, last):
        worker.scheduler.add(wanted)
    batch = worker.plan()
    assert not worker.shed()
    worker.abort("victim")
    held = len(victim.pages)
    assert worker.pool.num_free == 6 - 3 * held
    assert worker.shed()
    assert (victim.pages, worker.pool.num_free) == ([], 6 - 2 * held)
    assert (decodes(batch), chunks(batch)) == (["first"], [("last", 0, 6, True)])
    worker.scheduler.check()
    assert not worker.shed()
    worker.drain()
    assert [one.tokens for one in (first, last)] == [oracle(one, 64)[0] for one in (first, last)]
    assert victim.num_output == 0


def test_a_step_of_which_all_is_shed_commits() -> None:
    """Nothing is left of it, and the next request gets the pages."""
    worker = FakeWorker(num_pages=2, prefix_caching=True)
    worker.scheduler.add(request("victim", 5))
    batch = worker.plan()
    worker.abort("victim")
    assert worker.shed()
    assert (batch.num_tokens, worker.pool.num_free) == (0, 2)
    successor = request("victim", 5, order=1)
    worker.scheduler.add(successor)
    assert worker.commit() == Committed([], [])
    worker.drain()
    assert (successor.tokens, successor.num_cached) == (oracle(successor, 64)[0], 0)


def test_pages_wait_for_the_last_of_several_steps_in_flight() -> None:
    """With steps planned ahead, two of them may write the same request's pages."""
    worker = FakeWorker(num_pages=2, max_batch_tokens=4)
    worker.scheduler.add(request("a", 7, 1))
    worker.plan()
    worker.plan()
    worker.abort("a")
    worker.commit()
    assert worker.pool.num_free == 0
    worker.commit()
    assert worker.pool.num_free == 2


def test_abort_may_give_another_reason() -> None:
    """A stop string is found outside, an error is not the client's wish."""
    worker = FakeWorker()
    worker.scheduler.add(request("a", 3))
    ended = worker.scheduler.abort("a", FinishReason.STOP)
    assert ended is not None
    assert ended.finish_reason is FinishReason.STOP


# Running ahead


def test_next_step_is_planned_before_the_last_token_is_known() -> None:
    """Prompt and decode alike; a request that cannot go on by count is left out, so nothing is computed in vain."""
    worker = FakeWorker(ahead=True)
    worker.scheduler.add(request("a", 6, max_tokens=3))
    assert chunks(worker.plan()) == [("a", 0, 6, True)]
    assert decodes(worker.plan()) == ["a"]
    assert worker.plan() is None, "two of its tokens are to come"
    worker.commit()
    assert decodes(worker.plan()) == ["a"]
    worker.commit()
    assert worker.plan() is None, "its third token is its last"
    worker.commit()
    assert [r.num_output for r in worker.finished] == [3]
    assert worker.scheduler.is_idle


def test_request_that_stops_early_drops_its_extra_step() -> None:
    """The token of the step planned on its last one is dropped, and its pages stay held until that is committed."""
    worker = FakeWorker(ahead=True)
    wanted = request("a", 6, max_tokens=9, stop_ids=frozenset(range(VOCABULARY)))
    worker.scheduler.add(wanted)
    worker.plan()
    assert decodes(worker.plan()) == ["a"]
    assert worker.commit().finished == [wanted]
    assert worker.scheduler.audit() == [("a", Status.FINISHED, [0, 1])]
    worker.scheduler.check()
    assert not worker.scheduler.is_idle
    assert worker.commit() == Committed([], [])
    assert wanted.num_output == 1
    assert worker.pool.counts().held == 0
    assert worker.scheduler.is_idle


def test_request_with_penalties_waits_for_its_tokens() -> None:
    """The host needs all earlier tokens for them; others go on beside it."""
    worker = FakeWorker(ahead=True)
    worker.scheduler.add(request("penalised", 3, presence_penalty=1.0))
    worker.scheduler.add(request("plain", 3, order=1))
    worker.plan()
    assert decodes(worker.plan()) == ["plain"]
    worker.commit()
    assert decodes(worker.plan()) == ["penalised", "plain"]
    worker.drain()


def test_prefill_for_another_worker_does_not_run_ahead_of_its_first_token() -> None:
    """Its pages are handed over as they are; told to stay here meanwhile, it goes on as any other."""
    worker = FakeWorker(ahead=True)
    elsewhere, staying = (request(name, 3, decode_elsewhere=True) for name in ("elsewhere", "staying"))
    worker.scheduler.add(elsewhere)
    worker.scheduler.add(staying)
    worker.plan()
    staying.decode_elsewhere = False
    assert decodes(worker.plan()) == ["staying"]
    assert worker.commit().holding == [elsewhere]
    worker.drain()
    assert staying.tokens == oracle(staying, 64)[0]


def test_lack_of_pages_ends_running_ahead_so_that_the_youngest_gives_way() -> None:
    """While everybody is in flight nobody can be preempted; then it is the youngest, not whoever is not in flight."""
    worker = FakeWorker(num_pages=4, ahead=True)
    old, young = request("old", 6, 6), request("young", 6, 6, order=1)
    worker.scheduler.add(old)
    worker.scheduler.add(young)
    worker.plan()
    worker.plan()
    worker.commit()
    worker.plan()
    worker.commit()
    assert worker.plan() is None, "position 8 of both needs a page, and there is none"
    worker.commit()
    batch = worker.plan()
    assert (batch.preempted, decodes(batch)) == ([young], ["old"])
    worker.drain()
    assert [r.tokens for r in (old, young)] == [oracle(r, 64)[0] for r in (old, young)]


def test_abort_with_two_steps_in_flight() -> None:
    """Both tokens are dropped and the pages are kept until the second is committed."""
    worker = FakeWorker(ahead=True)
    worker.scheduler.add(request("a", 3, max_tokens=9))
    worker.plan()
    worker.plan()
    victim = worker.abort("a")
    worker.commit()
    assert worker.pool.counts().held == 1
    worker.commit()
    assert (worker.pool.counts().held, victim.num_output) == (0, 0)
