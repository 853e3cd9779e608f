"""Reads the rows of Parquet files."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow
from pyarrow.parquet import ParquetFile

from loratune.data.reading.rows import Row
from loratune.errors import Exit, LoratuneError, first_line_of

BATCH_ROWS = 256


def rows_of_parquet(name: str) -> Iterator[Row]:
    """Yield the rows of a file, numbered from 1, in small batches.

    Raises:
        LoratuneError: the file is damaged, not Parquet, or empty.
    """
    number = 0
    try:
        with ParquetFile(name) as file:
            columns = file.schema_arrow.names
            repeated = sorted({column for column in columns if columns.count(column) > 1})
            if repeated:
                raise LoratuneError(f"{name}: has the column {repeated[0]!r} more than once; remove one", Exit.DATA)
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(value, number)
    except (pyarrow.ArrowException, OSError) as error:
        raise LoratuneError(
            f"{name}: cannot be read as Parquet after row {number}: {first_line_of(error)}; copy or write it again",
            Exit.DATA,
        ) from error
    if not number:
        raise LoratuneError(f"{name}: 0 rows", Exit.DATA)
