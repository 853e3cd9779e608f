"""The adapters of a folder, of which the most recently used are in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from loratune.engine.adapter_opening import AdapterOpener, OpenedAdapter
from loratune.engine.attached import AttachedAdapters
from loratune.engine.loading import Lease, ServedModel
from loratune.errors import Exit, LoratuneError
from loratune.runs.adapter_folders import AdapterFolders, FoundAdapter, version_of

if TYPE_CHECKING:
    from loratune.engine.engine import Engine

TRIES = 3
"""Times that an adapter is read whose files change meanwhile."""


@dataclass
class _Resident:
    """An adapter in memory."""

    voice: ServedModel
    requests: int = 0
    """Those that are not answered yet; it stays as long as there are any."""


@dataclass
class _Wanted:
    """An adapter that requests wait for."""

    found: FoundAdapter
    futures: list[Future[Lease]] = field(default_factory=list)


class AdapterStore:
    """Lends adapters to requests, and loads them in a thread of its own when they are asked for.

    The adapter that was asked for least recently, of those without a request, makes room for another one. If all have
    requests, the least recently used one gets no more of them, so that nobody waits forever.

    Args:
        engine: of the base; its thread puts the adapters on the model between two steps.
        folders: the adapters that there are.
        most: number of adapters in memory.
        warn: called with each warning about an adapter, from the thread that loads.
    """

    def __init__(self, engine: Engine, folders: AdapterFolders, most: int, warn: Callable[[str], None]) -> None:
        self.folders, self.most = folders, most
        self.loads = self.evictions = 0
        """Counts since the start."""
        self._engine, self._warn = engine, warn
        self._attached = AttachedAdapters(engine.model)
        self._opener = AdapterOpener(engine.base, engine.base_name, engine.model)
        self._free = [f"stored_{number}" for number in range(most + 1)]
        """PEFT's names; one more than adapters, for the exchange of two with different layouts."""
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        """Version → adapter, the least recently used one first."""
        self._vacant: list[str] = []
        """PEFT's names of adapters that are on the model and are nobody's, after a failure."""
        self._closing: str | None = None
        """The version that gets no more requests."""
        self._waiting: deque[_Wanted] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="adapters", daemon=True)
        self._thread.start()

    @property
    def in_memory(self) -> int:
        """Number of adapters in memory."""
        return len(self._residents)

    def lease(self, found: FoundAdapter) -> Future[Lease]:
        """Lend an adapter to a request.

        Returns:
            The lease, as soon as the adapter is in memory; or a LoratuneError that says why it is refused.
        """
        future: Future[Lease] = Future()
        with self._changed:
            if self._is_closed:
                future.cancel()
            elif found.version in self._residents and found.version != self._closing:
                self._lend(found.version, [future])
            else:
                wanted = next((one for one in self._waiting if one.found.version == found.version), None)
                if wanted is None:
                    wanted = _Wanted(found)
                    self._waiting.append(wanted)
                wanted.futures.append(future)
                self._changed.notify_all()
        return future

    def close(self) -> None:
        """Load no more; waiting requests are cancelled."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _lend(self, version: str, futures: list[Future[Lease]]) -> None:
        resident = self._residents[version]
        self._residents.move_to_end(version)
        for future in futures:
            if future.set_running_or_notify_cancel():
                resident.requests += 1
                future.set_result(Lease(resident.voice, partial(self._release, resident)))

    def _release(self, resident: _Resident) -> None:
        with self._changed:
            resident.requests -= 1
            self._changed.notify_all()

    def _work(self) -> None:
        while wanted := self._next():
            try:
                version = self._load(wanted.found)
            except BaseException as error:
                with self._changed:
                    self._waiting.remove(wanted)
                    for future in wanted.futures:
                        if future.set_running_or_notify_cancel():
                            future.set_exception(error)
            else:
                with self._changed:
                    self._waiting.remove(wanted)
                    self._lend(version, wanted.futures)
        with self._changed:
            for wanted in self._waiting:
                for future in wanted.futures:
                    future.cancel()

    def _next(self) -> _Wanted | None:
        """Return what is asked for longest; None at the end."""
        with self._changed:
            while True:
                while self._waiting and all(future.cancelled() for future in self._waiting[0].futures):
                    self._waiting.popleft()
                if self._is_closed:
                    return None
                if self._waiting:
                    return self._waiting[0]
                self._changed.wait()

    def _load(self, found: FoundAdapter) -> str:
        """Bring an adapter into memory, and return its version: that of its files now.

        Raises:
            LoratuneError: it is refused.
        """
        if found.version in self._residents:  # it got no more requests for a while
            return found.version
        opened, version = self._open(found)
        if version in self._residents:
            return version
        for warning in opened.warnings:
            self._warn(warning)
        placed = self._put(opened, self._make_room(), self._free.pop())
        with self._changed:
            self._residents[version] = _Resident(ServedModel(opened.encoder, placed, version))
            self.loads += 1
        return version

    def _open(self, found: FoundAdapter) -> tuple[OpenedAdapter, str]:
        """Open an adapter whose files stay the same meanwhile; return it with their version."""
        for _ in range(TRIES):
            version, error = version_of(found.path), None
            try:
                opened = self._opener.open(found.path)
            except LoratuneError as refused:
                error = refused
            if version is not None and version_of(found.path) == version:
                if error:
                    raise error
                return opened, version
        raise LoratuneError(f"{found.path}: its files are being changed; try again later", Exit.IO)

    def _make_room(self) -> str | None:
        """Return PEFT's name of an adapter that nobody uses any more; None if there is room for another one."""
        with self._changed:
            if self._vacant:
                return self._vacant.pop()
            if len(self._residents) < self.most:
                return None
            try:
                while not self._is_closed:
                    unused = next((key for key, one in self._residents.items() if not one.requests), None)
                    if unused is not None:
                        self.evictions += 1
                        return self._residents.pop(unused).voice.adapter
                    self._closing = next(iter(self._residents))
                    self._changed.wait()
            finally:
                self._closing = None
        raise LoratuneError("the server is stopping", Exit.IO)

    def _put(self, opened: OpenedAdapter, leaving: str | None, name: str) -> str:
        """Put an adapter on the model, in the place of one if given, and return PEFT's name for it."""
        held = [one for one in (name, leaving) if one is not None]
        try:
            placed: str = self._engine.worker.between_steps(partial(self._place, opened, leaving, name)).result()
            held.remove(placed)
            return placed
        finally:
            for one in held:
                (self._vacant if one in self._attached.names else self._free).append(one)

    def _place(self, opened: OpenedAdapter, leaving: str | None, name: str) -> str:
        """Do that in the engine's thread."""
        try:
            if leaving is not None:
                return self._attached.exchange(opened.read, leaving, name)
            self._attached.put(opened.read, name)
            return name
        finally:
            self._engine.use(self._attached.model)
