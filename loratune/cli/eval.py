"""`loratune eval`: compares an adapter with its base, or with another adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loratune import console
from loratune.cli.flags import ADAPTER_HELP, Force, Json, MovedBase, adapter_folder
from loratune.cli.sampling import sampling_options
from loratune.engine.sampling import Sampling
from loratune.errors import Exit, LoratuneError
from loratune.evaluation.bounds import Bounds

DETAILS = """\
Asks the adapter and its base, or another adapter, the same rows, and compares them row by row: the loss of the expected
answers, exact match, ROUGE-L, BLEU, the rows' asserts, and a judge if one is given. Bundled texts and instructions in
English and Chinese show what was forgotten, and the run's training rows which test rows were leaked.

--tests accepts every file that sft trains on, and YAML. A row's `assert` is a list in promptfoo's form: equals,
contains, icontains, contains-any, contains-all, starts-with, regex, number (with `within`), is-json (with a schema),
tool-call; each also with not- before it.

The exit code is 7 if the adapter is worse: in the deciding measure, by more than chance; in the form of its answers; or
if it has forgotten more than the bounds allow. Rerunning the same command resumes; other asserts, bounds or a judge
need no new answers."""

Tuned = Annotated[str | None, typer.Option("--adapter", "-a", metavar="folder", help=ADAPTER_HELP)]
Tests = Annotated[
    str | None, typer.Option("--tests", metavar="file", help="Rows with expected answers, with asserts, or both.")
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


@sampling_options
def command(
    adapter: Tuned = None,
    tests: Tests = None,
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
    given = {"--adapter": adapter, "--tests": tests, "--output": output}
    missing = [name for name, value in given.items() if value is None or not str(value).strip()]
    if missing:
        raise LoratuneError(f"give {', '.join(missing)}", Exit.USAGE)
    if (judge is None) != (judge_model is None):
        raise LoratuneError("--judge and --judge-model go together; give both", Exit.USAGE)
    from loratune.evaluation.flow import evaluate
    from loratune.evaluation.judge import open_judge
    from loratune.evaluation.measures import MEASURES
    from loratune.evaluation.request import EvaluationRequest
    from loratune.evaluation.table import show_evaluation

    if decide_by is not None and decide_by not in MEASURES:
        raise LoratuneError(f"--decide-by {decide_by}: there are {', '.join(MEASURES)}", Exit.USAGE)
    tuned, folder = adapter_folder(adapter), Path(str(output))
    assert tuned is not None
    request = EvaluationRequest(
        tests=str(tests),
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
    )
    evaluation = evaluate(request)
    show_evaluation(evaluation, folder)
    if json:
        console.write_json(evaluation.summary())
    if evaluation.is_worse:
        raise typer.Exit(int(Exit.WORSE))
