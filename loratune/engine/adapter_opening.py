"""Opens an adapter for a base that is loaded, with the checks of adapters that are given at the start."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from loratune.data.encoding.encoder import Encoder
from loratune.engine.loading import ServedBase, about_template, other_quantization
from loratune.errors import Exit, LoratuneError, reason_of
from loratune.model.adapter.files import CONFIG_FILE, WEIGHTS_FILE
from loratune.model.adapter.other_layouts import in_peft_layout
from loratune.model.adapter.reading import AdapterReader, ReadAdapter
from loratune.protocols import CausalModel
from loratune.runs.base_check import check_vocabulary
from loratune.runs.opening import open_adapter


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter that has passed all checks and is on no model yet."""

    read: ReadAdapter
    encoder: Encoder
    warnings: tuple[str, ...]


class AdapterOpener:
    """Opens adapters of a base one after the other.

    Args:
        base: what they are checked against; its bytes are hashed from now on.
        name: of the base, for messages.
        model: the base, with or without adapters; nothing may run it now.
    """

    def __init__(self, base: ServedBase, name: str, model: CausalModel) -> None:
        self._base, self._name = base, name
        self._reader = AdapterReader(model)
        base.hashes.start()

    def open(self, path: Path) -> OpenedAdapter:
        """Open an adapter; the model may run meanwhile.

        Args:
            path: run folder, checkpoint or plain PEFT folder.

        Raises:
            LoratuneError: a file is missing or damaged, or the adapter does not match the base.
        """
        base, reader = self._base, self._reader
        source = open_adapter(path, base.force)
        check, encoder = base.opened(source, self._name)
        with _copied(in_peft_layout(source.adapter, reader.shapes), source.adapter) as folder:
            read = replace(reader.read(folder), folder=source.adapter)
        warnings = check_vocabulary(source, base.folder, reader.vocabulary, read.vocabulary)
        warnings += [*check.finish(), *about_template(encoder, source.prompt)]
        warnings += other_quantization(source, base.settings, base.settings.base)
        return OpenedAdapter(read, encoder, tuple(warnings))


@contextmanager
def _copied(folder: Path, shown: Path) -> Iterator[Path]:
    """Copy the files of an adapter: the system ends a process that reads a mapped file which is being cut off.

    Args:
        folder: a PEFT folder.
        shown: its name in messages.

    Yields:
        The copies' folder. Tensors that are mapped from there stay valid when it is gone.
    """
    with tempfile.TemporaryDirectory(prefix="loratune-") as place:
        try:
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, Path(place) / name)
            yield Path(place)
        except OSError as error:
            raise LoratuneError(f"{shown}: cannot be read: {reason_of(error)}", Exit.IO) from error
        except LoratuneError as error:
            raise LoratuneError(error.message.replace(place, str(shown)), error.exit_code) from error
