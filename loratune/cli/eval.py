"""`loratune eval`: compares an adapter with its base, or with another adapter."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from loratune.cli.advice import told_as_lacking
from loratune.cli.documents import Document
from loratune.cli.flags import ADAPTER_HELP, Force, Json, MovedBase, adapter_folder
from loratune.cli.sampling import sampling_options
from loratune.engine.sampling import Sampling
from loratune.errors import Exit, LoratuneError
from loratune.evaluation.bounds import Bounds
from loratune.extras import FOR_EVALUATION, required
from loratune.imports import importing

if TYPE_CHECKING:
    from loratune.evaluation.request import EvaluationRequest
    from loratune.evaluation.tasks.run import TasksRequest

Flags: TypeAlias = dict[str, object]
DETAILS = """\
Asks the adapter and its base, or another adapter, the same rows, and compares them row by row: the loss of the expected
answers, exact match, ROUGE-L, BLEU, the rows' asserts, and a judge if one is given. Bundled texts and instructions in
English and Chinese show what was forgotten, and the run's training rows which test rows were leaked.

--tests accepts every file that sft trains on, and YAML. A row's `assert` is a list in promptfoo's form: equals,
contains, icontains, contains-any, contains-all, starts-with, regex, number (with `within`), is-json (with a schema),
tool-call; each also with not- before it.

--tasks asks the adapter and its base tasks of lm-evaluation-harness, such as gsm8k or mmlu, under the run's template,
thinking and ends of answers. --tasks-folder adds tasks of your own: the harness's YAML files without code. Their rows
come from the hub, or from files that they name.

The exit code is 7 if the adapter is worse: in the deciding measure, by more than chance; in the form of its answers; or
if it has forgotten more than the bounds allow. Rerunning the same command resumes; other asserts, bounds or a judge
need no new answers. Tasks are asked anew."""


def _printed() -> Any:
    from loratune.evaluation.printed import RowsAndTasks, TasksAlone

    return RowsAndTasks | TasksAlone


DOCUMENT = Document("eval", 1, _printed)
Tuned = Annotated[str | None, typer.Option("--adapter", "-a", metavar="folder", help=ADAPTER_HELP)]
Tests = Annotated[
    str | None, typer.Option("--tests", metavar="file", help="Rows with expected answers, with asserts, or both.")
]
Tasks = Annotated[
    str | None, typer.Option("--tasks", metavar="names", help="Tasks of lm-evaluation-harness, separated by commas.")
]
TasksFolder = Annotated[
    Path | None, typer.Option("--tasks-folder", metavar="folder", help="YAML files of further tasks.")
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="number", min=1, help="Maximum rows of each task.")]
TasksPlain = Annotated[
    bool, typer.Option("--tasks-plain", help="Ask the tasks as plain text, as leaderboards of base models do.")
]
Against = Annotated[
    str | None,
    typer.Option("--against", metavar="folder", help="Another adapter to compare with, instead of the base."),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="folder", help="Folder of the results.")]
General = Annotated[
    bool, typer.Option("--general/--no-general", help="Look for what was forgotten (default), or only at the rows.")
]
LossBound = Annotated[
    float,
    typer.Option("--max-forgetting", metavar="number", min=0, help="Nats per token that general text may lose."),
]
ChangedBound = Annotated[
    float,
    typer.Option(
        "--max-changed", metavar="number", min=0, max=1,
        help="Share of general answers that may change language, become refusals or empty.",
    ),
]  # fmt: skip
DecideBy = Annotated[
    str | None,
    typer.Option(
        "--decide-by", metavar="measure", show_default="asserts, judge or loss",
        help="Measure that decides: asserts, judge, loss, exact_match, rouge_l, bleu, form.",
    ),
]  # fmt: skip
JudgeUrl = Annotated[
    str | None,
    typer.Option(
        "--judge", metavar="url",
        help="Base URL of an OpenAI-compatible API; the key is read from LORATUNE_JUDGE_API_KEY or OPENAI_API_KEY.",
    ),
]  # fmt: skip
JudgeModel = Annotated[str | None, typer.Option("--judge-model", metavar="name", help="Model of the judge.")]
Junit = Annotated[bool, typer.Option("--junit", help="Write junit.xml too.")]
OverwriteResults = Annotated[bool, typer.Option("--overwrite", help="Discard the results in the output folder.")]

MEANT = {
    "--adapter": "a run folder, one of its checkpoints, or a plain PEFT folder",
    "--tests": "a file of rows with expected answers; or benchmarks with --tasks",
    "--output": "a folder for the results, such as out/faq-eval",
}
"""Flag that an evaluation needs → what it takes."""


@sampling_options
def command(
    adapter: Tuned = None,
    tests: Tests = None,
    tasks: Tasks = None,
    tasks_folder: TasksFolder = None,
    limit: Limit = None,
    tasks_plain: TasksPlain = False,
    against: Against = None,
    output: Output = None,
    base_model: MovedBase = None,
    decide_by: DecideBy = None,
    general: General = True,
    max_forgetting: LossBound = Bounds.loss,
    max_changed: ChangedBound = Bounds.changed,
    judge: JudgeUrl = None,
    judge_model: JudgeModel = None,
    junit: Junit = False,
    overwrite: OverwriteResults = False,
    force: Force = False,
    json: Json = False,
    *,
    sampling: Sampling,
) -> None:
    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    of_rows: Flags = {"--decide-by": decide_by, "--judge": judge, "--judge-model": judge_model, "--junit": junit}
    of_rows |= {"--no-general": not general, "--max-forgetting": max_forgetting != Bounds.loss}
    of_rows |= {"--max-changed": max_changed != Bounds.changed, "--overwrite": overwrite, "--against": against}
    of_tasks: Flags = {"--tasks-folder": tasks_folder, "--limit": limit, "--tasks-plain": tasks_plain}
    _check(
        {"--adapter": adapter, "--tests": tests or names or None, "--output": output},
        of_rows, of_tasks, tests, names,
    )  # fmt: skip
    if tests:
        _require_extra()
    from loratune.evaluation.judge import open_judge
    from loratune.evaluation.measures import MEASURES
    from loratune.evaluation.request import EvaluationRequest
    from loratune.evaluation.tasks.run import TasksRequest

    if decide_by is not None and decide_by not in MEASURES:
        raise LoratuneError(f"--decide-by {decide_by}: there are {', '.join(MEASURES)}", Exit.USAGE)
    tuned, folder = adapter_folder(adapter), Path(str(output))
    assert tuned is not None
    rows = EvaluationRequest(
        tests=tests,
        output=folder,
        adapter=tuned,
        against=adapter_folder(against),
        model=base_model,
        sampling=sampling,
        general=general,
        bounds=Bounds(max_forgetting, max_changed),
        decide_by=decide_by,
        judge=open_judge(judge, judge_model) if judge and judge_model else None,
        junit=junit,
        overwrite=overwrite,
        force=force,
    ) if tests else None  # fmt: skip
    benchmarks = TasksRequest(names, folder, tuned, base_model, tasks_folder, limit, not tasks_plain, sampling, force)
    _run(rows, benchmarks if names else None, json)


def _require_extra() -> None:
    """Require what comparing answers needs, before the metrics do, which name the extra of `infer --metrics`."""
    with required("loratune eval", "eval"):
        for module in FOR_EVALUATION:
            import_module(module)


def _check(given: Flags, of_rows: Flags, of_tasks: Flags, tests: str | None, names: Sequence[str]) -> None:
    """Refuse missing flags, and those that have no effect without another one."""
    if missing := [name for name, value in given.items() if value is None or not str(value).strip()]:
        raise LoratuneError(told_as_lacking({name: MEANT[name] for name in missing}), Exit.USAGE)
    if (of_rows["--judge"] is None) != (of_rows["--judge-model"] is None):
        raise LoratuneError("--judge and --judge-model go together; give both", Exit.USAGE)
    for flag, value, others in (("--tests", tests, of_rows), ("--tasks", names, of_tasks)):
        if not value and (needless := [name for name, given in others.items() if given]):
            raise LoratuneError(f"without {flag}, {', '.join(needless)} has no effect", Exit.USAGE)
    bounds = [name for name in ("--max-forgetting", "--max-changed") if of_rows[name]]
    if of_rows["--no-general"] and bounds:
        raise LoratuneError(f"with --no-general, {', '.join(bounds)} has no effect", Exit.USAGE)
    if names and of_rows["--against"]:
        raise LoratuneError("--tasks compares an adapter with its base; leave out --against", Exit.USAGE)


def _run(rows: EvaluationRequest | None, benchmarks: TasksRequest | None, as_json: bool) -> None:
    """Compare the models on the rows, on the tasks, or on both; what is wrong with tasks is told before the rows."""
    with importing():
        from loratune.evaluation.flow import evaluate
        from loratune.evaluation.table import show_evaluation
        from loratune.evaluation.tasks.run import find_tasks, run_tasks
        from loratune.evaluation.tasks.table import show_tasks

    found, told, is_worse = find_tasks(benchmarks) if benchmarks else None, dict[str, Any](), False
    if rows:
        evaluation = evaluate(rows)
        show_evaluation(evaluation, rows.output)
        told, is_worse = evaluation.values(), evaluation.is_worse
    if benchmarks and found:
        result = run_tasks(benchmarks, found)
        show_tasks(result)
        told |= {"benchmarks": result.values()}
    if as_json:
        DOCUMENT.write(told)
    if is_worse:
        raise typer.Exit(int(Exit.WORSE))
