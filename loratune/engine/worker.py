"""The thread that runs the model: takes requests in, makes steps, and hands tokens out."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from loratune.engine.request_handle import RequestHandle
from loratune.engine.scheduler import Decoder
from loratune.engine.sequence import RunningSequence
from loratune.engine.types import NOTHING, Delta
from loratune.errors import Exit, LoratuneError
from loratune.model.memory import is_out_of_memory


class Worker:
    """A thread that decodes requests from any thread.

    Args:
        decoder: nothing else may use it, except while `lock` is held.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.lock = threading.Lock()
        """Held during a step."""
        self._inbox: queue.SimpleQueue[RequestHandle | _Job | None] = queue.SimpleQueue()
        self._handles: dict[RunningSequence, RequestHandle] = {}
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def take(self, handle: RequestHandle) -> None:
        """Take a request; its `deliver` and `ended` are called from this thread."""
        self._inbox.put(handle)

    def between_steps(self, work: Callable[[], Any]) -> Future[Any]:
        """Have the thread call a function when no step is in progress; requests may be running.

        Returns:
            What the function returns or raises; cancelled if the worker is closed before.
        """
        job = _Job(work)
        self._inbox.put(job)
        return job.done

    def close(self) -> None:
        """Cancel all requests and end the thread."""
        self._inbox.put(None)
        self._thread.join()

    def _work(self) -> None:
        while self._take_in():
            try:
                for handle in [handle for handle in self._handles.values() if handle.is_cancelled.is_set()]:
                    self._end(handle, "cancelled")
                if self.decoder.is_idle:
                    continue
                with self.lock:
                    advanced = self.decoder.step()
                for running in advanced:
                    self._hand_out(self._handles[running])
            except BaseException as error:  # delivered to all waiting requests
                for handle in list(self._handles.values()):
                    self._end(handle, "error", explained(error))
                self.decoder.reset()
        self._cancel_all()

    def _cancel_all(self) -> None:
        """Cancel what runs, and what was submitted late."""
        while not self._inbox.empty():
            late = self._inbox.get()
            if isinstance(late, _Job):
                late.done.cancel()
            elif late:
                self._handles[late.running] = late
        for handle in list(self._handles.values()):
            self._end(handle, "cancelled")

    def _take_in(self) -> bool:
        """Take in what was submitted, blocking if there is no other work; return False at the end."""
        wait = not self._handles
        while wait or not self._inbox.empty():
            came = self._inbox.get()
            if came is None:
                return False
            if isinstance(came, _Job):
                with self.lock:
                    came.run()
                continue
            self._handles[came.running] = came
            self.decoder.add(came.running)
            wait = False
        return True

    def _hand_out(self, handle: RequestHandle) -> None:
        running = handle.running
        try:
            piece = handle.push(running.tokens[-1])
        except Exception as error:  # a decoding error ends only this request
            self._end(handle, "error", error)
            return
        finish = "stop" if handle.is_stopped else running.finish
        if finish:
            self._end(handle, finish, before=piece)
        elif piece.has_come:
            self._tell(handle, piece)

    def _end(
        self, handle: RequestHandle, finish: str, error: BaseException | None = None, before: Delta = NOTHING
    ) -> None:
        """Deliver the last chunk and remove the request."""
        self.decoder.remove(handle.running)
        del self._handles[handle.running]
        handle.ended()
        try:
            last = handle.finish(before, finish, error)
        except Exception as fault:
            last = replace(before, finish="error", error=error or fault)
        self._tell(handle, last)

    def _tell(self, handle: RequestHandle, piece: Delta) -> None:
        """Deliver a chunk; an exception in the consumer cancels only its own request."""
        try:
            handle.deliver(piece)
        except Exception:
            handle.cancel()


class _Job:
    """A function to be called between steps."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self.done: Future[Any] = Future()

    def run(self) -> None:
        """Call it, unless it has been cancelled."""
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            result = self._work()
        except BaseException as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(result)


def explained(error: BaseException) -> BaseException:
    """Return what a client is told of a failure of the model."""
    if is_out_of_memory(error):
        return LoratuneError("out of memory during generation; shorten the conversation, or use fewer slots", Exit.IO)
    return error
