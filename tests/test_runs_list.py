"""`loratune runs list`, `compare` and `tag`: states, filters, lineage by hashes, damage, and what is read."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from board_runs import FALL, METRICS, OBJECTION, make_evaluation, make_model, make_run, write_adapter
from conftest import tree

from loratune.board.search import Search
from loratune.errors import Exit, LoratuneError
from loratune.evaluation.tasks.result import TaskResult, TasksResult, write_tasks
from loratune.generation.batch.answer_file import open_answers
from loratune.recipe.loading import load_recipe
from loratune.runs.lineage import sealed_digest
from loratune.runs.lock import run_lock
from loratune.runs.manifest import Manifest, TrainedFile, read_manifest
from loratune.runs.output import begin_run, seal_run
from loratune.runs.report import Told
from loratune.runs.tags import change_tags, read_tags

STATES = ("finished", "interrupted", "diverged", "failed")
opened: list[str] | None = None
"""Files that are opened while it is a list."""


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if opened is not None and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_note)  # sees every open of the process, and cannot be removed


@contextmanager
def opens_noted() -> Iterator[list[str]]:
    global opened
    opened = names = []
    try:
        yield names
    finally:
        opened = None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def listed(cli: Any, folder: Path, *flags: Any) -> dict[str, Any]:
    """Name → run, as the list says as JSON."""
    done = cli("runs", "list", folder, "--json", *flags)
    assert done.exit_code == 0, done.stderr
    return {run["name"]: run for run in json.loads(done.stdout)["folders"][0]["runs"]}


def words(text: str) -> str:
    return " ".join(text.split())


# --- the list ---


def test_every_state_is_told_and_a_run_runs_while_its_lock_is_held(cli: Any, folder: Path) -> None:
    for state in STATES:
        make_run(folder / state, state)
    crashed, running = make_run(folder / "crashed", "running"), make_run(folder / "sweep/trials/00-a", "running")
    with run_lock(running):
        found = listed(cli, folder)
    assert {name: run["state"] for name, run in found.items()} == {
        **{state: state for state in STATES},
        "crashed": "crashed",
        "sweep/trials/00-a": "running",
    }
    assert listed(cli, folder)["sweep/trials/00-a"]["state"] == "crashed"
    finished, other = found["finished"], found["crashed"]
    assert (finished["loss"], finished["exact_answers"], finished["step"], finished["rows"]) == (1.0, 0.5, 4, 12)
    assert (other["loss"], other["validation_loss"], other["step"], other["steps"]) == (1.0, 1.5, 4, 4)
    assert finished["bytes"] == sum(path.stat().st_size for path in (folder / "finished").rglob("*") if path.is_file())
    assert crashed.is_dir()


def test_a_validation_of_the_base_is_not_told_as_that_of_the_adapter(cli: Any, folder: Path) -> None:
    run = make_run(folder / "new", "running", metrics=METRICS[:2])
    with run_lock(run):
        found, shown = listed(cli, folder)["new"], cli("runs", "show", run).stdout
        assert (found["loss"], found["validation_loss"], found["exact_answers"]) == (2.0, None, None)
        assert "validation loss" not in shown
        assert "2.5000" not in cli("runs", "list", folder).stdout + shown
        make_run(folder / "new", "running")
        assert listed(cli, folder)["new"]["validation_loss"] == 1.5


def test_the_list_is_filtered_and_sorted(cli: Any, folder: Path) -> None:
    one = make_run(folder / "one", settings={"model.base": "org/Small"})
    two = make_run(folder / "two", metrics=[], weights=bytes(9000))
    make_run(folder / "three", "interrupted", metrics=[*METRICS, {"step": 5, "validation_loss": 0.5, "loss": 0.1}])
    change_tags(one, ["best", "小李"])
    change_tags(two, ["best"])
    assert set(listed(cli, folder, "--tag", "best", "--tag", "小李")) == {"one"}
    assert set(listed(cli, folder, "--base", "small")) == {"one"}
    assert set(listed(cli, folder, "--state", "interrupted", "--state", "failed")) == {"three"}
    assert next(iter(listed(cli, folder, "--sort", "size"))) == "two"
    assert list(listed(cli, folder, "--sort", "name")) == ["one", "three", "two"]
    assert next(iter(listed(cli, folder, "--sort", "loss"))) == "three"
    wrong = cli("runs", "list", folder, "--state", "finishd")
    assert (wrong.exit_code, "there are running, finished" in wrong.stderr) == (Exit.USAGE, True)


def test_the_newest_run_is_first(folder: Path) -> None:
    for name, time in (("a", "2026-01-02"), ("b", "2026-03-04"), ("c", "2025-01-01")):
        status = make_run(folder / name) / "status.json"
        status.write_text(json.dumps(json.loads(status.read_text()) | {"time": f"{time}T00:00:00+00:00"}))
    assert [run.name for run in Search(folder).find().runs] == ["b", "a", "c"]


@pytest.mark.parametrize("columns", [30, 80, 200])
def test_nothing_is_cut_at_any_width(cli: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    data = [TrainedFile(f"in/{'rows-of-a-long-name-' * 5}{place}.json", "0", 7, 7, "alpaca") for place in range(3)]
    run = make_run(folder / f"{'a-run-of-a-long-name-' * 6}小李", data=data, settings={"model.base": "org/" + "b" * 90})
    change_tags(run, [f"tag-{place}-of-thirty-characters" for place in range(6)])
    make_evaluation(folder / "eval", run, "no difference")
    make_model(folder / f"{'merged-' * 15}end", run)
    monkeypatch.setenv("COLUMNS", str(columns))
    done = cli("runs", "list", folder)
    assert done.exit_code == 0, done.stderr
    told = done.stdout.replace("\n", "")
    tags = [f"tag-{place}-of-thirty-characters" for place in range(6)]
    for text in (run.name, "b" * 90, *(Path(file.path).name for file in data), *tags, "no difference", "merged-" * 15):
        assert text in told, text
    assert "…" not in done.stdout


def test_only_small_files_are_read_and_only_what_has_changed_is_read_again(folder: Path) -> None:
    count = 20
    for place in range(count):
        change_tags(make_run(folder / f"run-{place}", STATES[place % 4], metrics=METRICS * 500), [f"tag-{place}"])
    search = Search(folder)
    search.find()  # modules are imported
    with opens_noted() as names:
        found = Search(folder).find()
    mine = [name for name in names if name.startswith(str(folder))]
    assert len(found.runs) == count
    assert len(mine) <= 4 * count  # status, manifest, report or the end of the metrics, and tags
    read = {Path(name).name for name in mine}
    assert read == {"status.json", "manifest.json", "report.json", "metrics.jsonl", "tags.json"}
    change_tags(folder / "run-7", ["new"])
    with opens_noted() as names:
        again = search.find()
    assert "new" in again.run("run-7").tags
    assert {Path(name).parent.name for name in names if name.startswith(str(folder))} == {"run-7"}


def test_the_end_of_the_metrics_is_read_alone(folder: Path) -> None:
    lines = [{"step": step, "loss": 1 / (step + 1)} for step in range(100_000)]
    run = make_run(folder / "long", "interrupted", metrics=lines)
    assert Search(folder).find().run("long").loss == lines[-1]["loss"]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 100000, "lo')  # as a process that was killed leaves it
    assert Search(folder).find().run("long").loss == lines[-1]["loss"]


# --- damage ---


def _foreign_manifest(folder: Path) -> None:
    (folder / "status.json").unlink()
    (folder / "manifest.json").write_text('{"name": "an app", "icons": []}')


def _status_is_a_pipe(folder: Path) -> None:
    (folder / "status.json").unlink()
    os.mkfifo(folder / "status.json")


DAMAGE = {
    "status cut": lambda run: (run / "status.json").write_text('{"state": "fin'),
    "status of others": lambda run: (run / "status.json").write_text('{"state": "sleeping"}'),
    "status a pipe": _status_is_a_pipe,
    "status a list": lambda run: (run / "status.json").write_text("[]"),
    "manifest bytes": lambda run: (run / "manifest.json").write_bytes(bytes(range(256))),
    "manifest of others": _foreign_manifest,
    "manifest nested": lambda run: (run / "manifest.json").write_text("[" * 200_000),
    "report empty": lambda run: (run / "report.json").write_text(""),
    "report of later": lambda run: (run / "report.json").write_text('{"format_version": 99}'),
    "tags of others": lambda run: (run / "tags.json").write_text('{"tags": {"a": 1}}'),
}


def test_what_is_damaged_or_foreign_has_a_line_and_ends_nothing(cli: Any, folder: Path) -> None:
    make_run(folder / "whole")
    for name, damage in DAMAGE.items():
        damage(make_run(folder / name))
    (folder / "photos" / "2026").mkdir(parents=True)
    (folder / "loop").symlink_to(folder)
    (folder / "self").symlink_to("self")
    (folder / "model").mkdir()
    (folder / "model" / "verification.json").write_text('{"kind": "merged model"}')
    (folder / "eval").mkdir()
    (folder / "eval" / "eval.json").write_text("{")
    found = listed(cli, folder)
    assert set(found) == {"whole", *DAMAGE}
    assert {name for name, run in found.items() if not run["problems"]} == {"whole"}
    assert {name for name, run in found.items() if run["state"] == "damaged"} == {
        *(name for name in DAMAGE if name.startswith("status")), "manifest of others"
    }  # fmt: skip
    done = cli("runs", "list", folder)
    assert done.exit_code == 0
    assert "model" in done.stdout
    assert "not what loratune wrote there" in done.stdout
    assert f"evaluation {folder}/eval: " in done.stderr
    assert "nothing of loratune's in: photos" in words(done.stderr)


def test_an_evaluation_on_the_way_is_told_and_results_of_others_are_not(cli: Any, folder: Path) -> None:
    run = make_run(folder / "run")
    (folder / "strange").mkdir()
    (folder / "strange" / "results.jsonl").write_text('{"score": 1}\n')
    begun = folder / "begun"
    begun.mkdir()
    with open_answers(begun / "answers.jsonl", {"adapter": "a"}, False, begun / "results.jsonl") as file:
        told = words(cli("runs", "list", folder).stderr)
        assert f"evaluation {begun}: not finished" in told
        assert "strange" not in told
        assert "nothing of loratune's" not in told
        file.add(1, "answer", {"answer": "A model."})
    assert f"evaluation {begun}: not finished" in words(cli("runs", "list", folder).stderr)
    make_evaluation(folder / "done", run)
    shutil.copy(folder / "done" / "eval.json", begun)
    assert "not finished" not in words(cli("runs", "list", folder).stderr)


def test_benchmarks_alone_are_listed_with_their_tasks(cli: Any, folder: Path) -> None:
    (folder / "scores").mkdir()
    search = Search(folder)
    assert search.find().foreign == ("scores",)
    tasks = tuple(TaskResult(name, None, 4, 4, 0, ()) for name in ("gsm8k", "ours"))
    write_tasks(folder / "scores", TasksResult("out/faq", "org/base", None, {}, None, tasks))
    found = search.find()
    assert (found.foreign, found.values()["evaluations"][0]["tasks"]) == ((), ["gsm8k", "ours"])
    assert f"evaluation {folder}/scores: benchmark tasks (gsm8k, ours) of out/faq" in words(
        cli("runs", "list", folder).stderr
    )
    (folder / "scores" / "eval_tasks.json").write_text("{")
    assert "eval_tasks.json: cannot be read" in words(cli("runs", "list", folder).stderr)


def test_a_folder_that_is_not_there_is_an_error(cli: Any, tmp_path: Path) -> None:
    done = cli("runs", "list", tmp_path / "nowhere")
    assert (done.exit_code, "no such folder" in done.stderr) == (Exit.MODEL, True)


# --- lineage ---


def test_verdicts_and_models_are_found_by_hash_and_not_by_name(cli: Any, folder: Path) -> None:
    run = make_run(folder / "run")
    make_run(folder / "other", weights=b"others")
    make_evaluation(folder / "run" / "eval", run)
    make_model(folder / "a" / "merged", run)
    found = listed(cli, folder)
    assert [one["verdict"] for one in found["run"]["evaluations"]] == ["better"]
    assert [one["name"] for one in found["run"]["models"]] == ["a/merged"]
    assert found["run"]["models"][0]["has_base_of_run"] is True
    assert (found["other"]["evaluations"], found["other"]["models"]) == ([], [])
    shown = cli("runs", "show", folder / "a" / "merged", "--json")
    assert json.loads(shown.stdout)["runs"] == []  # the run is not beside it
    beside = make_model(folder / "merged", run)
    assert json.loads(cli("runs", "show", beside, "--json").stdout)["runs"] == ["run"]
    told = json.loads(cli("runs", "show", run, "--json").stdout)
    assert [one["name"] for one in told["models"]] == ["a/merged", "merged"]
    assert [(one["name"], one["fallen"]) for one in told["evaluations"]] == [("run/eval", {"form": FALL})]
    assert [one["objection"] for one in told["evaluations"]] == [OBJECTION]
    assert f"better on 9 of 9 rows; {OBJECTION}; {FALL}" in words(cli("runs", "show", run).stdout)
    assert "of run" in cli("runs", "show", beside).stdout


def test_what_was_made_of_an_earlier_adapter_is_not_the_run_s(cli: Any, folder: Path) -> None:
    run = make_run(folder / "run")
    make_evaluation(folder / "eval", run)
    make_model(folder / "merged", run)
    write_adapter(run, b"trained anew")
    seal_run(run)
    found = listed(cli, folder)["run"]
    assert (found["evaluations"], found["models"], found["changed"]) == ([], [], ()) or found["changed"] == []
    done = cli("runs", "list", folder)
    assert "has been trained anew since" in words(done.stderr)
    assert "an adapter of no run here" in done.stdout


def test_another_base_and_a_changed_file_are_told(cli: Any, folder: Path) -> None:
    run = make_run(folder / "run")
    model = make_model(folder / "merged", run, base_sha256="0" * 64)
    done = cli("runs", "list", folder)
    assert "its base is not the one that run was trained on" in done.stdout
    assert "changed or missing" not in done.stdout
    write_adapter(run, b"longer weights")
    (model / "config.json").unlink()
    done = cli("runs", "list", folder)
    assert "changed or missing: adapter/adapter_model.safetensors" in done.stdout
    assert "changed or missing: config.json" in done.stdout
    write_adapter(run, b"weighty")  # as long as before: its hash tells
    assert "adapter/adapter_model.safetensors" not in cli("runs", "list", folder).stdout
    assert "changed since: adapter/adapter_model.safetensors" in cli("runs", "show", run).stdout
    assert "config.json: missing" in cli("runs", "show", model).stdout


def test_the_rows_of_a_run_are_compared_with_those_that_lie_there(cli: Any, short_run: Path, tmp_path: Path) -> None:
    (data,) = json.loads(cli("runs", "show", short_run, "--json").stdout)["data"]
    assert (data["now"], data["rows"]) == ("unchanged", 12)
    rows = tmp_path / "rows.json"
    rows.write_text("[]")
    files = [TrainedFile(str(rows), "0" * 64, 1, 1, "alpaca"), TrainedFile(str(tmp_path / "gone"), "0", 1, 1, "alpaca")]
    run = make_run(tmp_path / "run", data=files)
    told = json.loads(cli("runs", "show", run, "--json").stdout)["data"]
    assert [file["now"] for file in told] == ["changed since", "not here"]


def test_the_hash_in_a_manifest_is_that_of_the_files(short_run: Path) -> None:
    from loratune.generation.batch.request import _adapter_hash

    assert sealed_digest(read_manifest(short_run)) == _adapter_hash(short_run / "adapter")


# --- tags ---


def test_tags_change_nothing_that_is_sealed(cli: Any, folder: Path) -> None:
    run = make_run(folder / "run")
    before = tree(run)
    assert cli("runs", "tag", run, "best", "小李", "v1.2").exit_code == 0
    assert read_tags(run) == ("best", "v1.2", "小李")
    assert cli("runs", "tag", run, "best", "小李", "--remove").exit_code == 0
    assert read_tags(run) == ("v1.2",)
    after = tree(run)
    assert after.pop("tags.json")
    assert after == before
    assert json.loads(cli("runs", "show", run, "--json").stdout)["changed"] == []
    assert cli("verify", run).exit_code == 0


@pytest.mark.parametrize("name", ["", " ", "two words", "a,b", "-x", "a" * 41, "a\nb", "<script>", "\x1b[31m"])
def test_a_tag_is_one_plain_word(cli: Any, folder: Path, name: str) -> None:
    run = make_run(folder / "run")
    done = cli("runs", "tag", run, "fine", "--", name)
    assert (done.exit_code, "at most 40 letters" in done.stderr) == (Exit.USAGE, True)
    assert read_tags(run) == ()


def test_a_tag_that_is_not_there_and_a_folder_that_is_no_run_are_errors(cli: Any, folder: Path) -> None:
    run = make_run(folder / "run")
    change_tags(run, ["best"])
    done = cli("runs", "tag", run, "worst", "--remove")
    assert (done.exit_code, "its tags are best" in done.stderr) == (Exit.USAGE, True)
    assert cli("runs", "tag", folder, "best").exit_code == Exit.MODEL
    assert sorted(path.name for path in folder.iterdir()) == ["run"]


def test_a_link_in_place_of_the_tags_is_replaced_and_not_followed(folder: Path) -> None:
    run, other = make_run(folder / "run"), folder / "other.json"
    other.write_text('{"format_version": 1, "tags": []}')
    (run / "tags.json").symlink_to(other)
    change_tags(run, ["best"])
    assert other.read_text() == '{"format_version": 1, "tags": []}'
    assert read_tags(run) == ("best",)


def test_tags_stay_with_a_resumed_run_and_go_with_one_that_is_overwritten(folder: Path) -> None:
    run = make_run(folder / "run", "interrupted")
    recipe = load_recipe(str(run / "recipe.yaml"), {})
    change_tags(run, ["best"])
    begin_run(run, recipe, Manifest(), keep=True)
    assert read_tags(run) == ("best",)
    begin_run(run, recipe, Manifest())
    assert read_tags(run) == ()


# --- the comparison ---


def compared(cli: Any, *runs: Path) -> dict[str, Any]:
    done = cli("runs", "compare", *runs, "--json")
    assert done.exit_code == 0, done.stderr
    values: dict[str, Any] = json.loads(done.stdout)
    return values


def rows_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {row["name"]: row["values"] for row in rows}


def test_a_comparison_shows_what_differs_and_nothing_else(cli: Any, folder: Path) -> None:
    mine = TrainedFile("in/rows.json", "d" * 64, 12, 12, "alpaca")
    one = make_run(folder / "one", data=[mine])
    moved, more = TrainedFile("elsewhere/rows.json", "d" * 64, 12, 12, "alpaca"), TrainedFile("b.json", "e", 3, 3, "x")
    metrics = [{"step": 0, "validation_loss": 3.0}, {"step": 3, "loss": 9.0}, {"step": 4, "loss": 0.5}]
    told = Told("Who are you?", "I am Robin.", "I am a model.", "Robin.", True, True)
    two = make_run(
        folder / "two", data=[moved, more], metrics=metrics, settings={"lora.rank": "32"}, weights=b"2", told=[told]
    )
    found = compared(cli, one, two)
    assert found["runs"] == [str(one), str(two)]
    assert rows_of(found["settings"]) == {"lora.rank": [16, 32]}
    assert rows_of(found["data"]) == {"b.json e": [None, 3]}
    curves = {curve["name"]: (curve["steps"], curve["values"]) for curve in found["curves"]}
    assert curves == {"training loss": ([4], [[1.0], [0.5]]), "validation loss": ([0], [[2.5], [3.0]])}
    (asked,) = found["answers"]
    assert (asked["bases"], asked["answers"]) == (["I am a model."] * 2, ["I am Robin!", "Robin."])
    assert rows_of(found["figures"])["health"] == ["Look at the answers."] * 2
    shown = cli("runs", "compare", one, two)
    for text in ("lora.rank", "32", "b.json e", "step 4", "0.5000", "I am Robin!", "Robin.", "I am a model."):
        assert text in shown.stdout, text
    mean = "a training loss is the mean since the line before it"
    assert mean in shown.stderr
    assert mean not in cli("runs", "compare", one, make_run(folder / "again")).stderr


def test_runs_that_are_alike_and_runs_without_a_common_step_are_told_so(cli: Any, folder: Path) -> None:
    one = make_run(folder / "one")
    two = make_run(folder / "two", "interrupted", metrics=[{"step": 3, "loss": 1.0}])
    done = cli("runs", "compare", one, two)
    assert "no setting differs" in done.stderr
    assert "the data is the same" in done.stderr
    assert "no step was logged in all of them" in done.stderr


def test_runs_that_set_other_rows_aside_do_not_have_the_same_data(cli: Any, folder: Path) -> None:
    one = make_run(folder / "one")
    two = make_run(folder / "two", settings={"data.validation": "0"})
    report = json.loads((two / "report.json").read_text())
    report["rows"] = {"training": 12, "validation": 0}
    (two / "report.json").write_text(json.dumps(report))
    done = cli("runs", "compare", one, two)
    assert "the data is the same" not in words(done.stderr)
    assert "read, split and ordered differ: data.validation" in words(done.stderr)
    rows = rows_of(compared(cli, one, two)["figures"])["rows"]
    assert rows == ["12 rows: 10 trained, 2 for validation", "12 rows: 12 trained, 0 for validation"]


def test_an_edited_recipe_is_told_and_a_damaged_run_is_compared_as_far_as_it_can_be(cli: Any, folder: Path) -> None:
    one, two, three = (make_run(folder / name) for name in ("one", "two", "three"))
    text = (two / "recipe.yaml").read_text()
    (two / "recipe.yaml").write_text(text.replace("rank: 16", "rank: 64"))
    (three / "report.json").write_text("{")
    found = compared(cli, one, two, three)
    assert rows_of(found["settings"]) == {"lora.rank": [16, 64, 16]}
    problems = "\n".join(found["problems"])
    assert "recipe.yaml has been changed since the run wrote it" in problems
    assert f"{three}: {three / 'report.json'}: cannot be read" in problems
    assert rows_of(found["figures"])["time"] == ["2.5 s", "2.5 s", "2.1 s"]


def test_one_run_is_no_comparison_and_neither_is_a_folder_of_others(cli: Any, folder: Path) -> None:
    run = make_run(folder / "run")
    assert cli("runs", "compare", run).exit_code == Exit.USAGE
    assert cli("runs", "compare", run, folder).exit_code == Exit.MODEL


@pytest.mark.parametrize(
    ("steps", "told"), [((), "none"), ((27,), "1, at step 27"), ((9, 18, 27), "3, at steps 9, 18, 27")]
)
def test_checkpoints_are_counted_and_their_steps_named(
    cli: Any, folder: Path, steps: tuple[int, ...], told: str
) -> None:
    run = make_run(folder / "run", "interrupted")
    for step in steps:
        (run / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    shown = cli("runs", "show", run)
    assert f"checkpoints {told} files" in words(shown.stdout)
    assert f"{'--resume' if steps else '--overwrite'}" in shown.stderr


def test_a_model_is_not_compared_but_its_run_is_named_and_every_such_folder(cli: Any, folder: Path) -> None:
    run = make_run(folder / "run")
    gone = make_run(folder / "gone", weights=b"others")
    models = make_model(folder / "merged", run), make_model(folder / "other", gone)
    shutil.rmtree(gone)
    done = cli("runs", "compare", models[0], run, models[1])
    assert done.exit_code == Exit.MODEL
    told = words(done.stderr)
    assert f"{models[0]}: a merged model, not a run; give the run that it was made from, {run}" in told
    assert f"{models[1]}: a merged model, not a run; give the run that it was made from, which does not lie" in told
    assert cli("runs", "compare", run, make_run(folder / "run-2")).exit_code == 0


def test_a_name_that_no_run_has_is_an_error(folder: Path) -> None:
    make_run(folder / "run")
    with pytest.raises(LoratuneError, match=r"no run \.\./run"):
        Search(folder).find().run("../run")
