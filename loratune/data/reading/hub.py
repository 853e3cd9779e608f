"""Loads the rows of a hub dataset that the user named explicitly."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from typing import Any

from loratune.data.reading.rows import Row
from loratune.data.sources import HubName
from loratune.errors import Exit, LoratuneError, hub_reason_of
from loratune.extras import required

BATCH_ROWS = 256


class HubRows:
    """One split of a dataset, downloaded and cached by its hub's own library."""

    def __init__(self, name: str, dataset: Any) -> None:
        self.name = name
        self.dataset = dataset

    def sha256(self) -> str:
        """Return a hash of the dataset's identity, in place of a file's hash."""
        # The library's fingerprint of the data is only available as a private attribute.
        parts = [self.name, str(getattr(self.dataset, "_fingerprint", "")), str(len(self.dataset))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def __iter__(self) -> Iterator[Row]:
        if not len(self.dataset):
            raise LoratuneError(f"{self.name}: 0 rows", Exit.DATA)
        number = 0
        for columns in self.dataset.iter(batch_size=BATCH_ROWS):
            for values in zip(*columns.values(), strict=True):
                number += 1
                yield Row(dict(zip(columns, values, strict=True)), number)


def open_hub(name: str, parts: HubName) -> HubRows:
    """Load one split of a hub dataset. Code that comes with a dataset is never run.

    Args:
        name: the name as the user wrote it, for errors.
        parts: the parsed name.

    Raises:
        LoratuneError: the hub's library is missing, or the hub returned an error.
    """
    library = {"hf": "datasets", "ms": "modelscope.msdatasets"}[parts.hub]
    package, extra = library.partition(".")[0], "modelscope" if parts.hub == "ms" else ""
    with required(name, extra, Exit.DATA, package):
        module = importlib.import_module(library)
    try:
        return HubRows(name, _load(module, parts))
    except Exception as error:  # each hub client and its HTTP library raise their own kinds
        hub = {"hf": "the Hugging Face hub", "ms": "ModelScope"}[parts.hub]
        raise LoratuneError(
            f"{name}: loading from {hub} failed: {hub_reason_of(error)}\n"
            "check the name, the split and the network, or download its file and give that",
            Exit.DATA,
        ) from error


def _load(module: Any, parts: HubName) -> Any:
    if parts.hub == "hf":
        return module.load_dataset(parts.dataset, parts.config, split=parts.split)
    dataset = module.MsDataset.load(parts.dataset, subset_name=parts.config, split=parts.split)
    return dataset.to_hf_dataset() if hasattr(dataset, "to_hf_dataset") else dataset
