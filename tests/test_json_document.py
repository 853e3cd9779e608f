"""JSON as a stream: the same rows, words and places as json.loads gives for the whole text, in little memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from loratune.data.reading import files as reading_files
from loratune.data.reading import json_document, json_lines
from loratune.data.reading.files import open_rows
from loratune.data.reading.json_document import check_object, rows_of_document
from loratune.data.reading.json_lines import holds_lines, rows_of_lines, split_lines
from loratune.data.reading.rows import BadRow
from loratune.errors import LoratuneError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
BLANKS = st.text(" \t\n\r", max_size=3)


def pieces(text: str, size: int) -> Iterator[str]:
    return (text[start : start + size] for start in range(0, len(text), size))


def rows(text: str, size: int) -> list[Any]:
    found = list(rows_of_document("f", pieces(text, size)))
    assert [row.number for row in found] == list(range(1, len(found) + 1))
    return [row.value for row in found]


def blown_up(text: str, blanks: list[str]) -> str:
    """The same document with blanks around every bracket, comma and colon outside of texts."""
    spread, in_text, escaped = [], False, False
    for index, char in enumerate(text):
        around = blanks[index % len(blanks)] if char in "[]{},:" and not in_text else ""
        spread.append(around + char + around)
        if char == '"' and not escaped:
            in_text = not in_text
        escaped = char == "\\" and not escaped
    return "".join(spread)


@st.composite
def documents(draw: st.DrawFn) -> str:
    values = draw(st.lists(VALUES, min_size=1, max_size=6))
    text = json.dumps(values, ensure_ascii=draw(st.booleans()), separators=(",", ":"))
    return blown_up(text, draw(st.lists(BLANKS, min_size=1, max_size=5)))


@settings(deadline=None, max_examples=300)
@given(text=documents(), size=st.integers(1, 40))
@example(text="[1.5, -2e+10, 1E5 ,true,null]", size=1)
@example(text='["\\ud83d\\ude00", "\\\\"]', size=3)
def test_a_stream_gives_the_rows_that_the_whole_text_gives(text: str, size: int) -> None:
    assert rows(text, size) == json.loads(text)


@settings(deadline=None, max_examples=500)
@given(
    text=documents(),
    place=st.floats(0, 1, exclude_max=True),
    change=st.sampled_from(["", "x", '"', ",", "]", "}", "[", "{", "\n", "\\", "\\u12", "1", "\x00", "é", ":", "tru"]),
    removed=st.integers(0, 2),
    size=st.integers(1, 90),
)
@example(text="[1,2, ]", place=0.0, change="", removed=0, size=3)
@example(text="[1 2]", place=0.0, change="", removed=0, size=2)
@example(text="[1e-0e5, 2]", place=0.0, change="", removed=0, size=2)
@example(text="[1,\n2] \n x" + "y" * 99, place=0.0, change="", removed=0, size=2)
@example(text='[{"a":1,}, "\\u12zz"]', place=0.0, change="", removed=0, size=2)
@example(text="[1." + " " * 99 + "]", place=0.0, change="", removed=0, size=2)
def test_a_fault_is_told_as_for_the_whole_text(text: str, place: float, change: str, removed: int, size: int) -> None:
    index = int(place * len(text))
    text = text[:index] + change + text[index + removed :]
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        expected = error
    else:
        assume(False)
    assume(text.lstrip(" \t\n\r").startswith("["))
    with pytest.raises(LoratuneError) as caught:
        rows(text, size)
    excerpt = text[max(0, expected.pos - 30) : expected.pos + 30].replace("\n", "⏎")
    told = f"f:{expected.lineno}:{expected.colno}: not valid JSON: {expected.msg}, near «{excerpt}»"
    message, _, _ = str(caught.value).partition("; remove the comma before ")
    # A key that occurs twice may come before the fault, and the plain decoder does not mind it.
    assert message == told or "occurs twice" in message


class Counted:
    """Pieces of a text, and how many characters were asked for."""

    def __init__(self, parts: Iterator[str]) -> None:
        self.parts = parts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for part in self.parts:
            self.characters += len(part)
            yield part


@pytest.mark.parametrize(
    "bad",
    [
        *('{"a": b}', '{"a" 1}', "{'a': 1}", '{"a": "\n"}', '{"a": "\\x"}', '{"a": 1} {"a": 2}', "[" * 5000, "}"),
        *('{"a": NaN}', '{"a": 1, "a": 2}', '{"a": ' + "1" * 5000 + "}", ","),
    ],
)
def test_a_fault_near_the_start_of_a_large_document_is_told_at_once(bad: str) -> None:
    block = '{"instruction": "' + "x" * 900 + '"},\n'
    counted = Counted(block * 256 if index else f"[{block}{bad},\n" for index in range(200))
    with pytest.raises(LoratuneError, match="f:2:"):
        list(rows_of_document("f", iter(counted)))
    assert counted.characters < 1 << 20


@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"version": 1, "data": [', "]}")])
def test_a_large_document_takes_little_memory(tmp_path: Path, start: str, end: str) -> None:
    path = tmp_path / "rows.json"
    with path.open("w", encoding="utf-8") as file:
        file.write(start)
        for number in range(6000):
            file.write(json.dumps({"n": number, "output": "十 words\n" * 1000}) + ",\n")
        file.write('{"n": 6000}' + end)
    assert path.stat().st_size > 60e6
    tracemalloc.start()
    try:
        last = None
        for row in open_rows(str(path)):
            last = row
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert last is not None
    assert last[:2] == ({"n": 6000}, 6001)
    assert peak < 12e6


@pytest.mark.parametrize("blanks", ["", " \n" * 300_000])
def test_a_second_list_of_rows_is_told_before_the_first_is_used_in_little_memory(tmp_path: Path, blanks: str) -> None:
    path = tmp_path / "rows.json"
    row = json.dumps({"n": 1, "output": "十 words\n" * 1000})
    with path.open("w", encoding="utf-8") as file:
        file.write(blanks + '{"meta": [' + ",\n".join([row] * 3000) + '], "v": 1, "data": [{"n": 1}]}')
    tracemalloc.start()
    try:
        file_of_rows = open_rows(str(path))
        for _ in range(2):
            with pytest.raises(LoratuneError, match="holds several lists of rows, 'meta' and 'data'"):
                next(iter(file_of_rows))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12e6


def test_a_list_is_not_read_through_first() -> None:
    counted = Counted(pieces(" \n [" + '{"n": 1}, ' * 10_000, 100))
    check_object("f", iter(counted))
    assert counted.characters == 100


def test_an_object_is_read_through_once_for_all_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(reading_files, "check_object", lambda name, _: calls.append(name))
    path = tmp_path / "rows.json"
    path.write_text('{"data": [{"n": 1}, {"n": 2}]}')
    file = open_rows(str(path))
    assert [[row.value for row in file if not isinstance(row, BadRow)] for _ in range(3)] == [[{"n": 1}, {"n": 2}]] * 3
    assert calls == [str(path)]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_row_of_ten_megabytes_is_read(tmp_path: Path, name: str) -> None:
    values = [{"output": "a"}, {"output": "b\n" * 5_000_000}, {"output": "c"}]
    lines = [json.dumps(value) for value in values]
    path = tmp_path / name
    path.write_text("[" + ",".join(lines) + "]" if name == "rows.json" else "\n".join(lines))
    assert [row.value for row in open_rows(str(path)) if not isinstance(row, BadRow)] == values


def test_a_row_that_is_too_long_is_refused_before_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_document, "ROW_CAP", 1000)
    counted = Counted(pieces('[{"n": 1},\n{"output": "' + "a" * 100_000 + '"}]', 50))
    with pytest.raises(LoratuneError, match="f:2: row 2 is longer than"):
        list(rows_of_document("f", iter(counted)))
    assert counted.characters < 5000


def test_a_line_that_is_too_long_is_a_bad_row_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "ROW_CAP", 1000)
    text = '{"n": 1}\n"' + "a" * 100_000 + '"\n{"n": 3}\n"' + "b" * 999 + '"'
    for size in (7, 50, 5000, 1_000_000):
        found = list(rows_of_lines("f", pieces(text, size)))
        assert [row.number for row in found] == [1, 2, 3, 4]
        assert [row.problem.partition(" than")[0] for row in found if isinstance(row, BadRow)] == [
            "f:2: longer",
            "f:4: longer",
        ]
        assert [row.value for row in found if not isinstance(row, BadRow)] == [{"n": 1}, {"n": 3}]


@settings(deadline=None)
@given(text=st.text("ab\n\r\u2028", max_size=40), size=st.integers(1, 9))
def test_lines_are_what_split_gives(text: str, size: int) -> None:
    expected = text.split("\n")
    if not expected[-1]:
        expected.pop()
    assert list(split_lines(pieces(text, size))) == list(enumerate(expected, start=1))


@pytest.mark.parametrize(
    ("text", "is_lines"),
    [
        ('{"a": 1}\n{"a": 2}', True),
        ('\n \n{"a": 1}\r\n\n{bad}', True),
        ('{"a": 1}\n \n', False),
        ('{"a": 1}', False),
        ('{bad}\n{"a": 1}', False),
        ('{\n"a": 1}', False),
        ('[1]\n{"a": 1}', False),
        ("", False),
        ('{"a":' + "[" * 3000 + "\n{}", False),
    ],
)
@pytest.mark.parametrize("size", [1, 4, 100_000])
def test_a_json_file_of_lines_is_known_by_its_first_line(text: str, is_lines: bool, size: int) -> None:
    assert holds_lines(pieces(text, size)) is is_lines


@settings(deadline=None, max_examples=200)
@given(
    values=st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), min_size=1, max_size=5),
    beside=st.dictionaries(st.text("xyz", max_size=2), st.integers() | st.text(max_size=5) | st.lists(st.text())),
    is_last=st.booleans(),
    blanks=st.lists(BLANKS, min_size=1, max_size=5),
    size=st.integers(1, 40),
)
def test_an_object_gives_the_rows_of_its_one_list(
    values: list[Any], beside: dict[str, Any], is_last: bool, blanks: list[str], size: int
) -> None:
    whole = beside | {"data": values} if is_last else {"data": values} | beside
    text = blown_up(json.dumps(whole), blanks)
    assert rows(text, size) == json.loads(text)["data"]
    assert {row.under for row in rows_of_document("f", pieces(text, size)) if not isinstance(row, BadRow)} == {"data"}


@pytest.mark.parametrize(
    "text",
    [
        *('{"data": [{"a": 1}', '{"data": [{"a": 1}],}', '{"data" [{"a": 1}]}', '{"data": [{"a": 1} {"b": 2}]}', "{,}"),
        *('{"v": 1 "data": [{}]}', '{"v": tru, "data": [{}]}', '{"data": [{}]} x', '{"data": [{"a": 1},]}', "{", '{"a'),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_fault_in_an_object_is_told_as_for_the_whole_text(text: str, size: int) -> None:
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(LoratuneError) as caught:
        rows(text, size)
    told = f"f:{expected.value.lineno}:{expected.value.colno}: not valid JSON: {expected.value.msg},"
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"train": [{"a": 1}], "v": 1, "test": [{"a": 1}]}', "several lists of rows, 'train' and 'test'"),
        ('{\n"messages": [{"role": "user", "content": "a"}]}', "if it is a row, put it between"),
        ('{"instruction": ["a", "b"], "output": ["c", "d"]}', "where a list of rows is expected (its keys are 'instr"),
        ('{"data": []}', "where a list of rows is expected (its keys are 'data')"),
        ("{}", "holds one object where a list of rows is expected"),
        ('{"v": 1,\n"v": 2}', "f:2: the key 'v' occurs twice"),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_object_without_one_list_of_rows_is_refused(text: str, words: str, size: int) -> None:
    with pytest.raises(LoratuneError) as caught:
        rows(text, size)
    assert words in str(caught.value)


def test_a_document_on_one_line_is_not_read_through_to_see_whether_it_is_lines() -> None:
    counted = Counted(pieces(" [" + '{"a": 1}, ' * 10_000, 100))
    assert holds_lines(iter(counted)) is False
    assert counted.characters == 100


def test_a_large_document_that_is_one_object_is_told_by_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_document, "ROW_CAP", 1000)
    counted = Counted(pieces('{"data": {"a": [' + '{"a": 1}, ' * 10_000, 100))
    with pytest.raises(LoratuneError, match=r"the value of 'data' is longer than"):
        list(rows_of_document("f", iter(counted)))
    assert counted.characters < 5000
