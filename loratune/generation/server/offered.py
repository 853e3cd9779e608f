"""The adapters of a store as clients name them, and vLLM's endpoints that load and unload them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import PurePath

from loratune.engine.adapter_store import AdapterStore
from loratune.engine.loading import Lease
from loratune.errors import LoratuneError
from loratune.generation.server.failures import ApiError, refused_adapter
from loratune.runs.adapter_folders import FoundAdapter

MOST_NAMES = 10_000
"""Names that clients may give to adapters."""


class OfferedAdapters:
    """Names of adapters: those of the store's folders, and others that clients have given to them.

    Args:
        store: the adapters.
        taken: names of the base and of adapters that are always there.
    """

    def __init__(self, store: AdapterStore, taken: list[str]) -> None:
        self.store = store
        self._taken = taken
        self._given: dict[str, str] = {}
        """Name that a client has loaded → name of the folder."""
        self._withdrawn: set[str] = set()
        """Names of folders that a client has unloaded."""

    async def all(self) -> Mapping[str, FoundAdapter]:
        """Return the adapters by name."""
        folders = await asyncio.to_thread(self.store.folders.all)
        own = {name: found for name, found in folders.items() if name not in self._withdrawn}
        return own | {name: folders[folder] for name, folder in self._given.items() if folder in folders}

    async def find(self, name: str) -> FoundAdapter | None:
        """Return an adapter as its files are now; None if there is none of this name."""
        folder = self._given.get(name, name)
        if folder == name and name in self._withdrawn:
            return None
        return await asyncio.to_thread(self.store.folders.find, folder)

    async def lease(self, found: FoundAdapter) -> Lease:
        """Wait for an adapter to be in memory.

        Raises:
            ApiError: it is refused, with the reason.
        """
        future = self.store.lease(found)
        try:
            return await asyncio.wrap_future(future)
        except LoratuneError as error:
            raise refused_adapter(error, self.store.folders.folder) from error
        except asyncio.CancelledError:
            if not future.cancel():
                future.add_done_callback(_release)
            raise

    async def load(self, name: str, path: str, in_place: bool) -> None:
        """Load an adapter of the store, and offer it under a name.

        Args:
            name: the name.
            path: its folder: a name in the store's folder, or that folder's path before it. It is compared with what
                is in the store, and never opened.
            in_place: offer it although the name is loaded already.

        Raises:
            ApiError: the name or the folder is not allowed, or the adapter is refused.
        """
        self._check_name(name)
        if name in self._given and not in_place:
            raise ApiError(
                400, f"{name} has already been loaded; load_inplace replaces it", "already_loaded", "lora_name"
            )
        folder = self._folder_of(path)
        found = await asyncio.to_thread(self.store.folders.find, folder) if folder else None
        if found is None or folder is None:
            raise ApiError(404, f"no adapter is in the store at {path}", "adapter_not_found", "lora_path")
        if name != folder and name in await asyncio.to_thread(self.store.folders.all):
            raise ApiError(400, f"{name} is the name of another folder in the store", "name_taken", "lora_name")
        (await self.lease(found)).release()
        self._given[name] = folder
        self._withdrawn.discard(name)

    async def unload(self, name: str) -> None:
        """Offer a name no more; requests that are being answered are not affected.

        Raises:
            ApiError: nothing in the store has this name.
        """
        if await self.find(name) is None and name not in self._given:
            raise ApiError(404, f"no adapter of the store is called {name}", "adapter_not_found", "lora_name")
        if self._given.pop(name, name) == name:
            self._withdrawn.add(name)

    def _check_name(self, name: str) -> None:
        if name in self._taken:
            raise ApiError(400, f"{name} is the name of another model", "name_taken", "lora_name")
        if not name.isprintable():
            raise ApiError(400, "lora_name has characters that are not printable", "invalid_value", "lora_name")
        if name not in self._given and len(self._given) >= MOST_NAMES:
            raise ApiError(400, f"{MOST_NAMES:,} names are loaded already; unload some", "too_many", "lora_name")

    def _folder_of(self, path: str) -> str | None:
        """Return the name of the folder that a client's path has in the store, without looking at the path."""
        place, folder = PurePath(path), self.store.folders.folder
        parents = {".", str(folder), str(folder.absolute()), os.path.realpath(folder)}
        return place.name if str(place.parent) in parents else None


def _release(future: Future[Lease]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().release()
