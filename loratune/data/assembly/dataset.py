"""Sequences as the trainer takes them: a dataset of ids and labels that stays in its files."""

from __future__ import annotations

from datasets import Dataset, concatenate_datasets

from loratune.data.assembly.split import Split


def as_dataset(split: Split) -> Dataset:
    """The sequences of a split.

    Returns:
        Columns input_ids and labels, lists of int of equal length in a row, mapped from the cache.
    """
    parts = []
    for loaded, chosen in zip(split.pool.sources, split.parts, strict=True):
        if len(chosen):
            rows = Dataset.from_file(str(loaded.rows.path)).select_columns(["input_ids", "labels"])
            parts.append(rows.select(chosen))
    return concatenate_datasets(parts)
