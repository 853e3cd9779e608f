"""Names inside a run folder, how it comes to be: made, marked and sealed.

run/
  recipe.yaml      resolved; loads back to an equal Recipe
  manifest.json    base, template, data, versions, file hashes: everything later commands check or need
  status.json      where the run stands: running, interrupted, failed, finished
  adapter/         plain PEFT folder with the tokenizer's files
  checkpoints/     step-000050/ …
  metrics.jsonl    one line per logged step
  report.json, loss.png
  probe.json       some validation rows as ids, on which a merged or exported model has to prove itself
"""

from __future__ import annotations

import errno
import hashlib
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from loratune import console
from loratune.errors import Exit, LoratuneError
from loratune.plain_files import bounded_lines, open_plain, read_json_object
from loratune.recipe.loading import dump_recipe
from loratune.recipe.sections import Recipe
from loratune.writing import PROGRAM as PROGRAM
from loratune.writing import TEMPORARY_NAME, remove, remove_unfinished, try_to_write, write_json, write_text

FORMAT_VERSION = 1
RECIPE, MANIFEST, STATUS, REPORT = "recipe.yaml", "manifest.json", "status.json", "report.json"
ADAPTER, CHECKPOINTS, METRICS, PLOT, PROBE = "adapter", "checkpoints", "metrics.jsonl", "loss.png", "probe.json"
LOCK, LOCK_OWNER = ".lock", ".lock-owner.json"
TRACKER_LOGS = "runs"
RESUMED = (CHECKPOINTS, METRICS, TRACKER_LOGS, ADAPTER, MANIFEST)
"""What a run that goes on begins with; an adapter of before is replaced only at the end."""
CONTENTS = (RECIPE, MANIFEST, STATUS, REPORT, ADAPTER, CHECKPOINTS, METRICS, PLOT, PROBE, TRACKER_LOGS)
VERIFICATION = "verification.json"  # of a merged or exported folder
SEALED_BY = "sha256"
"""In a manifest: the hash of all that it says."""


def prepare_output(output: Path, overwrite: bool, kind: str = "run", marker: str = STATUS) -> None:
    """Check, before anything long starts, that a folder may be written.

    Args:
        output: the folder.
        overwrite: whether an earlier one of the same kind may be replaced.
        kind: what it will be, for messages.
        marker: the file by which loratune knows its own folders of this kind.

    Raises:
        LoratuneError: it holds something already, or cannot be written to.
    """
    _check_name(output)
    if marker == VERIFICATION and (output.is_mount() or output.resolve() == Path.cwd()):
        raise LoratuneError(
            f"{output} cannot be replaced in one step; choose a folder inside it with --output", Exit.USAGE
        )
    if output.is_dir() and any(not _is_passing(path.name) for path in output.iterdir()):
        if not _is_ours(output / marker, kind):
            _tell_of_damaged_status(output)
            raise LoratuneError(
                f"{output} holds something that is not a {kind}; choose another folder with --output", Exit.USAGE
            )
        if not overwrite:
            raise LoratuneError(
                f"{output} already holds a {kind}; choose another folder with --output, or replace it with --overwrite",
                Exit.USAGE,
            )
    elif output.exists() and not output.is_dir():
        raise LoratuneError(f"{output} is a file; choose a folder with --output", Exit.IO)
    _check_writable(output)


def _check_name(output: Path) -> None:
    """Refuse a name that cannot be a folder's, before anything else asks the system about it."""
    try:
        if output.is_symlink() and not output.exists():
            raise LoratuneError(f"{output} is a link to nothing; choose a folder with --output", Exit.IO)
        output.lstat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # too long, or with a zero byte in it
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            return  # trying to write will tell
        reason = error.strerror if isinstance(error, OSError) else error
        raise LoratuneError(f"{output}: {reason}; choose another name with --output", Exit.USAGE) from error


def _is_ours(marker: Path, kind: str) -> bool:
    """Whether loratune made a folder of this kind; a status.json alone could be anybody's."""
    try:
        values = read_json_object(marker)
        return values.get("program") == PROGRAM and values.get("kind", kind) == kind
    except LoratuneError:
        return False


def _tell_of_damaged_status(output: Path) -> None:
    """Tell a run whose status.json alone is damaged or gone from what is no run.

    Raises:
        LoratuneError: its manifest is as loratune has written it.
    """
    try:
        manifest = read_manifest(output)
    except LoratuneError:
        return
    if SEALED_BY in manifest or isinstance(manifest.get("base"), dict):
        mended = json.dumps({"program": PROGRAM, "state": "interrupted"})
        raise LoratuneError(
            f"{output / STATUS}: missing or damaged, while {MANIFEST} beside it is that of a run; restore it, or write "
            f"{mended} into it, and give the same command again",
            Exit.USAGE,
        )


def _is_passing(name: str) -> bool:
    """Whether a file says nothing of what a folder is for: another process is looking at it, or was killed there."""
    return name in (LOCK, LOCK_OWNER) or TEMPORARY_NAME.fullmatch(name) is not None


def _check_writable(output: Path) -> None:
    existing = next(place for place in [output, *output.absolute().parents] if place.exists())
    try:
        try_to_write(existing)
    except OSError as error:
        raise LoratuneError(f"{output}: cannot write to {existing}: {error.strerror}", Exit.IO) from error


def check_links(output: Path) -> None:
    """Refuse to go on with a run that would write and remove what lies outside its folder.

    Raises:
        LoratuneError: a folder of the run is a link.
    """
    linked = [output / name for name in (CHECKPOINTS, TRACKER_LOGS) if (output / name).is_symlink()]
    if linked:
        named = " and ".join(map(str, linked))
        raise LoratuneError(
            f"{named}: a link; a run writes and removes files in its own folder alone. Move what it leads to into "
            f"{output}, or move the whole run there and let {output} be the link",
            Exit.IO,
        )


def begin_run(
    output: Path, recipe: Recipe, manifest: dict[str, Any], keep: bool = False, steps: int | None = None
) -> None:
    """Start a run folder; of an earlier run there, what a run consists of is removed, and nothing else.

    Args:
        output: the folder.
        recipe: the run's.
        manifest: what later commands need to know.
        keep: leave what has been trained, because it goes on from there.
        steps: that it will make.
    """
    removed = [name for name in CONTENTS if name != STATUS and not (keep and name in RESUMED)]
    try:
        output.mkdir(parents=True, exist_ok=True)
        # First, so that wherever the process is killed the folder is known to be a run's.
        set_status(output, "running", **({"steps": steps} if steps else {}))
        # Before the rest, since what a killed process had put aside gets its name again.
        for left in [*remove_unfinished(output), *remove_unfinished(output / CHECKPOINTS)]:
            console.say(f"removed {left}, which an earlier process had not finished")
        for name in removed:
            remove(output / name)
    except OSError as error:
        raise LoratuneError(f"{output}: cannot be made: {error.strerror}", Exit.IO) from error
    write_text(output / RECIPE, dump_recipe(recipe))
    known = read_manifest(output) if (output / MANIFEST).is_file() else {}
    values = {"format_version": FORMAT_VERSION, "created": known.get("created", _now()), **manifest}
    files = {name: record for name, record in known.get("files", {}).items() if name != PROBE}  # written anew
    write_manifest(output, values | {"files": files | {RECIPE: sealed(output / RECIPE)}})


def set_status(output: Path, state: str, **details: Any) -> None:
    """Record where the run stands."""
    write_json(output / STATUS, {"program": PROGRAM, "state": state, "time": _now(), **details})


def seal_run(output: Path) -> None:
    """Add size and sha256 of every lasting file to the manifest; the last step of a run."""
    adapter_files = sorted(path for path in (output / ADAPTER).rglob("*") if path.is_file())
    paths = [output / RECIPE, *(path for path in [output / PROBE] if path.is_file()), *adapter_files]
    files = {str(path.relative_to(output)): sealed(path) for path in paths}
    write_manifest(output, read_manifest(output) | {"files": files})


def seal_file(output: Path, name: str) -> None:
    """Add one file to the manifest of a run that goes on."""
    manifest = read_manifest(output)
    write_manifest(output, manifest | {"files": manifest.get("files", {}) | {name: sealed(output / name)}})


def sealed(path: Path) -> dict[str, Any]:
    """What is recorded of a file, to know it again."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def write_manifest(run: Path, values: dict[str, Any]) -> None:
    """Replace a run's manifest, with a hash of its own values in it."""
    own = {name: value for name, value in values.items() if name != SEALED_BY}
    write_json(run / MANIFEST, own | {SEALED_BY: values_sha256(own)})


def read_manifest(run: Path) -> dict[str, Any]:
    """What a run's manifest says, its own hash included where it has one: those of earlier versions have none.

    Raises:
        LoratuneError: it is missing, damaged, changed, or written by another version of loratune.
    """
    values = read_json_object(run / MANIFEST)
    if values.get("format_version") != FORMAT_VERSION:
        raise LoratuneError(
            f"{run}: made by another version of loratune (format {values.get('format_version')}, this one reads "
            f"{FORMAT_VERSION})",
            Exit.MODEL,
        )
    own = {name: value for name, value in values.items() if name != SEALED_BY}
    if values.get(SEALED_BY) not in (None, values_sha256(own)):
        raise LoratuneError(
            f"{run / MANIFEST}: has been changed since the run wrote it, so nothing of the run can be checked; restore "
            f"it, or copy {run / ADAPTER} elsewhere and give the copy, which is taken as a plain adapter",
            Exit.MODEL,
        )
    return values


def values_sha256(values: dict[str, Any]) -> str:
    """Hex sha256 of JSON values, whatever their order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open_plain(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_metrics(output: Path) -> list[dict[str, float]]:
    """The records of a run; a line that is being written, or that a crash has cut off, is none."""
    path, records = output / METRICS, list[dict[str, float]]()
    if not path.is_file():
        return records
    with open_plain(path) as lines:
        # After a power cut a file may end in anything, a hole of many gigabytes too.
        for line in bounded_lines(lines):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
