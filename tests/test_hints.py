"""Messages about folders that are not what was meant name the next step."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratune.data.reading.files import open_rows
from loratune.errors import LoratuneError
from loratune.evaluation.rows_file import read_tests
from loratune.plain_files import require_folder
from loratune.recipe.loading import find_recipe
from loratune.runs.opening import _require_adapter


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
