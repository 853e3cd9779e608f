"""docs/run-folder.md against the files of a real run: no file and no field is missing there, none is made up."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from test_sweep import finished_sweep
from typer.testing import CliRunner

from loratune.board.search import Search
from loratune.sweep.results import report_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "run-folder.md"
SOMETIMES = {
    *("runs/*", ".lock-owner.json", "tags.json"),  # trackers, while a process trains, and what a user adds
    *("model.safetensors.index.json", "Modelfile"),  # large models; and an export that this test does not make
}
SUMS = """\
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {rows}, cache_dir: {cache}}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{instruction}}}}"
doc_to_target: "{{{{output}}}}"
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
"""A task over the run's rows."""
GROUP = "group: all\ntask: [sums]\naggregate_metric_list: [{metric: exact_match}]\n"
FieldPath = tuple[str, ...]


def tables() -> dict[str, list[str]]:
    """Of each heading, the names in the first column of its table."""
    sections = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
    return {
        heading: re.findall(r"^\| `([^`]+)` \|", text, flags=re.M)
        for heading, text in zip(sections[::2], sections[1::2], strict=True)
    }


def leaves(value: Any, place: FieldPath = ()) -> Iterator[tuple[FieldPath, bool]]:
    """Path of every value, and whether it is nothing, which may stand for anything."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*place, key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from leaves(inner, (*place[:-1], f"{place[-1]}[]"))
    else:
        yield place, value in ({}, [], None)


def fits(field: str, place: FieldPath, is_nothing: bool) -> bool:
    """Whether a documented field stands for a value."""
    names = field.split(".")
    if is_nothing:
        names = names[: len(place)]
        names[-1] = names[-1].removesuffix("[]")
    return len(names) == len(place) and all(name in (part, "*") for name, part in zip(names, place, strict=True))


def undocumented(values: list[Any], fields: list[str]) -> set[str]:
    found = {leaf for value in values for leaf in leaves(value)}
    return {".".join(place) for place, nothing in found if not any(fits(field, place, nothing) for field in fields)}


def made_up(values: list[Any], fields: list[str]) -> list[str]:
    found = {leaf for value in values for leaf in leaves(value)}
    return [field for field in fields if not any(fits(field, place, nothing) for place, nothing in found)]


@pytest.fixture(scope="module")
def written(short_run: Path, few_texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run's merged model, exports, answers, and evaluation."""
    from loratune.cli.app import app

    folder = tmp_path_factory.mktemp("written")

    def loratune(*arguments: Any) -> None:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.stderr

    loratune("merge", "--adapter", short_run, "--output", folder / "merged")
    for kind, source in (("gguf", "--model"), ("bnb4", "--model"), ("vllm", "--adapter"), ("adapter", "--adapter")):
        given = folder / "merged" if source == "--model" else short_run
        loratune("export", source, given, "--format", kind, "--output", folder / kind)
    asked = ("--input", short_run.parent / "rows.json", "--output", folder / "answers.jsonl", "--max-new-tokens", 2)
    loratune("infer", "--adapter", short_run, *asked, "--metrics", "--no-adapter")
    tests = ("--tests", short_run.parent / "rows.json", "--output", folder / "eval", "--max-new-tokens", 2, "--junit")
    (folder / "tasks").mkdir()
    places = {"rows": short_run.parent / "rows.json", "cache": folder / "cache"}
    (folder / "tasks" / "sums.yaml").write_text(SUMS.format(**places))
    (folder / "tasks" / "all.yaml").write_text(GROUP)
    tasks = ("--tasks", "all", "--tasks-folder", folder / "tasks", "--limit", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loratune.generation.general_texts.ASSETS", few_texts)
        loratune("eval", "--adapter", short_run, *tests, *tasks)
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_field_is_on_the_page_and_every_field_of_the_page_is_written(
    short_run: Path, written: Path, tmp_path: Path
) -> None:
    rows = {key for row in read(short_run.parent / "rows.json") for key in row}
    answers = [
        {key: value for key, value in row.items() if key not in rows} for row in lines(written / "answers.jsonl")
    ]
    exports = [read(written / kind / "verification.json") for kind in ("gguf", "bnb4", "vllm", "adapter")]
    files = {
        "manifest.json": [read(short_run / "manifest.json")],
        "status.json": [read(short_run / "status.json")],
        "metrics.jsonl": lines(short_run / "metrics.jsonl"),
        "findings.json": [read(short_run / "findings.json")],
        "tags.json": [{"format_version": 1, "tags": ["best"]}],
        "report.json": [read(short_run / "report.json")],
        "probe.json": [{"rows": read(short_run / "probe.json")["rows"], "questions": 1}],  # messages are another's
        "checkpoint.json": [read(next((short_run / "checkpoints").iterdir()) / "checkpoint.json")],
        "verification.json of a merged model": [read(written / "merged" / "verification.json")],
        "verification.json of an export": exports,
        "sweep.json": [json.loads(json.dumps(report_of(*finished_sweep(tmp_path)).values()))],
        "answers.jsonl": answers,
        "eval.json": [read(written / "eval" / "eval.json")],
        "eval_tasks.json": [read(written / "eval" / "eval_tasks.json")],
        "answers.jsonl.report.json": [read(written / "answers.jsonl.report.json")],
    }
    fields = tables()
    assert {name for name in fields if ".json" in name} == set(files)
    for name, values in files.items():
        assert undocumented(values, fields[name]) == set(), name
        assert made_up(values, fields[name]) == [], name


def test_every_file_is_on_the_page_and_every_file_of_the_page_is_written(short_run: Path, written: Path) -> None:
    exports = [written / kind for kind in ("gguf", "bnb4", "vllm", "adapter")]
    checkpoints = list((short_run / "checkpoints").iterdir())
    folders = {
        "The run folder": [short_run],
        "A checkpoint": checkpoints,
        "A merged model": [written / "merged"],
        "An export": exports,
        "An evaluation": [written / "eval"],
    }
    names = tables()
    for heading, places in folders.items():
        there = {str(path.relative_to(place)) for place in places for path in place.rglob("*") if path.is_file()}
        told = names[heading]
        assert {file for file in there if not any(fnmatchcase(file, name) for name in told)} == set(), heading
        assert {name for name in told if not any(fnmatchcase(file, name) for file in there)} <= SOMETIMES, heading


def test_what_was_made_of_a_run_is_found_by_what_the_files_record(
    short_run: Path, written: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").symlink_to(short_run)
    (tmp_path / "made").symlink_to(written)
    found = Search(tmp_path).find()
    (run,) = found.runs
    base = read(short_run / "manifest.json")["base"]["tensors_sha256"]
    models = {model.name: model for model in found.models_of(run)}
    assert set(models) == {f"made/{kind}" for kind in ("merged", "gguf", "bnb4", "vllm", "adapter")}
    assert {model.base_sha256 for model in models.values()} == {base}
    assert [one.name for one in found.evaluations_of(run)] == ["made/eval"]
    assert not any(one.problems or one.changed for one in (run, *found.models))


def test_a_page_that_has_aged_is_seen() -> None:
    values = [{"a": {"b": 1, "c": []}, "list": [{"x": 1}]}]
    assert undocumented(values, ["a.b", "a.c", "list[].x"]) == set()
    assert undocumented(values, ["a.*", "list[].x"]) == set()
    assert undocumented(values, ["a.b", "list[].x"]) == {"a.c"}
    assert undocumented(values, ["a.b", "a.c"]) == {"list[].x"}
    assert made_up(values, ["a.b", "a.d", "list[].y"]) == ["a.d", "list[].y"]
    assert made_up([{"a": None}], ["a.b", "d"]) == ["d"]


def test_every_link_of_the_page_leads_to_a_heading() -> None:
    text = PAGE.read_text(encoding="utf-8")
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in tables()}
    assert set(re.findall(r"\(#([^)]+)\)", text)) <= anchors
