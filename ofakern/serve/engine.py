"""Continuous batching: one thread owns the model; requests join its searches and leave them between steps.

A turn of the thread: requests that have arrived are encoded together (at most `encode_batch` of them) and join the
search session; the session takes one step; what is finished is answered. Sequences that no session can hold (speech,
motions) run whole, one after the other, between steps.

A request fails alone. What raises before the search (reading a file, decoding an image, an instruction that cannot be
read) raises in the caller's thread. When encoding or a step fails for several requests, each of them is tried again by
itself, so that only the one at fault gets the error.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import torch

from ofakern.errors import OfakernValueError
from ofakern.generate import Finished, TokenEvent
from ofakern.serve.contract import Answer, Job, Prepared, Progress, ServedModel, Session
from ofakern.serve.errors import Overloaded, Stopped
from ofakern.serve.metrics import Registry

__all__ = ["Engine", "Place"]


@dataclass(eq=False)
class _Running:
    """A session and the requests in it, by the session's numbers."""

    session: Session
    jobs: dict[int, Job] = field(default_factory=dict)


class Place:
    """A place in the queue, taken before a request's body is read; `submit` uses it up, `release` gives it back."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._lock, self._held = engine, threading.Lock(), True

    def submit(
        self,
        instruction: str,
        data: Mapping[str, Any] | None = None,
        *,
        closed_set: Iterable[str] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        **generation: Any,
    ) -> Future[Answer]:
        """As `Engine.submit`; the place is gone afterwards, also after an error."""
        try:
            prepared = self._engine.model.prepare_request(instruction, data or {}, closed_set=closed_set, **generation)
        except BaseException:
            self.release()
            raise
        if not self._give_up():
            raise Stopped("Engine: a request must keep its place until it is prepared, got one released before")
        return self._engine.enqueue(prepared, on_progress)

    def release(self) -> None:
        """Give the place back if it is still held."""
        if self._give_up():
            self._engine.give_back()

    def _give_up(self) -> bool:
        """Whether the place was held; its owner and the thread that prepares the request may both come here."""
        with self._lock:
            held, self._held = self._held, False
        return held

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Engine:
    """A thread that answers requests with a model.

    Args:
        model: a `GeneralistModel`. It belongs to the engine until `stop`.
        max_queue: most requests that wait, those that are being prepared included; one more is `Overloaded`.
        max_running: most requests in search at a time. encode_batch: most that are encoded together.

    Raises OfakernValueError for a limit below 1.
    """

    def __init__(
        self, model: ServedModel, *, max_queue: int = 64, max_running: int = 16, encode_batch: int = 8
    ) -> None:
        for name, value in (("max_queue", max_queue), ("max_running", max_running), ("encode_batch", encode_batch)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OfakernValueError(f"Engine: {name} must be an integer of at least 1, got {value!r}")
        self.model = model
        self.metrics = Registry()
        self._max_queue, self._max_running, self._encode_batch = max_queue, max_running, encode_batch
        self._change = threading.Condition()
        self._queue: deque[Job] = deque()
        self._held = 0  # places taken by requests that are not in the queue yet
        self._busy = 0  # requests taken out of the queue and not answered yet
        self._accepting, self._stopping = True, False
        self._sessions: dict[int | None, _Running] = {}  # None: the one that is shared
        self._measure()
        self._thread = threading.Thread(target=self._run, name="ofakern-engine", daemon=True)
        self._thread.start()

    def _measure(self) -> None:
        m = self.metrics
        self._answered = m.counter("ofakern_answers_total", "Requests that left the engine, by outcome.", "outcome")
        self._refused = m.counter("ofakern_refused_total", "Requests refused because the queue was full.")
        self._tokens = m.counter("ofakern_tokens_total", "Tokens of the best answers.")
        self._steps = m.counter("ofakern_steps_total", "Decoding steps.")
        self._step_requests = m.counter("ofakern_step_requests_total", "Requests in those steps, added up.")
        self._encoded = m.counter("ofakern_encode_batches_total", "Batches that were encoded.")
        m.gauge("ofakern_queue_requests", "Requests that wait.", lambda: self.waiting)
        m.gauge("ofakern_running_requests", "Requests that are being answered.", lambda: self.running)
        self._seconds = m.histogram("ofakern_request_seconds", "From the request's place in the queue to its answer.")
        self._queued = m.histogram("ofakern_queue_seconds", "Time in the queue.")

    # ------------------------------------------------------------------------------------------------- any thread

    @property
    def waiting(self) -> int:
        """Requests that hold a place in the queue."""
        with self._change:
            return self._held + len(self._queue)

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        with self._change:
            return self._busy

    @property
    def accepting(self) -> bool:
        """Whether a request would be taken, if there is room for it."""
        return self._accepting and self._thread.is_alive()

    def reserve(self) -> Place:
        """A place in the queue. Raises `Overloaded` when there is none, `Stopped` after `drain` or `stop`."""
        with self._change:
            if not self.accepting:
                raise Stopped("Engine: it must be running to take a request, got one after it was stopped")
            if self.waiting >= self._max_queue:
                self._forget_waiting()
            if self.waiting >= self._max_queue:
                self._refused.add()
                raise Overloaded(
                    f"Engine: waiting requests must be at most {self._max_queue}, got one more\nTry: again later."
                )
            self._held += 1
        return Place(self)

    def _forget_waiting(self) -> None:
        """A request that was given up holds its place only until somebody needs it."""
        for job in [job for job in self._queue if not job.wanted]:
            self._queue.remove(job)
            self._leave(job, "cancelled", busy=False)

    def submit(
        self,
        instruction: str,
        data: Mapping[str, Any] | None = None,
        *,
        closed_set: Iterable[str] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        **generation: Any,
    ) -> Future[Answer]:
        """Ask for an answer; the arguments are those of `GeneralistModel.inference` for one row.

        on_progress: called in the engine's thread, with every token, and must return at once; when it raises, the
            request ends with that error.

        Returns:
            A future of what `inference` returns. `future.cancel()` gives the request up: it leaves its search before
            the next step.

        Raises:
            Overloaded, Stopped: see `reserve`. Whatever `inference` raises for such an instruction, row or setting.
        """
        place = self.reserve()
        return place.submit(instruction, data, closed_set=closed_set, on_progress=on_progress, **generation)

    def enqueue(self, prepared: Prepared, on_progress: Callable[[Progress], None] | None) -> Future[Answer]:
        """A held place becomes a request in the queue (for `Place`)."""
        job = Job(prepared, Future(), on_progress, time.monotonic())
        job.future.add_done_callback(lambda _: self._wake())
        with self._change:
            self._held -= 1
            if self._stopping:
                raise Stopped("Engine: it must be running to take a request, got one after it was stopped")
            self._queue.append(job)
            self._change.notify_all()
        return job.future

    def give_back(self) -> None:
        """A held place is free again (for `Place`)."""
        with self._change:
            self._held -= 1
            self._change.notify_all()

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those that are here; whether all were answered within `timeout` s."""
        with self._change:
            self._accepting = False
            return self._change.wait_for(lambda: self.waiting == 0 and self._busy == 0, timeout)

    def stop(self) -> None:
        """Stop after the present step. Requests that are not answered yet get `Stopped`. May be called again."""
        with self._change:
            self._accepting, self._stopping = False, True
            self._change.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wake(self) -> None:
        with self._change:
            self._change.notify_all()

    # ------------------------------------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while not self._stopping:
                    fresh = self._arrived()
                    self._begin(fresh)
                    self._forget_unwanted()
                    self._step_all()
        finally:
            self._accepting = False
            self._fail_all(Stopped("Engine: it must run until a request is answered, got stopped before"))

    def _arrived(self) -> list[Job]:
        """The requests that join now; waits when there is nothing to do at all."""
        with self._change:
            self._change.wait_for(lambda: self._stopping or self._queue or self._sessions)
            fresh: list[Job] = []
            room = min(self._encode_batch, self._max_running - self._busy)
            while self._queue and len(fresh) < room and not self._stopping:
                job = self._queue.popleft()
                if job.wanted:
                    fresh.append(job)
                    self._queued.observe(time.monotonic() - job.born)
                else:
                    self._leave(job, "cancelled", busy=False)
            self._busy += len(fresh)
            return fresh

    def _begin(self, fresh: Sequence[Job]) -> None:
        groups: dict[Any, list[Job]] = {}
        for job in fresh:
            if job.prepared.search is None:
                self._run_whole(job)
            else:
                groups.setdefault(self.model.writer(job.prepared.writer_key), []).append(job)
        for writer, jobs in groups.items():
            self._join(writer, jobs)

    def _run_whole(self, job: Job) -> None:
        try:
            self._answer(job, self.model.run_request(job.prepared))
        except Exception as error:
            self._fail(job, error)

    def _join(self, writer: Any, jobs: Sequence[Job]) -> None:
        """Encode together and add to the shared session; one that is tried alone has a session of its own."""
        name = id(jobs[0]) if jobs[0].alone else None
        try:
            memory = self.model.encode_requests([job.prepared for job in jobs])
            running = self._sessions.get(name) or _Running(self.model.search_session())
            numbers = running.session.add(memory, [job.request() for job in jobs], writer)
        except Exception as error:
            self._retry(jobs, error)
            return
        self._encoded.add()
        self._sessions[name] = running
        running.jobs.update(zip(numbers, jobs, strict=True))

    def _retry(self, jobs: Sequence[Job], error: Exception) -> None:
        """Nobody knows whose fault it was: each request by itself, or the error for the one that was."""
        if len(jobs) == 1:
            self._fail(jobs[0], error)
            return
        for job in jobs:
            job.alone = True
            self._join(self.model.writer(job.prepared.writer_key), [job])

    def _forget_unwanted(self) -> None:
        for running in self._sessions.values():
            for number in [number for number, job in running.jobs.items() if not job.wanted]:
                running.session.cancel(number)
                job = running.jobs.pop(number)
                self._leave(job, "cancelled" if job.future.cancelled() else "failed")

    def _step_all(self) -> None:
        for name, running in list(self._sessions.items()):
            if running.jobs and not self._stopping:
                self._step(running)
            if not running.jobs:
                # An empty session would keep its caches as large as they were.
                del self._sessions[name]

    def _step(self, running: _Running) -> None:
        self._steps.add()
        self._step_requests.add(len(running.jobs))
        try:
            events = running.session.step()
        except Exception as error:
            jobs = list(running.jobs.values())
            running.jobs.clear()
            self._retry(jobs, error)
            return
        for event in events:
            if isinstance(event, TokenEvent):
                self._report(running.jobs.get(event.id), event)
            elif event.id in running.jobs:
                self._finish(running.jobs.pop(event.id), event)

    def _report(self, job: Job | None, event: TokenEvent) -> None:
        if job is None or job.on_progress is None or not job.wanted:
            return
        try:
            progress = job.progress(event)
            if progress is not None:
                job.on_progress(progress)
        except Exception as error:
            _settle(job.future, error)  # the next turn takes it out of its session

    def _finish(self, job: Job, event: Finished) -> None:
        try:
            if event.error is not None:
                raise event.error
            answer = job.prepared.read(event.answers)
        except Exception as error:
            self._fail(job, error)
        else:
            self._answer(job, answer)

    # ------------------------------------------------------------------------------------------------- the outcome

    def _answer(self, job: Job, answer: Answer) -> None:
        best = answer[0] if isinstance(answer, list) else answer
        self._tokens.add(len(best.tokens))
        self._leave(job, "answered", answer)

    def _fail(self, job: Job, error: Exception) -> None:
        self._leave(job, "failed", error)

    def _leave(self, job: Job, outcome: str, result: Answer | Exception | None = None, *, busy: bool = True) -> None:
        """Whoever sees the future done sees a request less, and the other way round."""
        with self._change:
            late = result is not None and not _settle(job.future, result)
            self._answered.add(label="cancelled" if late else outcome)
            self._seconds.observe(time.monotonic() - job.born)
            self._busy -= busy
            self._change.notify_all()

    def _fail_all(self, error: Exception) -> None:
        with self._change:
            waiting, self._queue = list(self._queue), deque()
        for job in [*waiting, *(job for running in self._sessions.values() for job in running.jobs.values())]:
            _settle(job.future, error)
        with self._change:
            self._sessions.clear()
            self._busy = 0
            self._change.notify_all()


def _settle(future: Future[Answer], outcome: Answer | Exception) -> bool:
    """False when the future was settled (cancelled) before."""
    try:
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:
        return False
    return True
