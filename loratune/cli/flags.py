"""Flags shared by several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loratune.commands import flag_words
from loratune.errors import Exit, LoratuneError
from loratune.plain_files import is_folder
from loratune.printable import shortened

RENAMED_FLAGS = {
    "infer": {"--base": "--no-adapter"},
    "serve": {"--token": "--api-key", "--no-token": "--no-api-key"},
    "merge": {"--model": "--base-model", "-m": "--base-model"},
    "verify": {"--model": "--base-model", "-m": "--base-model"},
}
"""Command → renamed flags, which still work, and their new names."""
ADAPTER_FLAGS = ("--adapter", "-a")
RENAMED_BESIDE_AN_ADAPTER = {
    command: {"--model": "--base-model", "-m": "--base-model"} for command in ("infer", "serve", "export")
}
"""The same for flags that are renamed only next to --adapter, and mean something else without it."""


def filled(text: str | None) -> str | None:
    """Reject a blank flag, as an unset shell variable produces.

    Raises:
        typer.BadParameter: the text is blank.
    """
    if text is not None and not text.strip():
        raise typer.BadParameter("it is empty")
    return text


ADAPTER_HELP = "Run folder, one of its checkpoints, or a plain PEFT folder."
Adapter = Annotated[str | None, typer.Option("--adapter", "-a", metavar="folder", help=ADAPTER_HELP)]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", metavar="folder", help=f"{ADAPTER_HELP} Repeatable, as name=folder."),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="model",
        callback=filled,
        help="A model to ask without an adapter.",
    ),
]
Config = Annotated[
    str | None,
    typer.Option("--config", "-c", metavar="recipe", help="Recipe: a YAML file, or the name of a shipped recipe."),
]
RowFiles = Annotated[
    list[str] | None,
    typer.Argument(help="Files of rows, or data sets of a hub, as --data.train takes them.", show_default=False),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="folder", help="Folder of the result, such as out/run-merged.")
]
MovedBase = Annotated[
    str | None,
    typer.Option("--base-model", metavar="model", callback=filled, help="Where the adapter's base lies now."),
]
Logits = Annotated[
    bool, typer.Option("--logits/--no-logits", help="Compare logits of both models too (default), not only files.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing result in the output folder.")]
Force = Annotated[bool, typer.Option("--force", help="Accept a different base model or a modified adapter.")]
Json = Annotated[bool, typer.Option("--json", help="Print a report as JSON to stdout.")]
Push = Annotated[
    str | None,
    typer.Option("--push", metavar="hub:org/name", help="Upload to hf:org/name or ms:org/name (ModelScope)."),
]
DryRun = Annotated[bool, typer.Option("--dry-run/--no-dry-run", help="Only list the files that --push would upload.")]
Public = Annotated[bool, typer.Option("--public", help="Make the pushed repository public.")]


def with_rows(flags: dict[str, object], files: list[str] | None) -> dict[str, object]:
    """Return the flags of a recipe with the rows that are given without a flag as those of --data.train.

    Raises:
        LoratuneError: --data.train gives others, or they are a recipe.
    """
    if not files:
        return flags
    recipe = next((name for name in files if name.endswith((".yaml", ".yml"))), None)
    if recipe is not None:
        raise LoratuneError(f"{shortened(recipe)}: a recipe, not rows; give it with --config", Exit.USAGE)
    flagged = flags.get("data.train", files)
    if flagged != files:
        words = " ".join(flag_words({"--data.train": flagged}))
        raise LoratuneError(
            f"rows are given as {shortened(' '.join(files))} and as {shortened(words)}, which differ; give them in one "
            "of these ways",
            Exit.USAGE,
        )
    return {**flags, "data.train": files}


def named_adapters(values: list[str]) -> list[tuple[str, Path]]:
    """Return name and folder of each --adapter: `name=folder`, or a folder, which then provides the name.

    All commands parse the flag here. The path of an existing folder is never split at `=`.

    Raises:
        LoratuneError: a name or folder is missing, or two adapters have the same name.
    """
    named: list[tuple[str, Path]] = []
    for value in values:
        name, sign, folder = value.partition("=")
        if not sign or "/" in name or is_folder(value):
            name, folder = Path(value).absolute().name or "/", value
        if not name or not folder:
            raise LoratuneError(f"--adapter {shortened(value)!r}: give a folder, or name=folder", Exit.USAGE)
        if any(name == other for other, _ in named):
            raise LoratuneError(
                f"--adapter {shortened(value)}: another is called {shortened(name)} already; give each a name of its "
                "own: name=folder",
                Exit.USAGE,
            )
        named.append((name, Path(folder)))
    return named


def asked_model(has_adapter: bool, model: str | None, base_model: str | None) -> str | None:
    """Return the model of a command that takes it alone or below an adapter; None leaves it to the adapter.

    Raises:
        LoratuneError: none is given, or the base of no adapter.
    """
    if not has_adapter and base_model is not None:
        raise LoratuneError(
            "--base-model is where the base of an adapter lies; give the adapter with --adapter, or a model alone with "
            "--model",
            Exit.USAGE,
        )
    if not has_adapter and model is None:
        raise LoratuneError("give a run folder with --adapter, or a model with --model", Exit.USAGE)
    return base_model or model if has_adapter else model


def adapter_folder(value: str | None) -> Path | None:
    """Return the folder of an --adapter that may be given once; None if it is not given."""
    return None if value is None else named_adapters([value])[0][1]
