"""Names inside a run folder, and simple reads and writes.

run/
  recipe.yaml      all settings; loads back to an equal Recipe
  manifest.json    base, template, data, versions, file hashes: everything that later commands need or check
  status.json      state of the run: running, interrupted, failed, finished
  adapter/         plain PEFT folder with the tokenizer's files
  checkpoints/     step-000050/ …
  metrics.jsonl    one line per logged step
  report.json, loss.png
  probe.json       validation rows as ids, to verify merged and exported models
  findings.json    what the checks of the rows have found
  tags.json        the user's names for the run; not sealed
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from loratune.plain_files import bounded_lines, open_plain
from loratune.writing import PROGRAM as PROGRAM

FORMAT_VERSION = 1
"""Of manifest.json."""
SEALED_BY = "sha256"
"""Key of a file's hash of all else that it says."""
RECIPE, MANIFEST, STATUS, REPORT = "recipe.yaml", "manifest.json", "status.json", "report.json"
ADAPTER, CHECKPOINTS, METRICS, PLOT, PROBE = "adapter", "checkpoints", "metrics.jsonl", "loss.png", "probe.json"
FINDINGS, TAGS = "findings.json", "tags.json"
LOCK, LOCK_OWNER = ".lock", ".lock-owner.json"
TRACKER_LOGS = "runs"
RESUMED = (CHECKPOINTS, METRICS, TRACKER_LOGS, ADAPTER, MANIFEST, TAGS)
"""What a resumed run keeps; an existing adapter is replaced only at the end."""
CONTENTS = (
    *(RECIPE, MANIFEST, STATUS, REPORT, ADAPTER, CHECKPOINTS, METRICS, PLOT, PROBE, FINDINGS, TAGS),
    TRACKER_LOGS,
)
VERIFICATION = "verification.json"  # of a merged or exported folder
NEWEST_BYTES = 1 << 14
"""Of the metrics: the lines of the newest steps."""


def sealed(path: Path) -> dict[str, Any]:
    """Return the record of a file: its size and hash."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def values_sha256(values: dict[str, Any]) -> str:
    """Return the hex sha256 of JSON values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def with_seal(values: dict[str, Any]) -> dict[str, Any]:
    """JSON values with their hash among them."""
    return values | {SEALED_BY: values_sha256(values)}


def has_changed(values: Mapping[str, Any]) -> bool:
    """Whether values are others than their hash was made of; those without a hash may be any."""
    own = values.get(SEALED_BY)
    return own is not None and own != values_sha256({key: value for key, value in values.items() if key != SEALED_BY})


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open_plain(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_metrics(output: Path) -> list[dict[str, float]]:
    """Return the records of a run, skipping incomplete lines, and others that are not loratune's."""
    path = output / METRICS
    if not path.is_file():
        return []
    with open_plain(path) as lines:
        return records_of(bounded_lines(lines))


def newest_metrics(output: Path) -> list[dict[str, float]]:
    """Return the same of the end of the file alone, so that the time does not grow with the run."""
    path = output / METRICS
    if not path.is_file():
        return []
    with open_plain(path) as lines:
        lines.seek(max(0, path.stat().st_size - NEWEST_BYTES))
        return records_of(bounded_lines(lines))  # the line that is cut is no JSON


def trained_steps(records: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return the records of the adapter: the validation of step 0 is the base's, and would look like no progress."""
    return [record for record in records if record["step"]]


def records_of(lines: Iterable[bytes]) -> list[dict[str, float]]:
    """Return the records of a run in lines of its metrics."""
    records = list[dict[str, float]]()
    # After a power cut, a file may end with anything, even a hole of many gigabytes.
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and _are_numbers(record.values()):
            records.append(record)
    return records


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def now() -> str:
    """Return the current time in ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
