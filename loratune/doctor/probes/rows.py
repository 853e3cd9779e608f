"""Whether a source of rows can be opened."""

from __future__ import annotations

from itertools import islice

from loratune.data.reading.files import open_rows
from loratune.data.sources import hub_name, parse_source
from loratune.errors import LoratuneError
from loratune.recipe.data_sections import SourceSettings


def check_rows_of(source: str, encoding: str) -> bool:
    """Read the first row of a source; return False for a hub's data set that is not on this machine.

    Raises:
        LoratuneError: a file is missing, or cannot be read.
    """
    name = parse_source(SourceSettings(path=source)).name
    try:
        for _ in islice(open_rows(name, encoding), 1):
            pass
    except LoratuneError:
        if hub_name(name):
            return False
        raise
    return True
