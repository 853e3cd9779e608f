"""Names of files and data sets: which are taken, which are refused, and with which words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import Result

from loratune.data.sources import FileKind, HubName, Source, file_kind, hub_name, parse_source
from loratune.errors import Exit, LoratuneError
from loratune.recipe.data_sections import DataSettings, SourceSettings


def refusal(text: str) -> str:
    with pytest.raises(LoratuneError) as caught:
        parse_source(text)
    assert caught.value.exit_code == Exit.DATA
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "name", "sample"),
    [
        ("rows.json", "rows.json", None),
        ("a/rows.JSONL", "a/rows.JSONL", None),
        ("rows.json#500", "rows.json", 500),
        ("rows.jsonl#007", "rows.jsonl", 7),
        ("a#b.json", "a#b.json", None),
        ("a#b.json#5", "a#b.json", 5),
        ("a#1/rows.json", "a#1/rows.json", None),
        ("a#1/rows.json#2", "a#1/rows.json", 2),
        ("rows.json#5.json", "rows.json#5.json", None),
        ("小李 的.json", "小李 的.json", None),
        ("two\nlines.json#5", "two\nlines.json", 5),
        ("rows.csv#5", "rows.csv", 5),
        ("rows.Parquet#5", "rows.Parquet", 5),
        ("rows.jsonl.GZ#5", "rows.jsonl.GZ", 5),
        ("hf:org/name:train#5", "hf:org/name:train", 5),
    ],
)
def test_a_name_may_end_in_a_count_of_rows(text: str, name: str, sample: int | None) -> None:
    assert parse_source(text) == Source(name, sample)


@pytest.mark.parametrize(
    ("marks", "sample", "repeat"),
    [
        ("#2x", None, 2),
        ("#1x", None, 1),
        ("#003x", None, 3),
        ("#999x", None, 999),
        ("#500#2x", 500, 2),
        ("#2x#500", 500, 2),
    ],
)
@pytest.mark.parametrize("name", ["rows.json", "a#b.csv.zst", "hf:org/name", "ms:org/name:config:split"])
def test_a_name_may_say_how_often_each_row_is_taken(name: str, marks: str, sample: int | None, repeat: int) -> None:
    assert parse_source(name + marks) == Source(name, sample, repeat)


@pytest.mark.parametrize(
    "count",
    [
        *("", "0", "000", "x", "-1", "1.5", " 5", "5 ", "+5", "1e3", "²", "٣", "#5#", "9" * 5000),
        *("0x", "2X", "x2", "2 x", "2.5x", "1000x", "²x", "5#6", "2x#3x", "5#2x#6"),
    ],
)
@pytest.mark.parametrize("name", ["rows.json", "hf:org/name:train"])
def test_an_odd_count_is_refused(name: str, count: str) -> None:
    assert "after # a number of rows is expected" in refusal(f"{name}#{count}")


def test_settings_of_an_entry_go_with_its_name() -> None:
    entry = SourceSettings(path="rows.json#500#2x", system="Be brief.", weight=0.5)
    assert parse_source(entry) == Source("rows.json", 500, 2, "Be brief.", 0.5)
    assert parse_source(SourceSettings(path="rows.json")) == Source("rows.json")


@pytest.mark.parametrize(
    "text",
    [
        "https://example.com/rows.json",
        "http://x/rows.json#5",
        "hf://datasets/a/b/rows.json",
        "s3://bucket/rows.jsonl",
        "file:///rows.json",
    ],
)
def test_an_address_is_refused_and_never_fetched(text: str) -> None:
    message = refusal(text)
    assert "nothing is fetched from the network; download the file first" in message
    assert "hf:org/name:split" in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf:org/name", ("hf", "org/name", None, "train")),
        ("hf:org/name:test", ("hf", "org/name", None, "test")),
        ("hf:org/name:20220301.en:train_sft", ("hf", "org/name", "20220301.en", "train_sft")),
        ("ms:Org-1/na.me_2:validation", ("ms", "Org-1/na.me_2", None, "validation")),
        ("ms:org/name:a b", None),
        ("rows.json", None),
    ],
)
def test_the_parts_of_a_data_set_s_name(text: str, parts: tuple[str, str, str | None, str] | None) -> None:
    assert hub_name(text) == (HubName(*parts) if parts else None)


@pytest.mark.parametrize(
    "rest",
    [
        *("", "name", "org/", "/name", "org/name/more", "../name", "org/..", "/etc/passwd", "org/name:"),
        *("org/name::train", "org/name:a:b:c", "org/name:train[:10]", "org/name: train"),
        *("datasets/org/name:train", "org/name:a/b"),
    ],
)
@pytest.mark.parametrize("hub", ["hf:", "ms:"])
def test_an_odd_name_of_a_data_set_is_refused_with_the_way_to_write_it(hub: str, rest: str) -> None:
    assert f"is written {hub}org/name:split" in refusal(hub + rest)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.json", ("json", None)),
        ("a.b.JSONL.Gz", ("jsonl", "gz")),
        ("a/b.csv.zst", ("csv", "zst")),
        ("a.json.csv", ("csv", None)),
        ("a.PARQUET", ("parquet", None)),
        ("a.parquet.gz", None),
        ("a.json#5", None),
        (".json", None),
    ],
)
def test_the_kind_of_a_file_is_its_ending(name: str, kind: tuple[str, str | None] | None) -> None:
    assert file_kind(name) == (FileKind(*kind) if kind else None)


@pytest.mark.parametrize(
    "ending",
    [".arrow", ".pkl", ".py", ".parquet.gz", ".json.bz2", ".json.gz.gz", ".json5", ".txt#5", ".gz", ".zst", ""],
)
@pytest.mark.parametrize("stem", ["rows", "a/.json", ""])
def test_a_file_of_another_kind_is_refused_by_its_name(stem: str, ending: str) -> None:
    if stem + ending:
        assert "not a .json, .jsonl, .csv or .parquet file" in refusal(stem + ending)


@pytest.mark.parametrize("name", [".", "..", "/", "rows.json.d"])
def test_a_folder_is_told_to_be_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.json.d").mkdir()
    monkeypatch.chdir(tmp_path)
    assert refusal(name) == f"{name}: is a folder; name the file of rows in it"


@pytest.mark.parametrize("name", ["~nobody", "\0", "[]", "null"])
def test_what_is_no_name_of_a_file_of_rows_is_refused(name: str) -> None:
    assert "not a .json, .jsonl, .csv or .parquet file" in refusal(name)


@pytest.mark.parametrize("blank", ["", " "])
@pytest.mark.parametrize("setting", ["data.train", "data.validation", "output"])
def test_a_blank_place_is_refused_with_its_setting(setting: str, blank: str, cli: Callable[..., Result]) -> None:
    flags = {"model.base": "tiny-qwen", "data.train": "rows.json", setting: blank}
    done = cli("sft", *(text for name, value in flags.items() for text in (f"--{name}", value)))
    assert done.exit_code == 2
    assert f"--{setting}: must" in done.stderr
    assert "must not be empty" in " ".join(done.stderr.split())


@pytest.mark.parametrize("entries", [["rows.json", ""], ["", "rows.json"], [{"path": " "}], [""]])
def test_a_blank_entry_of_a_list_is_refused(entries: list[Any]) -> None:
    for name in ("train", "validation"):
        with pytest.raises(ValidationError, match="must not be empty"):
            DataSettings.model_validate({"train": ["rows.json"], name: entries})


@pytest.mark.parametrize("columns", [{"instruction": ""}, {"": "q"}, {"instruction": " "}])
def test_a_column_without_a_name_is_refused(columns: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="neither may be empty"):
        DataSettings.model_validate({"train": ["rows.json"], "columns": columns})


@pytest.mark.parametrize("name", ["rows.xlsx", "rows.XLS", "rows.ods#5"])
def test_a_spreadsheet_is_refused_with_the_advice_to_save_it_as_csv(name: str) -> None:
    assert refusal(name).endswith("save it as CSV UTF-8")
