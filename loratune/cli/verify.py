"""`loratune verify`: checks whether a merged model, an export or a run has changed since it was verified."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loratune import console
from loratune.cli.documents import Document
from loratune.cli.flags import Adapter, Force, Json, Logits, MovedBase, adapter_folder
from loratune.errors import Exit, LoratuneError, counted
from loratune.imports import importing
from loratune.printable import LONGEST_PATH, shortened
from loratune.runs.folder import MANIFEST

if TYPE_CHECKING:
    from loratune.delivery.reverify import Verified

DETAILS = """\
Recomputes the sha256 of every file of a merged model or an export, and of a run's adapter, recipe, probe rows and
report, and compares it with verification.json or the run's manifest, which does not record a run's metrics and state.
If a file that a program would load has changed, is missing or was added, the exit code is 4. infer, serve and export
check a model's folder in the same way before they load it.

--adapter repeats the verification of a merge: every tensor, the logits, and some generations."""


def _printed() -> Any:
    from loratune.delivery.reverify import VerifiedValues

    return VerifiedValues


DOCUMENT = Document("verify", 1, _printed)
Folder = Annotated[Path, typer.Argument(help="A merged model, an export, or a run folder.", show_default=False)]


def command(
    folder: Folder,
    adapter: Adapter = None,
    base_model: MovedBase = None,
    logits: Logits = True,
    force: Force = False,
    json: Json = False,
) -> None:
    with importing():
        from loratune.delivery.merge.job import MergeOptions
        from loratune.delivery.reverify import verify_folder
        from loratune.delivery.verification.report import show_verification
        from loratune.runs.opening import open_settled_adapter
        from loratune.runs.verification import MergedModel

    if adapter is None and (base_model is not None or not logits or force):
        raise LoratuneError(
            "--base-model, --no-logits and --force are for the proof of a merge; give --adapter", Exit.USAGE
        )
    made_with = adapter_folder(adapter)
    source = open_settled_adapter(made_with, force) if made_with else None
    with console.status(f"reading {shortened(str(folder), LONGEST_PATH)}"):
        verified = verify_folder(folder, source, MergeOptions(model=base_model, logits=logits, force=force))
    for warning in verified.warnings:
        console.warn(warning)
    if json:
        DOCUMENT.write(verified.values())
        return
    for remark in verified.remarks:
        console.warn(f"{remark}; no program loads it")
    console.say(f"{folder}: {verified.kind}, {_found(verified)}", style="bold")
    if verified.proved and isinstance(verified.proved.proved, MergedModel):
        show_verification(verified.proved.proved, is_recorded=not verified.proved_again)


def _found(verified: Verified) -> str:
    """Say which files are as they were, and by what."""
    files = counted(verified.files, "file")
    if verified.parts:
        left = "it" if verified.files == 1 else "them"
        return f"{files} as the run left {left}, by the hashes in {MANIFEST}: {', '.join(verified.parts)}"
    again = ", and its merge is proved again" if verified.proved_again else ", by their hashes"
    if verified.unchanged == verified.files:
        return f"{files} as {'it was' if verified.files == 1 else 'they were'} verified{again}"
    return f"{verified.unchanged:,} of {files} as they were verified{again}"
