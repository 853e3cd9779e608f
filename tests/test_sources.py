"""Files of rows: what is read, what is refused, and with which words."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.data.sources import Row, Source, parse_source, read_rows
from loratune.errors import Exit, LoratuneError

CHINESE = [
    {"instruction": "请介绍一下你自己，你是谁？", "output": "我是由小张开发的人工智能助手小李，很高兴认识你。"}
] * 3
FRENCH = [
    {
        "instruction": "Où est la bibliothèque élégante près du café?",
        "output": "Elle est à côté de la forêt, après le pâté de maisons où naît la lumière.",
    }
] * 3
GOOD = '{"instruction": "a", "output": "b"}'


def write(path: Path, content: str | bytes) -> Source:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return Source(path)


def refusal(source: Source, code: Exit = Exit.DATA) -> str:
    with pytest.raises(LoratuneError) as caught:
        read_rows(source, seed=0)
    assert caught.value.exit_code == code
    return str(caught.value)


def values(rows: list[Row]) -> list[Any]:
    return [row.value for row in rows]


# --- what is read ---


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("name", ["rows.json", "rows.JSON"])
def test_a_json_list_is_read_with_the_places_of_its_rows(tmp_path: Path, mark: bytes, name: str) -> None:
    path = tmp_path / name
    rows = read_rows(write(path, mark + json.dumps(CHINESE, ensure_ascii=False).encode()), seed=0)
    assert values(rows) == CHINESE
    assert [row.place for row in rows] == [f"{path} row {number}" for number in (1, 2, 3)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_lines_of_json_are_read_with_their_line_numbers(tmp_path: Path, end: str, name: str, mark: str) -> None:
    path = tmp_path / name
    text = mark + end.join([GOOD, "", GOOD.replace("b", "c"), "  "])
    rows = read_rows(write(path, text), seed=0)
    assert [row.value["output"] for row in rows] == ["b", "c"]
    assert [row.place for row in rows] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, separator: str) -> None:
    row = {"instruction": f"a{separator}b", "output": "c"}
    line = json.dumps(row, ensure_ascii=False)
    rows = read_rows(write(tmp_path / "rows.jsonl", f"{line}\n{line}\n"), seed=0)
    assert values(rows) == [row, row]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=3), min_size=1, max_size=4), ascii_only=st.booleans()
)
def test_whatever_json_writes_is_read_back_from_both_kinds_of_file(
    rows: list[Any], ascii_only: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    document = json.dumps(rows, ensure_ascii=ascii_only, indent=1)
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    assert values(read_rows(write(folder / "rows.json", document), seed=0)) == rows
    assert values(read_rows(write(folder / "rows.jsonl", lines), seed=0)) == rows


# --- no rows ---


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("content", [b"", b" \n\t\r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf \n"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    assert refusal(write(path, content)) == f"{path}: 0 rows, the file is empty"


def test_an_empty_list_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert refusal(write(path, " [ ]\n")) == f"{path}: 0 rows"


def test_a_missing_file_is_told_with_the_folder_it_was_looked_for_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(Source(Path("rows.json"))) == f"rows.json: no such file (looked from {tmp_path})"


def test_a_name_that_no_file_can_have_is_a_missing_file() -> None:
    assert "no such file" in refusal(Source(Path("no\0name.json")))


def test_what_cannot_be_opened_is_a_failure_of_the_disk(tmp_path: Path) -> None:
    folder = tmp_path / "rows.json"
    folder.mkdir()
    assert refusal(Source(folder), Exit.IO) == f"{folder}: cannot be read: Is a directory"
    assert "cannot be read" in refusal(Source(tmp_path / ("a" * 300 + ".json")), Exit.IO)
    assert "cannot be read" in refusal(Source(write(tmp_path / "file", "x").path / "rows.json"), Exit.IO)


# --- encodings ---


@pytest.mark.parametrize(
    ("encoding", "rows"),
    [
        ("gbk", CHINESE),
        ("gb18030", CHINESE),
        ("utf-16", CHINESE),
        ("utf-16-le", CHINESE),
        ("utf-16-be", CHINESE),
        ("utf-32", CHINESE),
        ("latin-1", FRENCH),
        ("cp1252", FRENCH),
    ],
)
@pytest.mark.skipif(not shutil.which("iconv"), reason="needs iconv to run the line of the message")
def test_the_iconv_line_of_the_message_makes_the_file_readable(tmp_path: Path, encoding: str, rows: list[Any]) -> None:
    text = json.dumps(rows, ensure_ascii=False)
    message = refusal(write(tmp_path / "rows.json", text.encode(encoding)))
    assert "not UTF-8 (byte " in message
    line = message.splitlines()[-1].strip()
    assert line.startswith("iconv -f ")
    subprocess.run(line, shell=True, cwd=tmp_path, check=True)
    assert values(read_rows(Source(tmp_path / "utf8-rows.json"), seed=0)) == rows


@pytest.mark.parametrize("content", [b"\xff\xfe\xfd", b'[{"a": "\xc3\x28"}]', b"\x80", bytes(range(256))])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, content: bytes) -> None:
    assert "not UTF-8" in refusal(write(tmp_path / "rows.json", content))


# --- broken JSON ---


@pytest.mark.parametrize(
    ("text", "places"),
    [
        # The first place is the comma itself, which newer versions of Python name.
        ('[\n  {"output": "a"},\n]', ("2:18", "3:1")),
        ('[{"output": "a",}]', ("1:16", "1:17")),
        ('[\n  // rows\n  {"output": "a"}]', ("2:3",)),
        ("[{'output': 'a'}]", ("1:3",)),
        ('[\n{"output": "a"},\n{"outp', ("3:2",)),
        ('[{"output": "a"}', ("1:17",)),
        ('[{"output": "a"}] x', ("1:19",)),
        ('[{"output": a}]', ("1:13",)),
        ('[{"output": "a\nb"}]', ("1:15",)),
        ('[{"output": "\\x"}]', ("1:14",)),
        ('[{"output": True}]', ("1:13",)),
    ],
)
def test_broken_json_is_told_with_line_column_and_excerpt(tmp_path: Path, text: str, places: tuple[str, ...]) -> None:
    path = tmp_path / "rows.json"
    message = refusal(write(path, text))
    assert message.startswith(tuple(f"{path}:{place}: not valid JSON: " for place in places))
    excerpt = message.rpartition("«")[2].rstrip("»")
    assert excerpt
    assert excerpt in text.replace("\n", "⏎")


def test_one_bad_line_among_many_is_told_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [GOOD] * 2000
    lines[1233] = '{"output": b}'
    message = refusal(write(path, "\n".join(lines)))
    assert f"{path}:1234:12: not valid JSON" in message
    assert message.count("not valid JSON") == 1


def test_of_many_bad_lines_five_are_told_and_the_rest_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    message = refusal(write(path, "\n".join([GOOD, *["{bad}"] * 8, GOOD])))
    assert [f"{path}:{line}:2" in message for line in range(1, 11)] == [False] + [True] * 5 + [False] * 4
    assert message.endswith("… and 3 more")


def test_a_bad_later_line_in_a_json_file_of_lines_is_told_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert f"{path}:2:2: not valid JSON" in refusal(write(path, f"{GOOD}\n{{bad}}\n"))


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_number_that_json_does_not_have_is_refused(tmp_path: Path, literal: str, name: str) -> None:
    text = f'{{"output": "a", "score": {literal}}}'
    message = refusal(write(tmp_path / name, text if name.endswith("l") else f"[{text}]"))
    assert f"{literal} is not a JSON value" in message


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_key_that_stands_twice_in_a_row_is_refused(tmp_path: Path, name: str) -> None:
    text = '{"output": "a", "output": "b"}'
    message = refusal(write(tmp_path / name, text if name.endswith("l") else f"[{text}]"))
    assert "the key 'output' stands twice in one row" in message


@pytest.mark.parametrize("depth", [3000, 200_000])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_deep_nesting_is_refused(tmp_path: Path, depth: int, name: str) -> None:
    path = tmp_path / name
    assert refusal(write(path, "[" * depth + "]" * depth)).count("nested too deep") == 1
    assert refusal(write(path, '{"a":' * depth + "1" + "}" * depth)).count("nested too deep") == 1


def test_a_number_of_endless_digits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert refusal(write(path, f'[{{"id": {"1" * 5000}}}]')).startswith(f"{path}:1: ")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"data": [{"output": "a"}], "version": 1}', "its rows seem to be under 'data'"),
        (GOOD, "holds one object where a list of rows is expected"),
        ("5", "where a list of rows is expected"),
        ('"rows"', "where a list of rows is expected"),
        ("null", "where a list of rows is expected"),
    ],
)
def test_a_document_that_is_no_list_is_refused(tmp_path: Path, text: str, told: str) -> None:
    assert told in refusal(write(tmp_path / "rows.json", text))


# --- names ---


@pytest.mark.parametrize(
    ("text", "path", "sample"),
    [
        ("rows.json", "rows.json", None),
        ("a/rows.JSONL", "a/rows.JSONL", None),
        ("rows.json#500", "rows.json", 500),
        ("rows.jsonl#007", "rows.jsonl", 7),
        ("a#b.json", "a#b.json", None),
        ("a#b.json#5", "a#b.json", 5),
        ("a#1/rows.json", "a#1/rows.json", None),
        ("a#1/rows.json#2", "a#1/rows.json", 2),
        ("小李 的.json", "小李 的.json", None),
    ],
)
def test_a_name_may_end_in_a_count_of_rows(text: str, path: str, sample: int | None) -> None:
    assert parse_source(text) == Source(Path(path), sample)


@pytest.mark.parametrize(
    "count",
    ["", "0", "000", "x", "-1", "1.5", " 5", "5 ", "+5", "1e3", "²", "٣", "#5#", "9" * 5000],
)
def test_an_odd_count_is_refused(count: str) -> None:
    with pytest.raises(LoratuneError, match="after # a number of rows is expected") as caught:
        parse_source(f"rows.json#{count}")
    assert caught.value.exit_code == Exit.DATA


@pytest.mark.parametrize(
    "text",
    [
        "https://example.com/rows.json",
        "http://x/rows.json#5",
        "hf://datasets/a/b/rows.json",
        "hf:a/rows.json",
        "ms:a/rows.json",
        "s3://bucket/rows.jsonl",
        "file:///rows.json",
    ],
)
def test_an_address_is_refused_and_never_fetched(text: str) -> None:
    with pytest.raises(LoratuneError, match="nothing is fetched from the network") as caught:
        parse_source(text)
    assert caught.value.exit_code == Exit.DATA


@pytest.mark.parametrize(
    "ending", [".arrow", ".pkl", ".py", ".csv", ".parquet", ".json.gz", ".json5", ".txt#5", ".", ""]
)
@pytest.mark.parametrize("stem", ["rows", "a/.json", ""])
def test_a_file_of_another_kind_is_refused_by_its_name(stem: str, ending: str) -> None:
    with pytest.raises(LoratuneError, match=r"not a \.json or \.jsonl file") as caught:
        parse_source(stem + ending)
    assert caught.value.exit_code == Exit.DATA


# --- samples ---


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"n": n} for n in range(100)]))
    return path


def test_a_sample_is_drawn_by_the_seed_without_repeats_and_in_file_order(numbered: Path) -> None:
    source = Source(numbered, 20)
    drawn = [row.value["n"] for row in read_rows(source, seed=1)]
    assert len(set(drawn)) == 20
    assert drawn == sorted(drawn)
    assert drawn == [row.value["n"] for row in read_rows(source, seed=1)]
    assert drawn != [row.value["n"] for row in read_rows(source, seed=2)]
    assert drawn != list(range(20))


def test_a_sampled_row_keeps_the_place_it_has_in_the_file(numbered: Path) -> None:
    for row in read_rows(Source(numbered, 5), seed=3):
        assert row.place == f"{numbered} row {row.value['n'] + 1}"


@pytest.mark.parametrize("sample", [None, 100, 101, 10**12])
def test_a_sample_of_all_or_more_takes_every_row(numbered: Path, sample: int | None) -> None:
    assert [row.value["n"] for row in read_rows(Source(numbered, sample), seed=0)] == list(range(100))


def test_rows_outside_the_sample_are_checked_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, "\n".join([GOOD] * 50 + ["{bad}"]))
    assert f"{path}:51" in refusal(Source(path, 1))
