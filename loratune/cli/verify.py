"""`loratune verify`: whether a merged model, an export or a run is still what was verified."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loratune import console
from loratune.cli.flags import Json

DETAILS = """\
verification.json, or a run's manifest, holds the sha256 of every file; each is computed again. A file that is changed,
missing or added, and that a program would load, means exit code 4. infer, serve and export make the same check of a
model's folder before they load it."""

Folder = Annotated[Path, typer.Argument(help="A merged model, an export, or a run folder.", show_default=False)]


def command(folder: Folder, json: Json = False) -> None:
    """Compare every file with what was recorded of it."""
    from loratune.delivery.report import show_verification
    from loratune.delivery.reverify import verify_folder

    with console.status(f"reading {folder}"):
        report = verify_folder(folder)
    if json:
        console.write_json(report)
        return
    for remark in report["remarks"]:
        console.warn(f"{remark}; no program loads it")
    if report["kind"] == "merged model":
        show_verification(report["proved"])
    console.say(f"{folder}: {report['kind']}, {report['files']} files as they were verified", style="bold")
