"""`loratune doctor`: examines this machine, and the files of a recipe."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from loratune.cli.documents import Document
from loratune.cli.flags import Config
from loratune.recipe.loading import load_recipe

DETAILS = """\
Tries driver, GPUs, packages, disks, hub and versions, and says of each whether it is fine, slower than it could be, or
broken, with the command that mends it. With --config also: whether the base is complete, whether packed rows are apart
in it, and whether tokenizer, template and rows can be read. Nothing is downloaded or changed.

Each check runs in a process of its own with a time limit, so a package that crashes or hangs is reported like any other
fault. If something is broken, the exit code is 6 for the machine, 4 for the base, or 3 for rows."""


def _printed() -> Any:
    from loratune.doctor.examination import ExaminationValues

    return ExaminationValues


DOCUMENT = Document("doctor", 1, _printed)


def command(
    config: Config = None,
    json: Annotated[bool, typer.Option("--json", help="Print the examination as JSON to stdout.")] = False,
) -> None:
    recipe = load_recipe(config, {}) if config is not None else None
    from loratune.doctor.examination import judge
    from loratune.doctor.measuring import measure_machine, measure_recipe
    from loratune.doctor.page import show

    facts = measure_recipe(recipe, config or "") if recipe else None
    examination = judge(measure_machine(recipe, facts), facts)
    if json:
        DOCUMENT.write(examination.values())
    else:
        show(examination)
    if examination.exit_code:
        raise typer.Exit(int(examination.exit_code))
