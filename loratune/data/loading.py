"""Loads the sources of a recipe. A problem of one does not hide those of others, so that all are reported at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from loratune.data.checked_rows import check_filled, check_rows, judge_log
from loratune.data.checks.findings import Found
from loratune.data.encoding.loaded_source import LoadedSource, Rendering, load_source
from loratune.data.reading.files import open_rows
from loratune.data.sources import parse_source
from loratune.errors import Exit, LoratuneError
from loratune.recipe.data_sections import DataSettings, SourceSettings


class SourceLoader:
    """Loads sources under one recipe's settings.

    Args:
        data: the settings.
        rendering: how rows become ids.
        seed: seeds samples.
    """

    def __init__(self, data: DataSettings, rendering: Rendering, seed: int) -> None:
        self._data, self._rendering, self._seed = data, rendering, seed
        self.found: list[Found] = []
        """Rows that are left out because they cannot be trained on."""
        self.problems: dict[str, Exit] = {}
        """Why sources cannot be used → the exit code of such a problem."""

    def load(self, entries: Sequence[str | SourceSettings], may_repeat: bool = True) -> list[LoadedSource]:
        """Return the sources that can be read, including those that hold rows which cannot be trained on.

        Raises:
            LoratuneError: the disk or the template is at fault, not the rows or the recipe.
        """
        loaded = []
        for entry in entries:
            with _collected(self.problems):
                source = parse_source(entry)
                if source.repeat > 1 and not may_repeat:
                    raise LoratuneError(
                        f"{source.name}: validation rows are never repeated; remove #{source.repeat}x", Exit.USAGE
                    )
                one = load_source(source, self._data, self._rendering, self._seed)
                loaded.append(one)
                with _collected(self.problems):
                    check_filled(one.file, one.rows.log, self._data.placeholders)
                left_out = judge_log(one.file, one.rows.log, self._data)
                if left_out:
                    self.found.append(Found("bad_rows", "warn", one.rows.log.bad, left_out))
        return loaded


def problems_of_sources(entries: Sequence[str | SourceSettings], data: DataSettings) -> dict[str, Exit]:
    """Read all rows without encoding them, for recipes without a tokenizer at hand.

    Returns:
        Why sources cannot be used, as far as it shows without a tokenizer → the exit code of such a problem.
    """
    problems: dict[str, Exit] = {}
    for entry in entries:
        with _collected(problems):
            rows = check_rows(open_rows(parse_source(entry).name, data.encoding), data)
            deque(rows, maxlen=0)
            with _collected(problems):
                check_filled(rows.file, rows.log, data.placeholders)
            judge_log(rows.file, rows.log, data)
    return problems


@contextmanager
def _collected(problems: dict[str, Exit]) -> Iterator[None]:
    """Add an error of the data or the recipe to `problems` instead of raising it; what is found twice is told once."""
    try:
        yield
    except LoratuneError as error:
        if error.exit_code not in (Exit.DATA, Exit.USAGE):
            raise
        problems.setdefault(str(error), error.exit_code)
