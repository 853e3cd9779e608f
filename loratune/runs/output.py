"""Prepares output folders, creates run folders, and seals them."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

from loratune import console
from loratune.errors import Exit, LoratuneError
from loratune.plain_files import read_json_object
from loratune.recipe.loading import dump_recipe
from loratune.recipe.sections import Recipe
from loratune.runs.folder import (
    ADAPTER,
    CHECKPOINTS,
    CONTENTS,
    FINDINGS,
    LOCK,
    LOCK_OWNER,
    MANIFEST,
    PROBE,
    RECIPE,
    REPORT,
    RESUMED,
    STATUS,
    TRACKER_LOGS,
    VERIFICATION,
    now,
    sealed,
)
from loratune.runs.lock import in_use, lock_holder
from loratune.runs.manifest import Manifest, read_manifest, write_files, write_manifest
from loratune.runs.report import Report, write_report
from loratune.runs.status import MENDED, read_status, set_status
from loratune.writing import PROGRAM, TEMPORARY_NAME, remove, remove_unfinished, try_to_write, write_text


def prepare_output(output: Path, overwrite: bool, kind: str = "run", marker: str = STATUS) -> None:
    """Check that a folder may be written, before any long work.

    Args:
        output: the folder.
        overwrite: whether an existing one of the same kind may be replaced.
        kind: kind of the folder, for messages.
        marker: the file that identifies loratune's folders of this kind.

    Raises:
        LoratuneError: it has other contents, or is not writable.
    """
    _check_name(output)
    named = f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
    if marker == VERIFICATION and (output.is_mount() or output.resolve() == Path.cwd()):
        raise LoratuneError(
            f"{output} cannot be replaced in one step; choose a folder inside it with --output", Exit.USAGE
        )
    if output.is_dir() and any(not _is_passing(path.name) for path in output.iterdir()):
        if not _is_ours(output / marker, kind):
            if marker == STATUS:
                _tell_of_damaged_status(output)
            raise LoratuneError(
                f"{output} holds something that is not {named}; choose another folder with --output", Exit.USAGE
            )
        if marker == STATUS and lock_holder(output):
            raise in_use(output)
        if not overwrite:
            resumable = "go on with it with --resume, " if marker == STATUS and _is_unfinished(output) else ""
            raise LoratuneError(
                f"{output} already holds {named}; {resumable}choose another folder with --output, or replace it with "
                "--overwrite",
                Exit.USAGE,
            )
    elif output.exists() and not output.is_dir():
        raise LoratuneError(f"{output} is a file; choose a folder with --output", Exit.IO)
    _check_writable(output)


def require_apart(output: Path, kind: str, place: Path) -> None:
    """Refuse an output that would lie in what it is made of, or replace it.

    Args:
        output: output folder, resolved.
        kind: what it is made of, for the message.
        place: folder of that.

    Raises:
        LoratuneError: one folder lies in the other.
    """
    source = place.resolve()
    if output.is_relative_to(source) or source.is_relative_to(output):
        raise LoratuneError(f"{output} and the {kind} at {source} overlap; choose another --output", Exit.USAGE)


def _check_name(output: Path) -> None:
    """Raise for a path that cannot be a folder's, before other system calls use it."""
    try:
        if output.is_symlink() and not output.exists():
            raise LoratuneError(f"{output} is a link to nothing; choose a folder with --output", Exit.IO)
        output.lstat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # too long, or contains a NUL
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            return  # the write test reports it
        reason = error.strerror if isinstance(error, OSError) else error
        raise LoratuneError(f"{output}: {reason}; choose another name with --output", Exit.USAGE) from error


def _is_ours(marker: Path, kind: str) -> bool:
    """Return whether loratune created a folder of this kind; a status.json alone may be another program's."""
    try:
        values = read_json_object(marker)
        return values.get("program") == PROGRAM and values.get("kind", kind) == kind
    except LoratuneError:
        return False


def _tell_of_damaged_status(output: Path) -> None:
    """Raise if a folder is a run whose status.json is damaged or missing.

    Raises:
        LoratuneError: the folder has a valid manifest.
    """
    try:
        manifest = read_manifest(output)
    except LoratuneError:
        return
    if manifest.is_sealed or manifest.base:
        raise LoratuneError(
            f"{output / STATUS}: missing or damaged, while {MANIFEST} beside it is that of a run; restore it, or write "
            f"{MENDED} into it, and give the same command again",
            Exit.USAGE,
        )


def _is_unfinished(output: Path) -> bool:
    """Return whether a run has a checkpoint and can go on from it; a diverged one would diverge again."""
    return read_status(output).state not in ("finished", "diverged") and any((output / CHECKPOINTS).glob("*"))


def _is_passing(name: str) -> bool:
    """Return whether a file does not count as content: a lock, or a leftover of a killed process."""
    return name in (LOCK, LOCK_OWNER) or TEMPORARY_NAME.fullmatch(name) is not None


def _check_writable(output: Path) -> None:
    existing = next(place for place in [output, *output.absolute().parents] if place.exists())
    try:
        try_to_write(existing)
    except OSError as error:
        raise LoratuneError(f"{output}: cannot write to {existing}: {error.strerror}", Exit.IO) from error


def check_links(output: Path) -> None:
    """Raise if resuming a run would write or remove files outside its folder.

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


def clear_unfinished(output: Path) -> None:
    """Remove what a killed process had begun to write into a run folder, whose lock the caller holds."""
    for left in [*remove_unfinished(output), *remove_unfinished(output / CHECKPOINTS)]:
        console.say(f"removed {left}, which an earlier process had not finished")


def begin_run(output: Path, recipe: Recipe, manifest: Manifest, keep: bool = False, steps: int | None = None) -> None:
    """Create a run folder; files of an earlier run are removed, and nothing else.

    Args:
        output: the folder.
        recipe: the run's recipe.
        manifest: the run's manifest.
        keep: keep checkpoints and metrics, to resume.
        steps: planned number of steps.
    """
    removed = [name for name in CONTENTS if name != STATUS and not (keep and name in RESUMED)]
    try:
        output.mkdir(parents=True, exist_ok=True)
        # First, so that the folder is recognisable as a run if the process is killed.
        set_status(output, "running", **({"steps": steps} if steps else {}))
        # Before removing files, since it may restore what a killed process had moved away.
        clear_unfinished(output)
        for name in removed:
            remove(output / name)
    except OSError as error:
        raise LoratuneError(f"{output}: cannot be made: {error.strerror}", Exit.IO) from error
    write_text(output / RECIPE, dump_recipe(recipe))
    known = read_manifest(output) if (output / MANIFEST).is_file() else None
    files = {name: record for name, record in ((known and known.files) or {}).items() if name not in removed}
    files[RECIPE] = sealed(output / RECIPE)
    write_manifest(output, replace(manifest, created=known.created if known else now(), files=files))


def seal_run(output: Path) -> None:
    """Add size and sha256 of all permanent files to the manifest; the last step of a run."""
    adapter_files = sorted(path for path in (output / ADAPTER).rglob("*") if path.is_file())
    others = (path for path in (output / PROBE, output / FINDINGS, output / REPORT) if path.is_file())
    paths = [output / RECIPE, *others, *adapter_files]
    files = {str(path.relative_to(output)): sealed(path) for path in paths}
    write_files(output, files)


def seal_file(output: Path, name: str) -> None:
    """Add one file to the manifest of a running run."""
    write_files(output, {**(read_manifest(output).files or {}), name: sealed(output / name)})


def replace_report(output: Path, report: Report) -> None:
    """Replace a finished run's report. Killed in between, it leaves one without a hash, not a wrong one."""
    files = read_manifest(output).files or {}
    write_files(output, {name: record for name, record in files.items() if name != REPORT})
    write_report(output, report)
    seal_file(output, REPORT)
