"""`loratune import`: translates the config of another training tool into a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loratune import console
from loratune.cli.documents import Document
from loratune.cli.options import recipe_options
from loratune.errors import Exit, LoratuneError
from loratune.migration.recognition import TOOLS
from loratune.migration.translation import MOST_DEVICES, Translation, translate
from loratune.writing import check_new_file, write_text

DETAILS = f"""\
Reads YAML, JSON, or the training command of a shell script, which is never executed, and recognises the tool by the
names in it: {", ".join(TOOLS)}. Every setting is told as taken over, changed in meaning, or not taken. The exit code is
2, and no recipe is written, if something is not taken that changes the result; --allow-loss writes it anyway.

The settings of sft are flags here too, and override the config."""


def _printed() -> Any:
    from loratune.migration.comparison import ComparedTranslation

    return ComparedTranslation


DOCUMENT = Document("import", 1, _printed)


def _tool_name(name: str | None) -> str | None:
    if name is not None and name not in TOOLS:
        raise typer.BadParameter(f"choose from {', '.join(TOOLS)}")
    return name


@recipe_options
def command(
    config: Annotated[Path, typer.Argument(help="Config of the other tool.", show_default=False)],
    file: Annotated[
        Path | None, typer.Option("--file", "-o", metavar="file", help="Write the recipe here, not to stdout.")
    ] = None,
    tool: Annotated[
        str | None,
        typer.Option("--tool", metavar="name", callback=_tool_name, help=f"The tool, if unclear: {', '.join(TOOLS)}."),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            "--devices",
            metavar="count",
            min=1,
            max=MOST_DEVICES,
            help="GPUs that it trained on, for the rows per step.",
        ),
    ] = None,
    dataset_info: Annotated[
        Path | None,
        typer.Option("--dataset-info", metavar="file", help="LLaMA-Factory's dataset_info.json, if it is elsewhere."),
    ] = None,
    rows: Annotated[
        int,
        typer.Option("--rows", metavar="count", min=0, max=1000, help="Rows to render as both tools do, and compare."),
    ] = 0,
    allow_loss: Annotated[
        bool, typer.Option("--allow-loss", help="Write the recipe although the result is another.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file, if there is one.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print lists, recipe and comparison as JSON to stdout.")] = False,
    *,
    flags: dict[str, object],
) -> None:
    _check_place(file, config, overwrite)
    found = translate(config, TOOLS[tool] if tool else None, dict(flags), devices, dataset_info)
    compared = None
    if rows:
        from loratune.migration.comparison import compare_rows

        compared = compare_rows(found, rows)
    is_written = allow_loss or not found.lost
    _show(found)
    if compared is not None:
        for line in compared.lines:
            console.say(line)
    if is_written and file is not None:
        write_text(file, found.text)
        console.say(f"recipe: {file}", style="bold")
    if json:
        place = str(file) if is_written and file else None
        DOCUMENT.write({**found.values(), "file": place, "rows": compared.as_json() if compared else None})
    elif is_written and file is None:
        console.write_result(found.text, end="")
    if not is_written:
        console.error("no recipe is written, because its result would be another; --allow-loss writes it anyway")
        raise typer.Exit(int(Exit.USAGE))
    if file is not None:
        console.next_step(found.next_command(file))


def _check_place(file: Path | None, config: Path, overwrite: bool) -> None:
    if file is None:
        return
    check_new_file(file, overwrite)
    if file.exists() and config.exists() and file.samefile(config):
        raise LoratuneError(f"{file} is the config itself, which is kept; choose another --file", Exit.USAGE)


def _show(found: Translation) -> None:
    console.say(f"{found.source}: a config of {found.tool}", style="bold")
    for title, rows in found.lists:
        if rows:
            console.table(rows, title=title)
