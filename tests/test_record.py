"""What the typed files say, read by this version, by earlier files' names, and not at all from later ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratune.errors import Exit, LoratuneError
from loratune.recipe import names
from loratune.recipe.loading import load_written_recipe
from loratune.recipe.sections import Recipe
from loratune.runs import merged as merges
from loratune.runs import report as reports
from loratune.runs import verification as verifications
from loratune.runs.exported import GgufReadBack, ServedAdapter
from loratune.runs.manifest import Manifest, TrainedBase, TrainedFile, TrainedTemplate, read_manifest, write_manifest
from loratune.runs.model_check import ModelCheck
from loratune.runs.record import RunRecord, read_record
from loratune.runs.report import Report, read_report, write_report
from loratune.runs.verification import ExportedFolder, MergedModel, read_verification, write_verification

OLD_RUN = Path(__file__).parent / "old_runs" / "finished"
RECIPE = Recipe.model_validate(
    {
        "model": {"base": "org/name", "quantization": "nf4"},
        "lora": {"rank": 4, "target_modules": ["q_proj"]},
        "data": {"train": ["a.json#5"], "validation": ["b.json"], "columns": {"instruction": "q"}},
        "prompt": {"system": "Answer briefly.", "enable_thinking": True},
        "output": "out/mine",
    }
)


def changed(change: Any) -> RunRecord:
    values = json.loads(json.dumps(RunRecord.of(RECIPE).values()))
    change(values)
    return read_record(values)


def test_a_manifest_reads_back_equal_from_its_file(tmp_path: Path) -> None:
    manifest = Manifest(
        TrainedBase("org/name", "/models/name", {"weights_sha256": "0", "tensors": {"a": "1"}}),
        TrainedTemplate("1", 3, "auto", "", "<think>", "2026-01-02"),
        (TrainedFile("a.json", "2", 5, 9, "alpaca", ("note",)),),
        7,
        {"torch": "2"},
        RunRecord.of(RECIPE),
        "2026-01-02T03:04:05+00:00",
        {"recipe.yaml": {"bytes": 1, "sha256": "3"}},
        is_sealed=True,
        checks=(ModelCheck("padding", "padding changes nothing", 0.25),),
    )
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


def test_a_manifest_of_an_earlier_version_has_no_record_and_its_recipe_makes_one() -> None:
    manifest = read_manifest(OLD_RUN)
    raw = json.loads((OLD_RUN / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest.record, manifest.is_sealed) == (None, False)
    assert manifest.base is not None
    assert {"name": manifest.base.name, "path": manifest.base.path, **manifest.base.hashes} == raw["base"]
    assert dict(manifest.files or {}) == raw["files"]
    record = RunRecord.of(load_written_recipe(OLD_RUN / "recipe.yaml"))
    assert (record.model.base, record.lora.target_modules, record.name) == ("tiny-qwen", ["q_proj"], "finished")


def test_a_record_is_read_by_the_present_names_of_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(names.RENAMED, "lora.width", "lora.rank")
    monkeypatch.setitem(names.DROPPED, "model.colour", "it had no effect")

    def of_before(values: dict[str, Any]) -> None:
        values["lora"]["width"] = values["lora"].pop("rank")
        values["model"]["colour"] = "green"
        del values["prompt"]["generation_prompt"]  # a setting that the earlier version did not have

    assert changed(of_before) == RunRecord.of(RECIPE)


def test_what_a_later_version_adds_is_left_out_and_its_own_record_is_refused() -> None:
    assert changed(lambda values: values["lora"].update(shape="round")) == RunRecord.of(RECIPE)
    with pytest.raises(ValueError, match="version 2; this loratune reads 1"):
        changed(lambda values: values.update(version=2))


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: values.pop("model"),
        lambda values: values.update(prompt=5),
        lambda values: values["lora"].update(rank="eight"),
        lambda values: values.update(columns=None),
        lambda values: values.update(learning_rate=None),
    ],
)
def test_a_damaged_record_is_a_message(tmp_path: Path, damage: Any) -> None:
    write_manifest(tmp_path, Manifest(record=RunRecord.of(RECIPE)))
    values = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    damage(values["record"])
    del values["sha256"]
    (tmp_path / "manifest.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(LoratuneError, match="its record is damaged") as failure:
        read_manifest(tmp_path)
    assert failure.value.exit_code == Exit.MODEL


REPORT = Report(
    "out/mine",
    "org/name",
    4,
    1.5,
    rows=reports.RowCounts(5, 1),
    loss=reports.Losses(2.0, 1.0),
    validation_loss=reports.ValidationLosses(2.0, 1.5, None, None, 4),
    exact_answers=reports.ExactAnswers(6, None, 0.5, 0.5, 4),
    best_by="exact",
    seconds=1.5,
    peak_memory_bytes=7,
    start_up_seconds={"imports": 1.0},
    adapter=reports.AdapterCounts(1, 2, {"q_proj": 3}, 4, 5),
    health=reports.Health(
        {"q_proj": reports.Updates(3, 0.1, 0.2, ("a",), ())},
        ("b",),
        reports.Answers((reports.Told("?", "!", "x", "y", True, None, True),)),
        ("Look.",),
    ),
    warnings=("Mind.",),
)
PARITY = verifications.Parity(5, 0.1, 0.01, 1.0, 0.0, 9.0)
MERGED = MergedModel(
    base="org/name",
    adapter_sha256="0",
    combined=merges.Combined("linear", None, {"a": merges.CombinedAdapter(0.5, "1")}),
    thinking=True,
    generation_prompt="auto",
    date="2026-01-02",
    dtype="bfloat16",
    bytes=8,
    read_back=merges.ReadBack(3, 2, 1, unchanged=("c",)),
    warnings=("Mind.",),
    models=verifications.ModelProof(
        "files and logits",
        {"original": PARITY},
        {"original": PARITY},
        "built-in questions",
        PARITY,
        verifications.Bounds(0.1, 0.2, 0.3),
        (verifications.Answer("?", "x", "y"),),
        (PARITY, PARITY),
    ),
    seconds=merges.MergeSeconds(1.0, 2.0),
)
GGUF = GgufReadBack(3, 9, {"F16": 8}, ("c",), 0.0)
EXPORTS = [
    ExportedFolder("gguf", "a.gguf", GGUF, PARITY),
    ExportedFolder("bnb4", read_back=PARITY, logits=PARITY),
    ExportedFolder("vllm", max_lora_rank=8, served=ServedAdapter("Qwen3_5ForConditionalGeneration", 4, 0.0, 1.5)),
]


def edit(path: Path, **others: Any) -> None:
    values = json.loads(path.read_text(encoding="utf-8")) | others
    values.pop("sha256", None)
    path.write_text(json.dumps(values), encoding="utf-8")


def refusal_of(read: Callable[[Path], Any], path: Path, **others: Any) -> str:
    """The message about a file with these values, after the file's name."""
    edit(path, **others)
    with pytest.raises(LoratuneError) as failure:
        read(path.parent)
    assert failure.value.exit_code == Exit.MODEL
    assert str(failure.value).startswith(str(path))
    return str(failure.value).removeprefix(str(path))


def test_a_report_reads_back_equal_from_its_file_and_without_keys_of_later_versions(tmp_path: Path) -> None:
    write_report(tmp_path, REPORT)
    assert read_report(tmp_path) == REPORT
    answers = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["health"]["answers"]
    assert {name: answers[name] for name in ("changed", "judged", "ended", "cut_short")} == {
        "changed": 1,
        "judged": 0,
        "ended": 0,
        "cut_short": 1,
    }
    edit(tmp_path / "report.json", colour="green")
    assert read_report(tmp_path) == REPORT


@pytest.mark.parametrize("proved", [MERGED, MergedModel(), *EXPORTS], ids=lambda proved: type(proved).__name__)
def test_a_verification_reads_back_equal_from_its_file(tmp_path: Path, proved: Any) -> None:
    written = write_verification(tmp_path, proved, {"a": {"bytes": 1, "sha256": "3"}})
    assert read_verification(tmp_path) == written
    assert (written.proved, written.is_sealed) == (proved, True)
    edit(tmp_path / "verification.json", colour="green")
    again = read_verification(tmp_path)
    assert again is not None
    assert (again.proved, again.files, again.is_sealed) == (proved, written.files, False)


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"format_version": 2}, "made by another version of loratune (format 2, this one reads 1)"),
        ({"steps": "four"}, "damaged: steps: "),
        ({"loss": {"first": 1.0}}, "damaged: loss.last: "),
        ({"health": {"updates": [1]}}, "damaged: health.updates: "),
        ({"start_up_seconds": {"imports": None}}, "damaged: start_up_seconds.imports: "),
    ],
)
def test_a_damaged_report_is_a_message(tmp_path: Path, others: dict[str, Any], words: str) -> None:
    write_report(tmp_path, REPORT)
    assert f": {words}" in refusal_of(read_report, tmp_path / "report.json", **others)


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"format_version": 2}, "made by another version of loratune (format 2, this one reads 1)"),
        ({"kind": "a boat"}, "damaged: kind: 'a boat' is neither"),
        ({"thinking": 5}, "damaged: thinking: "),
        ({"base_checked": "banana"}, "damaged: base_checked: "),
        ({"merge_base": "banana"}, "damaged: merge_base: "),
        ({"verified": "banana"}, "damaged: verified: "),
        ({"generation_prompt": "banana"}, "damaged: generation_prompt: "),
        ({"versions": "banana"}, "damaged: versions: "),
        ({"files": {"../a": {"bytes": 1, "sha256": "3"}}}, "damaged: it does not say what the folder's files were"),
        ({"read_back": {}}, "damaged: read_back.tensors: "),
        ({"logits": {"original": {"tokens": 5}}}, "damaged: logits.original."),
        ({"files": {"a": 5}}, "damaged: it does not say what the folder's files were"),
        ({"kind": "export"}, "damaged: format: "),
    ],
)
def test_a_damaged_verification_is_a_message(tmp_path: Path, others: dict[str, Any], words: str) -> None:
    write_verification(tmp_path, MERGED)
    assert f": {words}" in refusal_of(read_verification, tmp_path / "verification.json", **others)


def test_a_merged_model_whose_verification_names_no_prompt_settings_is_refused(tmp_path: Path) -> None:
    from loratune.runs.opening import merged_prompt

    write_verification(tmp_path, MergedModel(date="yesterday"))
    with pytest.raises(LoratuneError, match="damaged: date: ") as failure:
        merged_prompt(tmp_path)
    assert failure.value.exit_code == Exit.MODEL


def test_later_commands_do_without_the_recipe_s_settings(
    cli: Any, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe.yaml that this version could not read is no obstacle: its bytes are as the run left them."""
    run = tmp_path / "run"
    flags = ["--model.base", "tiny-qwen", "--data.train", rows_file, "--training.max_steps", 1, "--output", run]
    assert cli("sft", *flags, "--evaluation.questions_share", 0).exit_code == 0
    monkeypatch.setattr("loratune.runs.manifest.load_written_recipe", lambda _: pytest.fail("read recipe.yaml"))
    for command in (["verify", run], ["export", "--adapter", run, "--format", "adapter", "--output", tmp_path / "out"]):
        result = cli(*command)
        assert result.exit_code == 0, result.stderr
