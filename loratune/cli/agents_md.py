"""`loratune agents-md`: writes an AGENTS.md for a project that trains with loratune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typing_extensions import TypedDict

from loratune import __version__, console
from loratune.cli.commands import COMMANDS, GROUPED
from loratune.cli.documents import Document
from loratune.errors import MEANINGS, Exit, LoratuneError
from loratune.writing import write_text

DETAILS = """\
The file lists the commands, the usual order, exit codes, JSON documents and bounds, as this version has them; write it
again after an update. An existing file is not replaced without --overwrite: write another, and refer to it."""
HEAD = f"""\
# Training with loratune

Written by `loratune agents-md`, version {__version__}. loratune fine-tunes language models from a recipe (YAML) and a
file of rows, and verifies each step.

## Usual order

```bash
loratune data check --config my.yaml --json              # the recipe and all rows; loads no model
loratune sft --config my.yaml --output out/run --json    # trains; takes minutes to hours
loratune runs show out/run --json                        # state, step, losses, seconds left; while it trains, too
loratune eval --adapter out/run --tests tests.jsonl --output out/eval --json
loratune merge --adapter out/run --output out/merged --json
```

Every setting of a recipe is a flag as well: `--training.max_steps 20`. For a trial of the whole order in a minute, take
`--config quickstart`, which is shipped and trains a bundled tiny model on a CPU. An interrupted run goes on with the
same command and `--resume`.

## JSON

With `--json`, stdout is one document, whose key `schema` has its name and version (`loratune/merge/1`); messages are on
stderr. `loratune schema` lists the documents, `loratune schema merge` prints a JSON Schema, and
`loratune schema recipe` that of recipes, with all settings, defaults and bounds. A failure prints `loratune/error/1`:
exit_code, message, problems (each with file, line, key and remedy) and commands that help. Follow the remedy; do not
guess names.

## Bounds

- Existing results are refused. Choose another `--output`; use `--overwrite` only where the user asks for it.
- `--force` and `--allow-changes` accept what a check has found. Ask the user first.
- Do not edit files of a run folder, a merged model or an export: their hashes are checked.
- `export --push` uploads only with `--no-dry-run`. `launch` writes job files and submits nothing.
- `eval` ends with exit code 7 if the adapter is worse; report it, and do not lower the bounds.
- `loratune mcp` offers the same as tools of the Model Context Protocol, limited to one folder and without a network.
"""


class WrittenFile(TypedDict):
    """The file for agents."""

    file: str
    text: str


DOCUMENT = Document("agents-md", 1, lambda: WrittenFile)


def command(
    file: Annotated[Path, typer.Option("--file", "-o", metavar="file", help="Where to write it.")] = Path("AGENTS.md"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file, if there is one.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print file and text as JSON to stdout, too.")] = False,
) -> None:
    if not file.parent.is_dir():
        raise LoratuneError(f"{file.parent}: no such folder; make it, or choose another --file", Exit.IO)
    if file.exists() and not overwrite:
        raise LoratuneError(
            f"{file} exists already; choose another --file and refer to it there, or replace it with --overwrite",
            Exit.USAGE,
        )
    text = agents_text()
    write_text(file, text)
    console.say(f"written: {file}", style="bold")
    if json:
        DOCUMENT.write(WrittenFile(file=str(file), text=text))


def agents_text() -> str:
    """Return the file's text, with tables of the commands and exit codes."""
    commands = {name: about for name, about in COMMANDS.items() if name not in GROUPED}
    commands |= {f"{group} {name}": about for group, table in GROUPED.items() for name, about in table.items()}
    codes = {str(int(code)): meaning for code, meaning in MEANINGS.items()} | {"128 + n": "ended by signal n"}
    listed = _table("command", {f"`loratune {name}`": about for name, about in commands.items()})
    return (
        f"{HEAD}\n## Commands\n\n`loratune COMMAND --help` lists the flags.\n\n{listed}\n"
        f"## Exit codes\n\n{_table('code', codes)}"
    )


def _table(title: str, rows: dict[str, str]) -> str:
    lines = [f"| {title} | meaning |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in rows.items())]
    return "\n".join(lines) + "\n"
