"""Wraps a split's sequences as a memory-mapped dataset for the trainer."""

from __future__ import annotations

from datasets import Dataset, concatenate_datasets

from loratune.data.assembly.split import Split


def as_dataset(split: Split) -> Dataset:
    """Return the sequences of a split, memory-mapped from the cache.

    Returns:
        Columns input_ids and labels; both lists have the same length within a row.
    """
    parts = []
    for loaded, chosen in zip(split.pool.sources, split.parts, strict=True):
        if len(chosen):
            rows = Dataset.from_file(str(loaded.rows.path)).select_columns(["input_ids", "labels"])
            parts.append(rows.select(chosen))
    return concatenate_datasets(parts)
