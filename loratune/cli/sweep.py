"""`loratune sweep`: trains a recipe with many values of some settings."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from loratune import console
from loratune.cli.documents import Document
from loratune.cli.flags import Config
from loratune.cli.options import recipe_options
from loratune.errors import Exit, LoratuneError
from loratune.extras import required
from loratune.recipe.loading import shipped_sweeps
from loratune.recipe.sweep_section import SweepSettings

DETAILS = """\
Every setting of the recipe can be varied: --over lora.rank=8,32 --over training.learning_rate=1e-5..1e-3.
All trials train to the first rung, the best third of them on, and the best two again with other seeds. The
same command with --resume continues a sweep, or joins it from another process or machine. Shipped sweeps:
""" + ", ".join(path.stem for path in shipped_sweeps())


def _printed() -> Any:
    from loratune.sweep.report import SweepFile

    return SweepFile


DOCUMENT = Document("sweep", 1, _printed)
HELP = {name: " ".join((field.description or "").split()) for name, field in SweepSettings.model_fields.items()}


@recipe_options
def command(
    config: Config = None,
    over: Annotated[
        list[str] | None, typer.Option("--over", metavar="setting=values", help=f"{HELP['over']} Repeatable.")
    ] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", metavar="grid|random|tpe", help=HELP["sampler"])] = None,
    trials: Annotated[int | None, typer.Option("--trials", metavar="integer", help=HELP["trials"])] = None,
    halving: Annotated[bool | None, typer.Option("--halving/--no-halving", help=HELP["halving"])] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", metavar="integer", help=HELP["seeds"])] = None,
    budget: Annotated[str | None, typer.Option("--budget", metavar="time", help=HELP["budget"])] = None,
    workers: Annotated[
        int,
        typer.Option("--workers", metavar="integer", min=1, help="Trials to train at once here, each on its own GPU."),
    ] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Continue or join the sweep in the output folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON to stdout.")] = False,
    *,
    flags: dict[str, object],
) -> None:
    typed = {"sampler": sampler, "trials": trials, "halving": halving, "seeds": seeds, "budget": budget}
    given: dict[str, Any] = {name: value for name, value in typed.items() if value is not None}
    if over:
        given["over"] = _named(over)
    with required("loratune sweep", "sweep", package="optuna"):
        from loratune.sweep.definition import open_sweep
        from loratune.sweep.run import next_command, run_sweep
    from loratune.sweep.showing import show_sweep

    sweep = open_sweep(config, flags, given, resume)
    report = run_sweep(sweep, workers)
    show_sweep(report)
    console.say(f"sweep folder: {report.output}")
    if report.best:
        console.next_step(next_command(sweep))
    if json:
        DOCUMENT.write(report.values())


def _named(over: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in over]
    if wrong := [name for name, sign, values in pairs if not (name and sign and values)]:
        raise LoratuneError(f"--over {', '.join(wrong)}: write setting=values, such as lora.rank=8,32", Exit.USAGE)
    names = [name for name, _, _ in pairs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise LoratuneError(f"--over {', '.join(repeated)}: given twice; separate its values by commas", Exit.USAGE)
    return {name: values for name, _, values in pairs}
