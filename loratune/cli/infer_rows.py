"""`loratune infer --input`: every row of a file answered, from the checks before the model is loaded to the summary."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune import console
from loratune.errors import Exit, LoratuneError, bullet_list, counted

if TYPE_CHECKING:
    from loratune.data.encoding.encoder import Encoder
    from loratune.engine.engine import Engine
    from loratune.generation.batch.answer_file import About, AnswerFile
    from loratune.generation.batch.answer_scores import RowScores
    from loratune.generation.batch.questions import AskedRow, QuestionFile
    from loratune.generation.batch.row_answers import Tally, Work
    from loratune.recipe.sections import ModelSettings, PromptSettings
    from loratune.runs.opening import AdapterSource

SETTINGS_FILES = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
"""Of a base, besides what its fingerprint covers: they decide how it is asked and how it draws."""
SHOWN_ROWS = 5
ANSWERS = "answers"
"""What the metrics of those that were asked for are called, beside those of the base."""


@dataclass(frozen=True)
class RowsRequest:
    """The flags of `infer --input`."""

    input: str
    output: Path
    adapter: tuple[str, Path] | None
    model: str | None
    base: bool
    """Leave the adapter off; with metrics: compare with it."""
    metrics: bool
    system: str | None
    sampling: dict[str, Any]
    overwrite: bool
    force: bool

    @property
    def compares(self) -> bool:
        """Whether both the adapter and the base answer."""
        return self.base and self.metrics


def answer_file(request: RowsRequest) -> dict[str, Any]:
    """Answer all rows of a file that are not answered yet.

    Returns:
        What happened, for scripts.

    Raises:
        LoratuneError: rows, places or models that do not go.
        Interrupted: a signal has come; what was finished is kept.
    """
    from loratune.generation.batch.answer_file import check_output, finished_report, open_answers
    from loratune.generation.batch.questions import read_questions
    from loratune.runs.opening import open_adapter

    if request.metrics:
        import loratune.generation.batch.text_metrics  # noqa: F401 - missing packages are told before anything is read
    source = open_adapter(request.adapter[1], request.force) if request.adapter else None
    known = source.record if source else None
    file = read_questions(request.input, known.columns if known else {}, known.placeholders if known else {})
    if request.metrics and all(row.reference is None for row in file.rows):
        raise LoratuneError(f"{file.name}: --metrics compares with the rows' own answers, and none has one", Exit.DATA)
    check_output(request.output, file.name)
    if any(row.uses_tools for row in file.rows):
        _check_tools(file, _encoder(request, source))
    about = _about(request, source, file)
    report = None if request.overwrite else finished_report(request.output, about)
    if report and _holds_all(report, request):
        console.say(f"{request.output} is complete: {counted(len(file.rows), 'row')}", style="bold")
        return _summary(report, request)
    with open_answers(request.output, about, request.overwrite) as answers:
        if report and not answers.count("answer"):
            answers.take_finished()
        return _make_missing(request, file, answers)


def _make_missing(request: RowsRequest, file: QuestionFile, answers: AnswerFile) -> dict[str, Any]:
    """Load the model, answer, score, and put everything under its final name."""
    with console.status(f"loading {request.adapter[1] if request.adapter else request.model}"):
        from loratune.generation.batch.row_answers import answer_rows, free_names, whole_rows

        engine = _load(request)
    for name, other in free_names(file.rows).items():
        console.warn(f"the rows' own column {name} is written as {other}, since the answers use its name")
    work = _work(request, file)
    kept = sum(answers.count(side.answer) for side in work.sides)
    if kept:
        console.say(f"{counted(kept, 'answer')} of an earlier call kept")
    try:
        tally = answer_rows(engine, work, answers)
    finally:
        engine.close()
    scores, sums = _scores(work, answers)
    report = _report(work, answers, sums) | {"compares": request.compares}
    answers.finish(whole_rows(work, answers, scores), report)
    _tell(request, work, tally, report)
    return _summary(report, request) | {
        "answered": tally.answers,
        "kept": kept,
        "seconds": round(tally.seconds, 3),
        "tokens_per_second": round(tally.tokens / tally.seconds, 3) if tally.tokens else 0.0,
    }


def _load(request: RowsRequest) -> Engine:
    from loratune.engine.engine import load_engine

    warnings: list[str] = []
    engine = load_engine([request.adapter] if request.adapter else [], request.model, warnings, request.force)
    for warning in warnings:
        console.warn(warning)
    return engine


def _work(request: RowsRequest, file: QuestionFile) -> Work:
    from loratune.engine.sampling import Sampling
    from loratune.generation.batch.row_answers import BASE, Side, Work

    first = Side("", not request.base or request.compares)
    adapter = request.adapter[0] if request.adapter else None
    sides = (first, Side(BASE, False)) if request.compares else (first,)
    return Work(file.rows, Sampling(**request.sampling), sides, adapter, request.system, request.metrics)


def _scores(work: Work, answers: AnswerFile) -> tuple[RowScores, dict[str, dict[str, Any]]]:
    """Metrics by row, and of each side; none if they are not asked for."""
    if not work.scores:
        return {}, {}
    from loratune.generation.batch.answer_scores import score_rows

    return score_rows(work, answers)


def _about(request: RowsRequest, source: AdapterSource | None, file: QuestionFile) -> About:
    """Everything that the answers depend on."""
    from loratune.data.template.facts import template_facts
    from loratune.runs.tokenizer_files import tokenizer_sha256

    settings, folder, tokenizer, prompt = _places(request, source)
    facts = template_facts(prompt, tokenizer_sha256(tokenizer), lambda: _encoder(request, source))
    about = {
        "rows": file.sha256,
        "questions": _hash_of_questions(file.rows),
        "model": _model_hash(settings, folder),
        "adapter": _adapter_hash(source.adapter) if source else None,
        "adapter left off": request.base and not request.compares,
        "prompt": prompt.model_dump(exclude={"date", "generation_prompt"}),
        **({"date": date.today().isoformat()} if facts.is_dated else {}),
        "system": request.system,
        **request.sampling,
    }
    as_written: About = json.loads(json.dumps(about))
    return as_written


def _places(request: RowsRequest, source: AdapterSource | None) -> tuple[ModelSettings, Path, Path, PromptSettings]:
    """How the base is loaded, its folder, that of the tokenizer, and how prompts are made."""
    from loratune.model.files import find_base
    from loratune.recipe.sections import ModelSettings
    from loratune.runs.opening import base_settings, merged_prompt

    settings = base_settings(source, request.model) if source else ModelSettings(base=request.model or "")
    folder = find_base(settings)
    prompt = source.prompt if source else merged_prompt(folder)
    return settings, folder, source.tokenizer_folder(folder) if source else folder, prompt


def _encoder(request: RowsRequest, source: AdapterSource | None) -> Encoder:
    from loratune.data.encoding.encoder import Encoder
    from loratune.model.tokenizer import load_tokenizer

    _, _, tokenizer, prompt = _places(request, source)
    return Encoder(load_tokenizer(tokenizer), prompt)


def _check_tools(file: QuestionFile, encoder: Encoder) -> None:
    """Refuse tools that the model would not be told of; say so where calls cannot be told from text."""
    bad = []
    for row in file.rows:
        said = [*row.messages, *([row.answer] if row.answer else [])]
        try:
            encoder.check_tools(said, row.tools)
        except LoratuneError as error:
            bad.append(f"row {row.number}: {error}")
    if bad:
        listed = bullet_list(bad, limit=SHOWN_ROWS)
        raise LoratuneError(f"{file.name}: {counted(len(bad), 'row')} cannot be asked:\n{listed}", Exit.DATA)
    if encoder.about_calls and any(row.tools for row in file.rows):
        console.warn(encoder.about_calls)


def _hash_of_questions(rows: list[AskedRow]) -> str:
    """Of what is asked, which depends on the adapter's recipe too."""
    asked = json.dumps([[row.messages, row.tools] if row.tools else row.messages for row in rows], sort_keys=True)
    return hashlib.sha256(asked.encode()).hexdigest()


def _model_hash(settings: ModelSettings, folder: Path) -> str:
    from loratune.model.files import weight_files
    from loratune.runs.fingerprint import fingerprint_base
    from loratune.runs.tokenizer_files import NAMED_TEMPLATES

    known: dict[str, Any] = fingerprint_base(folder, weight_files(folder)) | {"settings": settings.quantization}
    for name in SETTINGS_FILES:
        known[name] = (folder / name).read_text("utf-8") if (folder / name).is_file() else None
    for path in sorted((folder / NAMED_TEMPLATES).glob("*.jinja")):
        known[f"{NAMED_TEMPLATES}/{path.name}"] = path.read_text("utf-8")
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _adapter_hash(folder: Path) -> str:
    from loratune.runs.folder import file_sha256

    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = sorted(path.as_posix() for path in paths if path.suffix in (".safetensors", ".json", ".jinja"))
    known = [(name, file_sha256(folder / name)) for name in names]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _holds_all(report: dict[str, Any], request: RowsRequest) -> bool:
    """Whether a complete file has what is asked for now."""
    return bool(report.get("metrics") or not request.metrics) and bool(report.get("compares") or not request.compares)


def _report(work: Work, answers: AnswerFile, sums: dict[str, dict[str, Any]]) -> dict[str, Any]:
    from loratune.generation.batch.row_answers import REFUSED, TOO_LONG

    results = {row.number: answers.read(row.number, work.sides[0].answer) for row in work.rows}
    return {
        "rows": len(work.rows),
        "tokens": sum(result["tokens"] for result in results.values()),
        "finish": dict(Counter(result["finish"] for result in results.values())),
        "too_long": [number for number, result in results.items() if result["finish"] == TOO_LONG],
        "refused": [
            {"row": number, "error": result["error"]}
            for number, result in results.items()
            if result["finish"] == REFUSED
        ],
        "metrics": {side or ANSWERS: values for side, values in sums.items()} or None,
    }


def _summary(report: dict[str, Any], request: RowsRequest) -> dict[str, Any]:
    """What scripts are told, whether something was done or not."""
    told = {name: report.get(name) for name in ("rows", "tokens", "finish", "too_long", "metrics")}
    refused = report.get("refused", [])  # reports of earlier versions have none
    return {"output": str(request.output), **told, "refused": refused, "answered": 0, "kept": told["rows"]}


def _tell(request: RowsRequest, work: Work, tally: Tally, report: dict[str, Any]) -> None:
    """Show people what happened."""
    long = report["too_long"]
    if long:
        listed = ", ".join(map(str, long[:SHOWN_ROWS])) + (", …" if len(long) > SHOWN_ROWS else "")
        console.warn(
            f"{counted(len(long), 'row')} of {len(work.rows):,} did not fit into the context and got no answer: "
            f"row {listed}"
        )
    if report["metrics"]:
        from loratune.generation.batch.answer_scores import show_scores

        name = "base" if request.adapter and request.base and not request.compares else work.adapter or request.model
        show_scores(report["metrics"], {ANSWERS: str(name), "base": "base"})
    console.say(f"answers: {request.output}", style="bold")
    if tally.seconds:
        rate = tally.tokens / tally.seconds
        console.say(f"{counted(tally.answers, 'answer')}, {tally.tokens:,} tokens at {rate:,.0f} tokens/s")
