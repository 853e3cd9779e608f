"""A merged or exported folder, or a run, looked at again: whether its files are as they were when it was verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.runs.folder import MANIFEST, VERIFICATION
from loratune.runs.opening import open_settled_adapter
from loratune.runs.verification import check_files, read_verification


def verify_folder(folder: Path) -> dict[str, Any]:
    """Read every file of a folder and compare its hash with the recorded one.

    Args:
        folder: a merged model, an export, or a run.

    Returns:
        kind, what verification.json says was proved (None for a run), files (how many), remarks (differences in files
        that no program loads).

    Raises:
        LoratuneError: there is nothing to compare with, or a file that programs load is not as it was.
    """
    values = read_verification(folder)
    if values is None:
        return _verify_run(folder)
    check = check_files(folder, values)
    if check is None:
        raise LoratuneError(
            f"{folder / VERIFICATION} holds no hashes: an earlier version of loratune made the folder. Make it again "
            "to have its files verified",
            Exit.MODEL,
        )
    if check.problems:
        raise LoratuneError(f"{folder} is not as it was verified:\n{bullet_list(check.problems)}", Exit.MODEL)
    proved = {key: value for key, value in values.items() if key != "files"}
    return {"folder": str(folder), "kind": values.get("kind"), "files": check.files, "remarks": check.remarks,
            "proved": proved}  # fmt: skip


def _verify_run(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise LoratuneError(
            f"{folder}: no {VERIFICATION} and no {MANIFEST} in it; give a merged model, an export or a run folder",
            Exit.MODEL,
        )
    source = open_settled_adapter(folder)
    files = (source.manifest or {}).get("files", {})
    return {"folder": str(folder), "kind": "run", "files": len(files), "remarks": [], "proved": None}
