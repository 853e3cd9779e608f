"""Messages about folders that are not what was meant name the next step."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratune.data.reading.files import open_rows
from loratune.errors import LoratuneError
from loratune.evaluation.rows_file import read_tests
from loratune.plain_files import require_folder
from loratune.recipe.loading import find_recipe
from loratune.runs.lock import run_lock
from loratune.runs.manifest import Manifest, write_manifest
from loratune.runs.opening import _require_adapter, open_adapter, open_settled_adapter
from loratune.runs.status import set_status


def test_a_missing_folder_is_told_with_the_nearest_beside_it(tmp_path: Path) -> None:
    (tmp_path / "support-bot").mkdir()
    (tmp_path / "support-bto").write_text("a file is no folder")
    with pytest.raises(LoratuneError, match=r"no such folder; did you mean .*/support-bot\?"):
        require_folder(tmp_path / "suport-bot")
    with pytest.raises(LoratuneError, match=r"no such folder$"):
        require_folder(tmp_path / "else")
    with pytest.raises(LoratuneError, match=r"no such folder$"):
        require_folder(tmp_path / "nowhere" / "support-bot")


def test_a_missing_file_of_rows_is_told_with_the_nearest_beside_it(tmp_path: Path) -> None:
    (tmp_path / "kettles.json").write_text("[]")
    (tmp_path / "ketles.json").mkdir()
    with pytest.raises(LoratuneError, match=r"; did you mean .*/kettles\.json\?$"):
        open_rows(str(tmp_path / "kettle.json"))
    with pytest.raises(LoratuneError, match=r"no such file \(looked from .*\)$"):
        open_rows(str(tmp_path / "tests.jsonl"))


def test_a_missing_file_with_another_ending_is_told_with_the_nearest_beside_it(tmp_path: Path) -> None:
    for name in ("tests.json", "notes.txt", "cases.yaml"):
        (tmp_path / name).write_text("[]")
    for given, meant in (("tests.jsn", "tests.json"), ("test.jso#500", "tests.json"), ("tests.jsonl", "tests.json"),
                         ("cases.yml", "cases.yaml")):  # fmt: skip
        with pytest.raises(LoratuneError, match=rf"; did you mean {tmp_path}/{meant}\?$"):
            read_tests(str(tmp_path / given), {}, {})
    with pytest.raises(LoratuneError, match=r"nor one of the first three with \.gz or \.zst$"):
        read_tests(str(tmp_path / "notes.txt"), {}, {})  # is there


def test_a_missing_recipe_is_told_with_the_nearest_beside_it(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 1")
    (tmp_path / "recipe.yl").write_text("no recipe")
    with pytest.raises(LoratuneError, match=r"; did you mean .*/recipe\.yaml\? shipped are"):
        find_recipe(str(tmp_path / "recipe.yml"))


@pytest.mark.parametrize("is_begun", [True, False])
def test_a_run_without_an_adapter_is_told_with_the_command_that_goes_on(tmp_path: Path, is_begun: bool) -> None:
    if is_begun:
        (tmp_path / "checkpoints" / "step-4").mkdir(parents=True)
    with pytest.raises(LoratuneError) as raised:
        _require_adapter(tmp_path, tmp_path / "adapter")
    resumed = f"go on with: loratune sft --config {tmp_path / 'recipe.yaml'} --resume"
    assert (resumed in str(raised.value)) == is_begun


def test_the_command_that_goes_on_keeps_the_number_of_gpus(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-4").mkdir(parents=True)
    write_manifest(tmp_path, Manifest(files={}, gpus=2))
    with pytest.raises(LoratuneError, match=r"go on with: .* --gpus 2 --resume$"):
        open_adapter(tmp_path)


@pytest.mark.parametrize(("step", "told"), [(4, "checkpoints/step-000004"), (None, "no checkpoint yet")])
def test_of_a_run_that_trains_its_newest_checkpoint_is_offered(tmp_path: Path, step: int | None, told: str) -> None:
    for place in ("step-000002", "step-000004") if step else ():
        (tmp_path / "checkpoints" / place).mkdir(parents=True)
    write_manifest(tmp_path, Manifest(files={}))
    set_status(tmp_path, "running")
    with run_lock(tmp_path):
        for opens in (open_adapter, open_settled_adapter):
            with pytest.raises(LoratuneError, match=r"process \d+ on ") as raised:
                opens(tmp_path)
            assert "--resume" not in str(raised.value)
            assert str(raised.value).endswith(f": loratune runs show {tmp_path}")
            assert told in str(raised.value) or (opens is open_settled_adapter and not step)
    with pytest.raises(LoratuneError, match=rf"\(state: crashed\)(.|\n)*{'--resume' if step else '--overwrite'}$"):
        open_adapter(tmp_path)
