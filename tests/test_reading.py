"""Files of rows: what is read, what is refused, and with which words."""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loratune.data.reading import csv_lines
from loratune.data.reading.files import BadRow, Row, RowFile, open_rows
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
JSON_NAMES = ["rows.json", "rows.jsonl"]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def refusal(name: str, code: Exit = Exit.DATA, encoding: str = "utf-8") -> str:
    with pytest.raises(LoratuneError) as caught:
        list(open_rows(name, encoding))
    assert caught.value.exit_code == code
    return str(caught.value)


def values(file: RowFile) -> list[Any]:
    found = list(file)
    assert not [row for row in found if isinstance(row, BadRow)]
    return [row.value for row in found if isinstance(row, Row)]


def places(file: RowFile) -> list[str]:
    return [file.place(row.number) for row in file]


def problems(name: str) -> list[str]:
    return [row.problem for row in open_rows(name) if isinstance(row, BadRow)]


# --- what is read ---


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("name", ["rows.json", "rows.JSON"])
def test_a_json_list_is_read_with_the_places_of_its_rows(tmp_path: Path, mark: bytes, name: str) -> None:
    path = write(tmp_path / name, mark + json.dumps(CHINESE, ensure_ascii=False).encode())
    file = open_rows(path)
    assert values(file) == CHINESE
    assert places(file) == [f"{path} row {number}" for number in (1, 2, 3)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_lines_of_json_are_read_with_their_line_numbers(tmp_path: Path, end: str, name: str, mark: str) -> None:
    path = write(tmp_path / name, mark + end.join([GOOD, "", GOOD.replace("b", "c"), "  "]))
    file = open_rows(path)
    assert [value["output"] for value in values(file)] == ["b", "c"]
    assert places(file) == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, separator: str) -> None:
    row = {"instruction": f"a{separator}b", "output": "c"}
    line = json.dumps(row, ensure_ascii=False)
    assert values(open_rows(write(tmp_path / "rows.jsonl", f"{line}\n{line}\n"))) == [row, row]


def test_a_file_is_read_again_from_its_start_whenever_it_is_asked_for(tmp_path: Path) -> None:
    file = open_rows(write(tmp_path / "rows.json", '[{"n": 1}, {"n": 2}]'))
    assert next(iter(file)) == Row({"n": 1}, 1)
    assert values(file) == values(file) == [{"n": 1}, {"n": 2}]


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
    assert values(open_rows(write(folder / "rows.json", document))) == rows
    assert values(open_rows(write(folder / "rows.jsonl", lines))) == rows


# --- no rows ---


@pytest.mark.parametrize("name", [*JSON_NAMES, "rows.csv"])
@pytest.mark.parametrize("content", [b"", b" \n\t\r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf \n"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str, content: bytes) -> None:
    path = write(tmp_path / name, content)
    assert refusal(path) == f"{path}: 0 rows, the file is empty"


def test_an_empty_list_has_no_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", " [ ]\n")
    assert refusal(path) == f"{path}: 0 rows"


def test_a_missing_file_is_told_with_the_folder_it_was_looked_for_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("rows.json", "rows.csv.gz", "rows.parquet"):
        assert refusal(name) == f"{name}: no such file (looked from {tmp_path})"


def test_a_name_that_no_file_can_have_is_a_missing_file() -> None:
    assert "no such file" in refusal("no\0name.json")


@pytest.mark.parametrize("ending", [".json", ".jsonl.gz", ".csv", ".parquet"])
def test_what_cannot_be_opened_is_a_failure_of_the_disk(tmp_path: Path, ending: str) -> None:
    folder = tmp_path / f"rows{ending}"
    folder.mkdir()
    assert refusal(str(folder), Exit.IO) == f"{folder}: cannot be read: Is a directory"
    assert "cannot be read" in refusal(str(tmp_path / ("a" * 300 + ending)), Exit.IO)
    assert "cannot be read" in refusal(write(tmp_path / "file", "x") + f"/rows{ending}", Exit.IO)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.json")
    assert "not a regular file" in refusal(str(tmp_path / "rows.json"))


def test_a_name_of_another_kind_is_never_opened(tmp_path: Path) -> None:
    assert "not a file type that loratune reads" in refusal(write(tmp_path / "rows.pkl", GOOD))


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
@pytest.mark.parametrize("packed", [False, True])
def test_both_ways_out_that_the_message_names_make_the_file_readable(
    tmp_path: Path, encoding: str, rows: list[Any], packed: bool
) -> None:
    raw = json.dumps(rows, ensure_ascii=False).encode(encoding)
    path = write(tmp_path / ("rows.json.gz" if packed else "rows.json"), gzip.compress(raw) if packed else raw)
    message = refusal(path)
    assert "not UTF-8 (byte " in message
    setting = message.partition("--data.encoding ")[2].partition(")")[0]
    assert values(open_rows(path, setting)) == rows
    line = message.splitlines()[1].strip()
    assert "iconv -f " in line
    subprocess.run(line, shell=True, cwd=tmp_path, check=True)
    assert values(open_rows(str(tmp_path / "utf8-rows.json"))) == rows


@pytest.mark.parametrize("content", [b"\xff\xfe\xfd", b'[{"a": "\xc3\x28"}]', b"\x80", bytes(range(256))])
@pytest.mark.parametrize("name", [*JSON_NAMES, "rows.csv"])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, content: bytes, name: str) -> None:
    assert "not UTF-8" in refusal(write(tmp_path / name, content))


@pytest.mark.parametrize("before", [7, 262_143, 262_144, 262_146, 3_000_000])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_the_byte_that_does_not_fit_is_counted_from_the_start_of_the_file(
    tmp_path: Path, before: int, mark: bytes
) -> None:
    start = mark + b'[{"output": "' + b"a" * before + "好".encode()
    message = refusal(write(tmp_path / "rows.json", start + '你好，今天天气怎么样？我很好"}]'.encode("gb18030")))
    assert f"not UTF-8 (byte {len(start)})" in message


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("gb18030", "Where do you deliver? 我们卖铜水壶。 Thanks. 保修期两年。"),
        ("cp1250", "Where? Dodáváme měděné konvice do celé země. Žádné poplatky, příště lépe."),
        ("cp1251", "Where? Мы продаём медные чайники по всей стране и в Европе."),
    ],
)
def test_chinese_among_english_is_not_taken_for_letters_with_accents(tmp_path: Path, encoding: str, text: str) -> None:
    rows = [GOOD] * 30 + [json.dumps({"instruction": text, "output": text}, ensure_ascii=False)] + [GOOD] * 30
    message = refusal(write(tmp_path / "rows.jsonl", "\n".join(rows).encode(encoding)))
    assert ("set data.encoding: gb18030 (" in message) == (encoding == "gb18030")


QUESTIONS = {
    "German": ["Wo liefern Sie?,Nach Österreich und Süddeutschland.", "Was kostet das?,Die Gebühr beträgt fünf Euro."],
    "German city": ["Was ist dort geöffnet?,Die größte Straße heißt Müllerstraße.", "Größe?,20 m²"],
    "French": ["Où êtes-vous situés ?,Près de la gare ; l'entrée est à côté du café.", "C'est cher ?,Ça dépend."],
    "Spanish": ["¿Dónde están?,Al lado de la estación, mañana también.", "¿Cuánto cuesta?,Cinco euros más el envío."],
    "Portuguese": ["Onde estão?,Ao lado da estação; amanhã também.", "Quanto é?,Cinco euros, incluída a instalação."],
    "Italian": ["Dove siete?,Di fianco alla città vecchia.", "È già pronto?,Sì, perché oggi c'è più personale."],
    "Swedish": ["Var finns ni?,Vid ån, på andra sidan vägen.", "När öppnar ni?,Klockan åtta även på söndagar."],
    "mixed": [
        "Wo öffnen Sie früh?,Überall.",
        "Où êtes-vous ?,À côté.",
        "¿Dónde está?,Ahí, señor.",
        "Vad är på ön?,Träd.",
    ],
    "Polish": ["Gdzie jesteście?,Obok stacji, na rogu ulicy Źródlanej.", "Ile to kosztuje?,Pięć złotych."],
    "Czech": ["Kde jste?,Vedle nádraží, příští dveře.", "Kolik to stojí?,Pět eur, měděné konvice jsou dražší."],
    "Hungarian": [
        "Hol vannak?,Az állomás mellett, a felső ajtónál.",
        "Mennyibe kerül?,Öt euró, a bővebb hűtő több.",
    ],
    "Lithuanian": [
        "Kur esate?,Šalia stoties, už pirmųjų durų.",
        "Kiek kainuoja?,Penkis eurus, dalimi už vežimą.",
    ],
    "Turkish": [
        "Neredesiniz?,İstasyonun yanında, köşede.",
        "Ne kadar?,Beş avro, güneşli günlerde ücretsiz; çoğu.",
    ],
    "Russian": ["Где вы?,Рядом с вокзалом.", "Сколько стоит?,Пять рублей за каждый чайник."],
    "Greek": ["Πού είστε;,Δίπλα στον σταθμό.", "Πόσο κοστίζει;,Πέντε ευρώ με την παράδοση."],
    "Chinese": ["你们在哪里？,我们在车站旁边。", "多少钱？,五块钱，包括运费。"],
    "Taiwanese": ["你們在哪裡？,我們在車站旁邊。", "多少錢？,五塊錢，包括運費。"],
    "Korean": ["어디에 있습니까?,역 옆에 있습니다.", "얼마입니까?,배송을 포함하여 오천 원입니다."],
    "Japanese": ["どこにありますか。,駅の隣にあります。", "いくらですか。,送料込みで五千円です。"],
}
"""Lines of questions and answers in some languages; texts that the project has made up."""


@pytest.mark.parametrize(
    ("language", "encoding"),
    [
        *((name, encoding) for name in list(QUESTIONS)[:8] for encoding in ("cp1252", "latin-1")),
        *(
            (name, encoding)
            for name in ("German", "French", "Spanish")
            for encoding in ("cp850", "macintosh", "utf-16")
        ),
        *((name, encoding) for name in ("Polish", "Czech", "Hungarian") for encoding in ("cp1250", "iso-8859-2")),
        ("Lithuanian", "cp1257"),
        ("Turkish", "cp1254"),
        *(("Russian", encoding) for encoding in ("cp1251", "koi8-r", "cp866", "iso-8859-5")),
        ("Greek", "cp1253"),
        *(("Chinese", encoding) for encoding in ("gb18030", "utf-16")),
        *(("Taiwanese", encoding) for encoding in ("big5", "gb18030")),
        ("Korean", "cp949"),
        *(("Japanese", encoding) for encoding in ("cp932", "euc-jp")),
    ],
)
def test_a_few_rows_are_enough_for_an_encoding_in_which_they_can_be_read(
    tmp_path: Path, language: str, encoding: str
) -> None:
    text = "\n".join(["instruction,output", *QUESTIONS[language]])
    raw = text.encode(encoding)
    guess = refusal(write(tmp_path / "rows.csv", raw)).partition("--data.encoding ")[2].partition(")")[0]
    assert raw.decode(guess).removeprefix("\ufeff") == text


def test_the_guess_is_made_from_the_lines_around_the_byte_that_does_not_fit(tmp_path: Path) -> None:
    for end in ("\n", ","):
        text = end.join([GOOD] * 100_000 + [json.dumps(row, ensure_ascii=False) for row in CHINESE] * 10)
        message = refusal(write(tmp_path / "rows.jsonl", text.encode("gb18030")))
        assert "set data.encoding: gb18030 (--data.encoding gb18030)" in message


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "utf_8_sig", "utf-16", "utf-16-le", "utf-16-be", "gb18030"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("name", [*JSON_NAMES, "rows.csv"])
def test_a_file_is_read_in_the_encoding_that_is_said(tmp_path: Path, encoding: str, mark: str, name: str) -> None:
    texts = {
        "rows.json": json.dumps(CHINESE, ensure_ascii=False),
        "rows.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in CHINESE),
        "rows.csv": "instruction,output\n" + "".join(f"{row['instruction']},{row['output']}\n" for row in CHINESE),
    }
    text = texts[name] if encoding in ("utf-16", "utf_8_sig") else mark + texts[name]
    assert values(open_rows(write(tmp_path / name, text.encode(encoding)), encoding)) == CHINESE


@pytest.mark.parametrize(("encoding", "content"), [("ascii", "é"), ("gb18030", b"\xff"), ("utf-16", b"a\0b\0")])
def test_bytes_that_are_not_in_the_encoding_that_is_said_are_refused(
    tmp_path: Path, encoding: str, content: str | bytes
) -> None:
    message = refusal(write(tmp_path / "rows.jsonl", content), encoding=encoding)
    assert f"rows.jsonl: not {encoding} (byte 0), which data.encoding says" in message


@pytest.mark.parametrize("encoding", ["", "utf-9", "hex", "rot13", "zlib", "undefined", "a\0b", "好"])
def test_a_name_of_no_text_encoding_is_a_wrong_setting(tmp_path: Path, encoding: str) -> None:
    message = refusal(write(tmp_path / "rows.json", GOOD), Exit.USAGE, encoding)
    assert message.startswith(f"data.encoding {encoding!r}: no such text encoding")


# --- broken JSON ---


@pytest.mark.parametrize(
    ("text", "expected"),
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
def test_broken_json_is_told_with_line_column_and_excerpt(tmp_path: Path, text: str, expected: tuple[str, ...]) -> None:
    path = write(tmp_path / "rows.json", text)
    message = refusal(path)
    assert message.startswith(tuple(f"{path}:{place}: not valid JSON: " for place in expected))
    excerpt = message.rpartition("«")[2].rpartition("»")[0]
    assert excerpt
    assert excerpt in text.replace("\n", "⏎")


@pytest.mark.parametrize(
    ("text", "bracket"),
    [
        ('[\n  {"output": "a"},\n]', "]"),
        ('[{"output": "a", }]', "}"),
        ('[{"output": "a",, "b": 1}]', ""),
        ('[{"output": , "b": []}]', ""),
        ('[{"output": "a"}, {"output": ]', ""),
    ],
)
def test_a_comma_before_a_closing_bracket_is_told(tmp_path: Path, text: str, bracket: str) -> None:
    lines = write(tmp_path / "rows.jsonl", text.replace("\n", "").strip("[]"))
    documents = [refusal(write(tmp_path / "rows.json", text))]
    for message in documents + (problems(lines) if bracket == "}" else []):
        assert message.endswith(f"»; remove the comma before {bracket}") == bool(bracket)


def test_one_bad_line_among_many_is_told_with_its_number(tmp_path: Path) -> None:
    lines = [GOOD] * 2000
    lines[1233] = '{"output": b}'
    path = write(tmp_path / "rows.jsonl", "\n".join(lines))
    found = list(open_rows(path))
    assert [row.number for row in found] == list(range(1, 2001))
    assert [row.number for row in found if isinstance(row, BadRow)] == [1234]
    assert problems(path) == [f"{path}:1234:12: not valid JSON: Expecting value, near «{lines[1233]}»"]


def test_a_file_of_bad_lines_alone_is_not_called_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "{bad}\n" * 3)
    assert [problem.partition(": ")[0] for problem in problems(path)] == [f"{path}:{line}:2" for line in (1, 2, 3)]


def test_a_bad_later_line_in_a_json_file_of_lines_is_told_by_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", f"{GOOD}\n{{bad}}\n")
    assert problems(path)[0].startswith(f"{path}:2:2: not valid JSON")


def told(tmp_path: Path, name: str, text: str) -> str:
    """What is said of one bad row, in either kind of file."""
    if name.endswith("l"):
        (problem,) = problems(write(tmp_path / name, text))
        return problem
    return refusal(write(tmp_path / name, f"[{text}]"))


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("name", JSON_NAMES)
def test_a_number_that_json_does_not_have_is_refused(tmp_path: Path, literal: str, name: str) -> None:
    assert f"{literal} is not a JSON value" in told(tmp_path, name, f'{{"output": "a", "score": {literal}}}')


@pytest.mark.parametrize("name", JSON_NAMES)
def test_a_key_that_stands_twice_in_a_row_is_refused(tmp_path: Path, name: str) -> None:
    message = told(tmp_path, name, '{"output": "a", "output": "b"}')
    assert message == f"{tmp_path / name}:1: the key 'output' occurs twice in one row"


def test_a_row_that_is_refused_is_told_by_the_line_it_begins_on(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", '[\n{"a": 1}\n,\n\n{"a": 1,\n"a": 2}]')
    assert refusal(path) == f"{path}:5: the key 'a' occurs twice in one row"


@pytest.mark.parametrize("depth", [3000, 200_000])
@pytest.mark.parametrize("name", JSON_NAMES)
def test_deep_nesting_is_refused(tmp_path: Path, depth: int, name: str) -> None:
    assert told(tmp_path, name, "[" * depth + "]" * depth).count("nested too deep") == 1
    assert told(tmp_path, name, '{"a":' * depth + "1" + "}" * depth).count("nested too deep") == 1
    if not name.endswith("l"):
        path = write(tmp_path / name, '{"a":' * depth + "1" + "}" * depth)
        assert refusal(path).count("nested too deep") == 1


@pytest.mark.parametrize("name", JSON_NAMES)
def test_a_number_of_endless_digits_is_refused(tmp_path: Path, name: str) -> None:
    assert told(tmp_path, name, f'{{"id": {"1" * 5000}}}').startswith(f"{tmp_path / name}:1: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"data": ["a"], "version": 1}', "where a list of rows is expected (its keys are 'data', 'version')"),
        (GOOD, "holds one object where a list of rows is expected"),
        ("5", "holds int where a list of rows is expected"),
        ('"rows"', "holds str where a list of rows is expected"),
        ("null", "where a list of rows is expected"),
        ("<html>", ":1:1: not valid JSON: Expecting value, near «<html>»"),
        ('\n {"a": 1,\n "b": c}', ":3:7: not valid JSON: Expecting value"),
        ('{"a": 1, "a": 2}', ":1: the key 'a' occurs twice"),
    ],
)
def test_a_document_that_is_no_list_is_refused(tmp_path: Path, text: str, words: str) -> None:
    assert words in refusal(write(tmp_path / "rows.json", text))


# --- CSV ---

FIELDS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\ufeff"), max_size=12)


@settings(deadline=None, max_examples=200)
@given(
    rows=st.lists(st.tuples(FIELDS, FIELDS, FIELDS), min_size=1, max_size=5),
    delimiter=st.sampled_from(",;\t"),
    end=st.sampled_from(["\n", "\r\n"]),
    mark=st.sampled_from(["", "\ufeff"]),
)
def test_a_csv_file_gives_what_the_csv_module_gives(
    rows: list[tuple[str, ...]], delimiter: str, end: str, mark: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = io.StringIO(newline="")
    # Before Python 3.13 the writer left a lone carriage return without quotes, which ends a line for its own reader.
    quoting = csv.QUOTE_ALL if any("\r" in field for row in rows for field in row) else csv.QUOTE_MINIMAL
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerows([("instruction", "input", "output, or answer"), *rows])
    expected = list(csv.DictReader(io.StringIO(text.getvalue(), newline=""), delimiter=delimiter))
    assume(len(expected) == len(rows))
    path = write(tmp_path_factory.mktemp("rows") / "rows.csv", mark + text.getvalue())
    assert values(open_rows(path)) == expected


def test_a_record_has_the_number_of_the_line_it_begins_on(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", '\n\na,"b"\n1,"2\n3\n"\n\n4,5\n \n6,7')
    file = open_rows(path)
    assert list(file) == [
        Row({"a": "1", "b": "2\n3\n"}, 4),
        Row({"a": "4", "b": "5"}, 8),
        Row({"a": "6", "b": "7"}, 10),
    ]
    assert file.place(4) == f"{path}:4"


def test_records_that_do_not_fit_the_header_are_bad_rows_among_others(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'a;b\n1;2\n1\n1;2;3\n"1"2;3\n5;6\n"7;8')
    found = list(open_rows(path))
    assert [row.value["a"] for row in found if isinstance(row, Row)] == ["1", "5"]
    bad = [row for row in found if isinstance(row, BadRow)]
    assert [row.number for row in bad] == [3, 4, 5, 7]
    assert bad[1].problem.startswith(f"{path}:4: 3 fields where the header has 2; put texts that contain a semicolon")
    assert bad[2].problem.startswith(f"{path}:5: not valid CSV: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n", ": 0 rows, only a header"),
        ("a,b,a, b \n1,2,3,4", ":1: the header names 'a', 'b' more than once"),
        (",a,\n1,2,3", ":1: the header has no name for column 1, 3"),
        ('\n"a"b,c\n1,2', ":2: not valid CSV: "),
        ("a,b\r1,2\r", ":1: not valid CSV: "),
    ],
)
def test_a_csv_file_without_a_usable_header_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path / "rows.csv", text)
    assert refusal(path).startswith(path + words)


def test_long_texts_in_a_csv_file_are_read_and_endless_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.csv", f'a,b\n1,"{"x" * 1_000_000}"\n')
    assert len(values(open_rows(path))[0]["b"]) == 1_000_000
    monkeypatch.setattr(csv_lines, "ROW_CAP", 1000)
    assert "field larger than field limit" in problems(path)[0]
    monkeypatch.undo()
    values(open_rows(path))  # sets the limit of the csv module again


# --- Parquet ---


def test_a_parquet_file_gives_what_its_table_gives(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"第{n}"}], "score": n / 7, "note": None if n % 2 else "x"}
        for n in range(1000)
    ]
    table = pyarrow.Table.from_pylist(rows)
    path = str(tmp_path / "rows.parquet")
    pyarrow.parquet.write_table(table, path, row_group_size=300)
    file = open_rows(path)
    assert values(file) == values(file) == table.to_pylist() == rows
    assert places(file)[-1] == f"{path} row 1000"


def test_a_parquet_file_without_rows_or_with_one_name_twice_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "rows.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.string())}), path)
    assert refusal(path) == f"{path}: 0 rows"
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([[1], [2]], names=["a", "a"]), path)
    assert "has the column 'a' more than once" in refusal(path)


@pytest.mark.parametrize("damage", ["cut", "middle", "text", "empty"])
def test_a_damaged_parquet_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"a": [f"text {n * n}" for n in range(5000)]}), path, use_dictionary=False
    )
    raw = path.read_bytes()
    middle = raw[:100] + bytes(len(raw[100:5000])) + raw[5000:]
    write(path, {"cut": raw[:-100], "middle": middle, "text": b"a,b\n1,2\n", "empty": b""}[damage])
    assert "cannot be read as Parquet after row " in refusal(str(path))


# --- compressed files ---


def zstd(raw: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return bytes(sink.getvalue())


PACKERS = {".gz": gzip.compress, ".zst": zstd}
TEXTS = {".json": f"[{GOOD}]", ".jsonl": GOOD + "\n", ".csv": "instruction,output\na,b\n"}


@pytest.mark.parametrize("packer", [".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("ending", TEXTS)
def test_a_compressed_file_is_read_as_what_is_in_it(tmp_path: Path, ending: str, packer: str) -> None:
    path = write(tmp_path / f"rows{ending}{packer}", PACKERS[packer.lower()](TEXTS[ending].encode()))
    assert values(open_rows(path)) == [json.loads(GOOD)]


@pytest.mark.parametrize("packer", PACKERS)
def test_a_compressed_file_of_several_parts_is_read_to_its_end(tmp_path: Path, packer: str) -> None:
    part = PACKERS[packer]((GOOD + "\n").encode() * 20_000)
    assert len(values(open_rows(write(tmp_path / f"rows.jsonl{packer}", part + part)))) == 40_000


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("damage", ["half", "last", "plain", "more"])
def test_a_damaged_compressed_file_is_refused(tmp_path: Path, packer: str, damage: str) -> None:
    plain = "".join(f'{{"n": {n * n % 9973}}}\n' for n in range(50_000)).encode()
    raw = PACKERS[packer](plain)
    broken = {"half": raw[: len(raw) // 2], "last": raw[:-1], "plain": plain, "more": raw + b"more and more"}
    assert ": damaged or cut short: " in refusal(write(tmp_path / f"rows.jsonl{packer}", broken[damage]))


# --- the file itself ---


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl.gz"])
def test_the_hash_is_of_the_bytes_on_the_disk(tmp_path: Path, name: str) -> None:
    raw = (GOOD + "\n").encode() * 20_000
    content = gzip.compress(raw) if name.endswith("gz") else raw
    assert open_rows(write(tmp_path / name, content)).sha256 == hashlib.sha256(content).hexdigest()


def test_a_file_that_changes_or_vanishes_after_it_was_opened_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD)
    file = open_rows(path)
    list(file)
    file.check_unchanged()
    write(tmp_path / "rows.jsonl", GOOD.replace("a", "b"))
    os.utime(path, ns=(0, 0))
    for change in (lambda: None, Path(path).unlink):
        change()
        with pytest.raises(LoratuneError, match="changed while it was read; start again"):
            file.check_unchanged()
