"""The run folder: writing in one step, opening it again, noticing changes, and the base's fingerprint."""

from __future__ import annotations

import json
import os
import re
import shutil
import tracemalloc
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from loratune.errors import Exit, LoratuneError
from loratune.recipe.data_sections import DataSettings
from loratune.recipe.loading import load_recipe
from loratune.recipe.sections import ModelSettings, Recipe
from loratune.runs.checkpoint import seal_checkpoint
from loratune.runs.fingerprint import fingerprint_base
from loratune.runs.folder import read_metrics
from loratune.runs.manifest import Manifest, TrainedBase
from loratune.runs.opening import open_adapter
from loratune.runs.output import begin_run, prepare_output, seal_run
from loratune.runs.record import RunRecord
from loratune.runs.status import set_status
from loratune.writing import folder_in_one_step, write_json, write_text

RECIPE = Recipe(model=ModelSettings(base="x"), data=DataSettings(train=["a.json"]))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run folder with a made-up adapter."""
    output = tmp_path / "run"
    begin_run(output, RECIPE, Manifest(TrainedBase("x", "/x"), record=RunRecord.of(RECIPE)))
    with folder_in_one_step(output / "adapter") as folder:
        (folder / "adapter_config.json").write_text("{}")
    seal_run(output)
    set_status(output, "finished")
    return output


def test_the_recipe_in_a_run_loads_back_to_an_equal_one(run: Path) -> None:
    assert load_recipe(str(run / "recipe.yaml"), {}) == RECIPE


def test_a_run_folder_its_adapter_and_a_checkpoint_open_with_the_run_s_recipe(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-000010"
    checkpoint.mkdir(parents=True)
    seal_checkpoint(checkpoint, 10, {"settings": {}, "rest": {}, "versions": {}}, {})
    for path in (run, run / "adapter", checkpoint):
        assert open_adapter(path).record == RunRecord.of(RECIPE)
    assert open_adapter(run).adapter == run / "adapter"
    assert open_adapter(checkpoint).adapter == checkpoint


def test_a_plain_peft_folder_opens_without_recipe(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert open_adapter(tmp_path).record is None


def test_other_folders_are_no_adapter(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(LoratuneError) as raised:
            open_adapter(path)
        assert raised.value.exit_code == Exit.MODEL


def test_a_changed_adapter_is_named(run: Path) -> None:
    (run / "adapter" / "adapter_config.json").write_text('{"lora_alpha": 1000}')
    with pytest.raises(LoratuneError, match=r"changed or missing.*adapter/adapter_config\.json"):
        open_adapter(run)


def test_a_run_without_adapter_tells_its_state_and_newest_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "adapter")
    (run / "checkpoints" / "step-000020").mkdir(parents=True)
    set_status(run, "interrupted")
    with pytest.raises(LoratuneError, match=r"state: interrupted.*step-000020"):
        open_adapter(run)


def test_a_manifest_of_another_format_is_refused(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    write_json(run / "manifest.json", manifest | {"format_version": 99})
    with pytest.raises(LoratuneError, match="format 99"):
        open_adapter(run)


def test_an_output_that_holds_something_else_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(LoratuneError, match="not a run") as raised:
            prepare_output(tmp_path, overwrite)
        assert raised.value.exit_code == Exit.USAGE
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_an_earlier_run_is_replaced_only_when_asked(run: Path) -> None:
    with pytest.raises(LoratuneError, match="--overwrite"):
        prepare_output(run, overwrite=False)
    prepare_output(run, overwrite=True)
    begin_run(run, RECIPE, Manifest())
    assert not (run / "adapter").exists()


@pytest.mark.parametrize("status", ["{}", "[]", "not json", '{"program": "another"}'])
def test_a_folder_with_somebody_else_s_status_file_is_never_touched(tmp_path: Path, status: str) -> None:
    (tmp_path / "status.json").write_text(status)
    with pytest.raises(LoratuneError, match="not a run"):
        prepare_output(tmp_path, overwrite=True)


@pytest.mark.parametrize("status", ["", "{", "[]", '{"program": "another"}', None])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_run_whose_status_is_damaged_is_told_how_to_mend_it(run: Path, status: str | None, overwrite: bool) -> None:
    if status is None:
        (run / "status.json").unlink()
    else:
        (run / "status.json").write_text(status)
    with pytest.raises(LoratuneError, match=r"status.json: missing or damaged") as raised:
        prepare_output(run, overwrite)
    words = re.search(r"write (\{.*\}) into it", raised.value.message)
    assert words
    (run / "status.json").write_text(words[1])
    prepare_output(run, overwrite=True)


def test_a_hole_in_the_metrics_takes_no_memory(run: Path) -> None:
    with (run / "metrics.jsonl").open("wb") as file:
        file.write(b'{"step": 1, "loss": 2.0}\n')
        file.seek(300 * 2**20)
        file.write(b'\n{"step": 2, "loss": 1.0}\n')
    tracemalloc.start()
    records = read_metrics(run)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [record["step"] for record in records] == [1, 2]
    assert peak < 60 * 2**20


def test_metrics_of_others_are_left_out(run: Path) -> None:
    lines = ['{"step": 1, "loss": 2.0}', '{"step": 2, "loss": "x"}', '{"step": 3, "validation_loss": null}', "[1]"]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    assert read_metrics(run) == [{"step": 1, "loss": 2.0}]


def test_replacing_a_run_leaves_what_a_user_has_put_beside_it(run: Path) -> None:
    (run / "notes.txt").write_text("mine")
    prepare_output(run, overwrite=True)
    begin_run(run, RECIPE, Manifest())
    assert (run / "notes.txt").read_text() == "mine"
    assert {path.name for path in run.iterdir()} == {"notes.txt", "recipe.yaml", "manifest.json", "status.json"}


def test_an_output_that_is_a_file_or_lies_under_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for output in (file, file / "run"):
        with pytest.raises(LoratuneError) as raised:
            prepare_output(output, overwrite=False)
        assert raised.value.exit_code == Exit.IO


def test_checking_an_output_leaves_nothing_behind(tmp_path: Path) -> None:
    prepare_output(tmp_path / "new" / "run", overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_names_with_spaces_and_chinese_work(tmp_path: Path) -> None:
    output = tmp_path / "my run 小李"
    prepare_output(output, overwrite=False)
    begin_run(output, RECIPE, Manifest())
    assert (output / "recipe.yaml").is_file()


def test_a_folder_that_fails_half_way_never_gets_its_name(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), folder_in_one_step(tmp_path / "target") as folder:
        fill(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_written_in_one_step_obeys_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with folder_in_one_step(tmp_path / "target") as folder:
            (folder / "file").write_text("x")
            (folder / "file").chmod(0o600)
    finally:
        os.umask(old)
    assert (tmp_path / "target" / "file").stat().st_mode & 0o777 == 0o640


def test_a_text_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    write_text(path, "new 新")
    assert path.read_text(encoding="utf-8") == "new 新"
    assert list(tmp_path.iterdir()) == [path]


def test_the_fingerprint_tells_another_model_of_the_same_shape(random_qwen: Path, tmp_path: Path) -> None:
    def fingerprint(folder: Path) -> dict[str, object]:
        return fingerprint_base(folder, [folder / "model.safetensors"])

    other = shutil.copytree(random_qwen, tmp_path / "other")
    assert fingerprint(other) == fingerprint(random_qwen)

    weights = load_file(other / "model.safetensors")
    for name, weight in weights.items():
        save_file(weights | {name: weight + 0.01}, other / "model.safetensors")
        found = fingerprint(other)
        different = {key for key in found if found[key] != fingerprint(random_qwen)[key]}
        assert different == {"weights_sha256", "tensors_sha256", "tensors"}, name

    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    assert fingerprint(other)["tokenizer_sha256"] != fingerprint(random_qwen)["tokenizer_sha256"]


def test_the_fingerprint_does_not_depend_on_how_weights_are_split(random_qwen: Path, tmp_path: Path) -> None:
    split = shutil.copytree(random_qwen, tmp_path / "split")
    weights = load_file(split / "model.safetensors")
    names = sorted(weights)
    parts = [split / "a.safetensors", split / "b.safetensors"]
    for path, part in zip(parts, (names[::2], names[1::2]), strict=True):
        save_file({name: weights[name] for name in part}, path)
    assert fingerprint_base(split, parts) == fingerprint_base(random_qwen, [random_qwen / "model.safetensors"])
