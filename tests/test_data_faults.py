"""Every fault that a file of rows can have, through the command line: what is said of it, and that nothing is left."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, TINY_QWEN, tree
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import Result

from loratune.data.encoding.encoder import Encoder
from loratune.errors import Exit

Run = Callable[..., Result]
TOKENIZER = AutoTokenizer.from_pretrained(TINY_QWEN)
CHINESE = [{"instruction": f"{n}加{n}等于多少？请用中文回答。", "output": f"答案是{2 * n}。"} for n in range(8)]
FRENCH = [{"instruction": f"Où étaient les élèves à {n} heures ?", "output": "À l'école, bien sûr."} for n in range(8)]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch, clean_environment: None) -> None:
    """No message is broken into lines."""
    monkeypatch.setenv("COLUMNS", "1000")


@pytest.fixture
def check(cli: Run) -> Run:
    def run(train: Any, *flags: Any) -> Result:
        return cli("data", "check", "--model.base", "tiny-qwen", "--data.train", train, *flags)

    return run


@pytest.fixture
def sft(cli: Run, random_qwen: Path, tmp_path: Path) -> Run:
    """One step on the random model."""

    def run(train: Any, *flags: Any, model: Path = random_qwen) -> Result:
        return cli(
            "sft", "--model.base", model, "--model.dtype", "float32", "--data.train", train, "--training.max_steps",
            "1", "--output", tmp_path / "run", *flags,
        )  # fmt: skip

    return run


def write(path: Path, content: bytes | str | list[Any]) -> Path:
    """A file of bytes, of a text, or of rows."""
    if isinstance(content, list):
        content = as_lines(content) if path.suffix == ".jsonl" else json.dumps(content, ensure_ascii=False)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def as_lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def refusal(result: Result, code: Exit = Exit.DATA) -> str:
    """The message of a refusal, which leaves no piece of an entry in the cache."""
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    entries = [entry for entry in (Path(os.environ["LORATUNE_CACHE"]) / "data").glob("*") if entry.is_dir()]
    whole = ({"info.json", "rows.arrow"}, {"template.json"})
    assert all({file.name for file in entry.iterdir()} in whole for entry in entries)
    return str(result.stderr)


def report(result: Result, code: Exit = Exit.OK) -> dict[str, Any]:
    """What a check with --json printed."""
    assert result.exit_code == code, result.stderr
    figures: dict[str, Any] = json.loads(result.stdout)
    return figures


def found(figures: dict[str, Any]) -> dict[str, int]:
    """Findings and how many rows each has."""
    return {one["name"]: one["count"] for one in figures["findings"]}


# --- files without rows ---


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", b""),
        ("rows.jsonl", b""),
        ("rows.csv", b""),
        ("rows.json", b" \n\t\r\n"),
        ("rows.jsonl", b" \n\t\r\n"),
        ("rows.json", b"\xef\xbb\xbf"),
    ],
)
def test_a_file_without_rows_is_told_and_a_good_one_beside_it_is_not(
    check: Run, tmp_path: Path, rows_file: Path, name: str, content: bytes
) -> None:
    bad = write(tmp_path / f"bad-{name}", content)
    message = refusal(check(rows_file, "--data.train", bad))
    assert f"{bad}: 0 rows" in message
    assert f"{rows_file}: " not in message


@pytest.mark.parametrize("content", ["[]", "[ \n ]"])
def test_an_empty_list_has_no_rows(check: Run, tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "rows.json", content)
    assert f"{path}: 0 rows" in refusal(check(path))


def test_a_source_that_is_given_wrongly_hides_no_problem_of_the_rows(
    check: Run, tmp_path: Path, rows_file: Path
) -> None:
    bad, repeated = write(tmp_path / "bad.json", [{"instruction": "a"}]), f"{rows_file}#2x"
    message = refusal(check(rows_file, "--data.train", bad, "--data.validation", repeated))
    assert f"{rows_file}: validation rows are never repeated; remove #2x" in message
    assert f"{bad} row 1: 'output' is missing" in message
    told = check(rows_file, "--data.train", bad, "--data.encoding", "utf-9").stderr
    assert told.count("no such text encoding") == 1
    assert check(rows_file, "--data.validation", repeated).exit_code == Exit.USAGE


def test_a_missing_file_stops_a_training_before_anything_is_written(sft: Run, tmp_path: Path, rows_file: Path) -> None:
    before = tree(tmp_path)
    message = refusal(sft(rows_file, "--data.train", tmp_path / "missing.json"))
    assert f"{tmp_path / 'missing.json'}: no such file (looked from {Path.cwd()})" in message
    assert tree(tmp_path) == before


# --- encodings ---


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
def test_a_byte_order_mark_changes_nothing(check: Run, tmp_path: Path, name: str) -> None:
    csv = "instruction,output\n" + "".join(f"{row['instruction']},{row['output']}\n" for row in CHINESE)
    content = {"rows.json": json.dumps(CHINESE), "rows.jsonl": as_lines(CHINESE), "rows.csv": csv}[name].encode()
    plain, marked = write(tmp_path / f"plain-{name}", content), write(tmp_path / name, b"\xef\xbb\xbf" + content)
    assert report(check(marked, "--json"))["rows"] == report(check(plain, "--json"))["rows"]


@pytest.mark.parametrize(
    ("encoding", "rows", "setting", "guesses"),
    [
        ("gbk", CHINESE, "gb18030", ("GB18030", "GBK", "GB2312")),
        ("utf-16", CHINESE, "utf-16", ("UTF-16", "UTF-16LE")),
        ("latin-1", FRENCH, "latin-1", ("LATIN-1", "CP1252", "ISO-8859-1", "CP1250")),
    ],
)
def test_another_encoding_is_refused_by_name_and_read_where_it_is_said(
    check: Run, sft: Run, tmp_path: Path, encoding: str, rows: list[Any], setting: str, guesses: tuple[str, ...]
) -> None:
    text = json.dumps(rows, ensure_ascii=False)
    path, plain = write(tmp_path / "rows.json", text.encode(encoding)), write(tmp_path / "plain.json", text)
    message = refusal(check(path))
    assert f"{path}: not UTF-8 (byte " in message
    guess = message.partition("iconv -f ")[2].partition(" -t UTF-8 rows.json")[0]
    assert guess in guesses
    before = tree(tmp_path)
    assert f"{path}: not UTF-8" in refusal(sft(path))
    assert tree(tmp_path) == before
    read = report(check(path, "--data.encoding", setting, "--json"))
    assert read["rows"] == report(check(plain, "--json"))["rows"]
    assert read["findings"] == []


def test_text_that_was_read_in_the_wrong_encoding_is_told(check: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", CHINESE)
    result = check(path, "--data.encoding", "gb18030", "--json")
    assert result.exit_code == Exit.DATA or found(report(result))["garbled"] == len(CHINESE)


# --- broken JSON ---


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ('[\n  {"instruction": "a", "output": "b"},\n]', ("2:38", "3:1")),
        ('[\n  // rows\n  {"instruction": "a", "output": "b"}]', ("2:3",)),
        ("[{'instruction': 'a', 'output': 'b'}]", ("1:3",)),
        ('[\n{"instruction": "a", "output": "b"},\n{"instr', ("3:2",)),
    ],
    ids=["comma", "comment", "quotes", "truncated"],
)
def test_broken_json_is_told_with_line_and_column_before_anything_is_written(
    sft: Run, tmp_path: Path, rows_file: Path, text: str, places: tuple[str, ...]
) -> None:
    path = write(tmp_path / "broken.json", text)
    before = tree(tmp_path)
    message = refusal(sft(rows_file, "--data.train", path))
    assert any(f"{path}:{place}: not valid JSON: " in message for place in places)
    assert f"{rows_file}" not in message
    assert tree(tmp_path) == before


@pytest.fixture(scope="module")
def one_bad_line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 lines, of which number 12,345 is broken."""
    lines = [f'{{"instruction": "{n}?", "output": "{n}!"}}' for n in range(20_000)]
    lines[12_344] = '{"instruction": "a", "output": b}'
    return write(tmp_path_factory.mktemp("long") / "rows.jsonl", "\n".join(lines))


def test_one_bad_line_among_many_stops_with_its_number(check: Run, one_bad_line: Path) -> None:
    message = refusal(check(one_bad_line))
    assert f"{one_bad_line}: 1 of 20,000 rows cannot be trained on" in message
    assert f"{one_bad_line}:12345:32: not valid JSON" in message
    assert "--data.on_bad_row skip" in message


def test_one_bad_line_among_many_is_left_out_counted_and_named(check: Run, one_bad_line: Path) -> None:
    result = check(one_bad_line, "--data.on_bad_row", "skip", "--json")
    figures = report(result)
    assert found(figures)["bad_rows"] == 1
    assert (figures["files"][0]["rows"], figures["files"][0]["seen"]) == (19_999, 20_000)
    assert figures["rows"]["training"]["rows"] + figures["rows"]["validation"]["rows"] == 19_999
    assert f"{one_bad_line}:12345:32: not valid JSON" in result.stderr


@pytest.mark.parametrize(("limit", "code"), [(2, Exit.DATA), (3, Exit.OK)])
def test_no_more_bad_rows_are_left_out_than_the_limit_says(check: Run, tmp_path: Path, limit: int, code: Exit) -> None:
    path = write(tmp_path / "rows.jsonl", as_lines(ROWS) + '{"a"\n[]\n{"instruction": "a"}\n')
    result = check(path, "--data.on_bad_row", "skip", "--data.max_bad_rows", limit)
    assert result.exit_code == code
    assert f"{path}: 3 of 15 rows" in result.stderr
    assert [f"{path}:{line}" in result.stderr for line in range(12, 17)] == [False, True, True, True, False]
    assert ("data.max_bad_rows allows 2" in result.stderr) == (code == Exit.DATA)


def test_a_file_of_bad_rows_alone_is_refused_though_bad_rows_may_be_left_out(check: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "{a\n{b\n")
    message = refusal(check(path, "--data.on_bad_row", "skip"))
    assert f"{path}: 2 of 2 rows cannot be trained on" in message
    assert "max_bad_rows" not in message  # which would not help


# --- answers that are none ---


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({}, "is missing"),
        ({"output": None}, "is null"),
        ({"output": 123}, "is a number, not a text"),
        ({"output": ["a"]}, "is a list, not a text"),
        ({"output": {"a": "b"}}, "is an object, not a text"),
    ],
    ids=str,
)
def test_an_answer_that_is_no_text_is_told_alike_at_the_start_and_far_into_a_file(
    check: Run, tmp_path: Path, answer: dict[str, Any], told: str
) -> None:
    rows: list[Any] = [{"instruction": "a"} | answer, *[{"instruction": "a", "output": "yes"}] * 1000]
    early, late = write(tmp_path / "early.json", rows), write(tmp_path / "late.json", rows[::-1])
    for path, number in ((early, 1), (late, 1001)):
        message = refusal(check(path))
        assert f"{path}: 1 of 1,001 rows cannot be trained on:\n  {path} row {number}: 'output' {told}\n" in message


def test_a_bad_row_stops_a_training_before_anything_is_written(sft: Run, tmp_path: Path, rows_file: Path) -> None:
    path = write(tmp_path / "bad.json", [*ROWS, {"instruction": "a", "output": None}])
    before = tree(tmp_path)
    message = refusal(sft(rows_file, "--data.train", path))
    assert f"{path} row 13: 'output' is null" in message
    assert f"{rows_file}" not in message
    assert tree(tmp_path) == before


def test_of_many_bad_rows_the_first_five_are_named_and_all_are_counted(check: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", [*ROWS, *[{"instruction": "a", "output": 1}] * 7])
    message = refusal(check(path))
    assert f"{path}: 7 of 19 rows" in message
    assert [f"row {number}:" in message for number in range(12, 20)] == [False, *[True] * 5, False, False]
    assert "… and 2 more" in message


def test_a_stray_row_at_the_start_is_the_only_bad_one(check: Run, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bcd"}]
    path = write(tmp_path / "rows.jsonl", [{"version": 1}, *[{"messages": turns}] * 9])
    assert f"{path}: 1 of 10 rows cannot be trained on" in refusal(check(path))


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_answer_is_refused_allowed_or_removed(check: Run, sft: Run, tmp_path: Path, empty: str) -> None:
    path = write(tmp_path / "rows.json", [*ROWS[:3], {"instruction": "Say nothing.", "output": empty}, *ROWS[3:]])
    before = tree(tmp_path)
    message = refusal(check(path))
    assert "1 of 13 rows of data.train has an answer without text" in message
    assert f"{path} row 4 «Say nothing.»" in message
    assert f"{path} row 4 «Say nothing.»" in refusal(sft(path))
    assert tree(tmp_path) == before

    allowed = report(check(path, "--data.severity", "empty=warn", "--json"))
    assert found(allowed) == {"empty": 1}
    assert allowed["files"][0]["rows"] == 13

    removed = report(check(path, "--data.remove", "empty", "--json"))
    assert found(removed) == {"empty, removed": 1}
    assert removed["files"][0]["rows"] == 12


# --- columns ---


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_further_columns_are_ignored_with_a_note_even_if_they_come_late(check: Run, tmp_path: Path, name: str) -> None:
    rows: list[Any] = [row | {"id": n, "source": "x"} for n, row in enumerate(ROWS * 84)]
    rows[-1] = rows[-1] | {"late": {"deep": [1]}, "id": "a text"}
    path, plain = write(tmp_path / name, rows), write(tmp_path / f"plain-{name}", ROWS * 84)
    result = check(path, "--json", "--data.severity", "duplicates=ignore", "--data.severity", "overlap=ignore")
    figures = report(result)
    assert figures["files"][0]["ignored"] == ["id", "late", "source"]
    assert "ignored: id, late, source" in result.stderr
    assert figures["rows"] == report(check(plain, "--json"))["rows"]
    assert figures["findings"] == []


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_line_of_ten_megabytes_is_read(check: Run, tmp_path: Path, name: str) -> None:
    rows = [ROWS[0], ROWS[1] | {"notes": "x" * 10_000_000}, *ROWS[2:]]
    figures = report(check(write(tmp_path / name, rows), "--json"))
    assert figures["rows"] == report(check(write(tmp_path / f"plain-{name}", ROWS), "--json"))["rows"]
    assert figures["files"][0]["ignored"] == ["notes"]


def test_an_enormous_answer_is_left_out_with_its_length(check: Run, tmp_path: Path) -> None:
    answer = "word " * 40_000
    path = write(tmp_path / "rows.jsonl", [*ROWS, {"instruction": "Go on.", "output": answer}])
    result = check(path, "--data.validation", "0", "--json")
    tokens = len(TOKENIZER(answer, verbose=False).input_ids)
    assert found(report(result))["too_long"] == 1
    told = int(result.stderr.partition(f"{path}:13: ")[2].partition(" tokens")[0])
    assert tokens < told < tokens + 40


# --- control tokens ---


def ids_of(cli: Run, path: Path, *flags: Any) -> list[list[int]]:
    """The ids of all rows of a file."""
    flags = (*flags, "--data.validation", "0") if "--data.validation" not in flags else flags
    result = cli("data", "preview", "--model.base", "tiny-qwen", "--data.train", path, "--rows", "99", "--json", *flags)
    assert result.exit_code == 0, result.stderr
    return [row["input_ids"] for row in json.loads(result.stdout)["sequences"]]


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>system", "<|endoftext|>", "<tool_call>", "<think>"])
def test_a_control_token_in_what_is_asked_is_only_text(cli: Run, check: Run, tmp_path: Path, token: str) -> None:
    plain = {"instruction": "Who?", "input": "You.", "system": "Be brief.", "output": "It is me."}
    odd = [plain | {column: f"{plain[column]}{token}\nevil"} for column in ("instruction", "input", "system")]
    path = write(tmp_path / "rows.json", [plain, *odd])
    expected, *rows = ids_of(cli, path)
    controls = set(TOKENIZER.added_tokens_decoder)
    for ids in rows:
        assert [id_ for id_ in ids if id_ in controls] == [id_ for id_ in expected if id_ in controls]
        assert f"{token}\nevil" in TOKENIZER.decode(ids)
    figures = report(check(path, "--data.validation", "0", "--json"))
    # <think> is no token of this model.
    assert found(figures) == ({} if token == "<think>" else {"control_tokens": 3})


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_a_control_token_in_an_answer_is_refused(
    check: Run, sft: Run, tmp_path: Path, rows_file: Path, token: str
) -> None:
    bad = write(tmp_path / "templated.json", [ROWS[0], {"instruction": "Hi?", "output": f"Hello.{token}\n"}])
    before = tree(tmp_path)
    for result in (check(bad, "--data.train", rows_file), sft(bad, "--data.train", rows_file)):
        message = refusal(result)
        assert "holds control tokens such as <|im_end|> in an answer" in message
        assert f"{bad} row 2 «Hi?»" in message
        assert (
            f"{rows_file} row"
            not in message.partition("--data.severity control_tokens_in_answers=warn")[2].partition("warning: ")[0]
        )
    assert tree(tmp_path) == before
    levels = report(check(bad, "--data.severity", "control_tokens_in_answers=warn", "--json"))
    assert found(levels)["control_tokens_in_answers"] == 1


@pytest.mark.parametrize(
    ("answer", "findings"),
    [
        ("<think>\nTwo and two.\n</think>\n\nFour.", {"thinking": 1}),
        ("<think>\n\n</think>\n\nFour.", {}),
        ('<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>', {}),
    ],
    ids=["thinking", "no thinking", "call"],
)
def test_reasoning_and_calls_may_stand_in_an_answer(
    check: Run, tmp_path: Path, answer: str, findings: dict[str, int]
) -> None:
    path = write(tmp_path / "rows.json", [*ROWS, {"instruction": "2+2?", "output": answer}])
    assert found(report(check(path, "--json"))) == findings


# --- rows that are too long ---

LONG_QUESTION = {"instruction": "why " * 100, "output": "It is so."}
LONG_ANSWER = {"instruction": "Why?", "output": "so " * 100}
LIMIT = ("--training.max_length", "64", "--data.validation", "0")


def test_a_question_that_fills_a_row_alone_is_left_out_with_a_count(check: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", [ROWS[0], LONG_QUESTION, *ROWS[1:]])
    result = check(path, *LIMIT, "--json")
    figures = report(result)
    assert found(figures) == {"too_long": 1}
    assert figures["rows"]["training"]["rows"] == 12
    assert figures["rows"]["training"]["sequences"] == 12
    assert "1 of 13 rows of data.train is longer than training.max_length 64 and left out (7.7%)" in result.stderr
    assert f"{path} row 2: " in result.stderr


def test_rows_that_are_all_too_long_stop_before_the_training(check: Run, sft: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", [LONG_QUESTION, LONG_ANSWER])
    before = tree(tmp_path)
    for result in (check(path, *LIMIT), sft(path, *LIMIT)):
        assert "no row of data.train has a token to train within training.max_length 64" in refusal(result)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("policy", "findings", "sequences"),
    [
        ("drop", {"too_long": 2}, 12),
        ("truncate_prompt", {"cut": 1, "untrained": 1}, 13),
        ("truncate_answer", {"cut": 1, "unended": 1, "untrained": 1}, 13),
    ],
)
def test_each_policy_tells_what_it_made_of_long_rows(
    check: Run, tmp_path: Path, policy: str, findings: dict[str, int], sequences: int
) -> None:
    path = write(tmp_path / "rows.json", [*ROWS, LONG_QUESTION, LONG_ANSWER])
    flags = (*LIMIT, "--data.truncation_strategy", policy, "--data.severity", "repetitive=ignore")
    figures = report(check(path, *flags, "--json"))
    assert found(figures) == findings
    assert figures["rows"]["training"]["sequences"] == sequences
    assert figures["rows"]["training"]["longest"] <= 64


@pytest.mark.parametrize(("policy", "row"), [("truncate_prompt", LONG_QUESTION), ("truncate_answer", LONG_ANSWER)])
def test_a_shortened_row_keeps_what_its_policy_says(
    cli: Run, check: Run, tmp_path: Path, policy: str, row: dict[str, str]
) -> None:
    path = write(tmp_path / "rows.json", [row])
    (whole,) = ids_of(cli, path)
    (ids,) = ids_of(cli, path, *LIMIT, "--data.truncation_strategy", policy)
    assert len(ids) == 64
    assert (ids[-1] == TOKENIZER.eos_token_id) == (policy == "truncate_prompt")
    text = TOKENIZER.decode(ids)
    assert ("It is so.<|im_end|>" if policy == "truncate_prompt" else "Why?<|im_end|>") in text
    assert f"by {len(whole) - 64} tokens in all" in check(path, *LIMIT, "--data.truncation_strategy", policy).stderr


def test_a_long_row_is_refused_where_the_policy_says_so(check: Run, sft: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", [*ROWS, LONG_ANSWER])
    flags = (*LIMIT, "--data.truncation_strategy", "refuse")
    before = tree(tmp_path)
    for result in (check(path, *flags), sft(path, *flags)):
        message = refusal(result)
        assert f"{path} row 13: " in message
        assert "left out" not in message
    assert tree(tmp_path) == before


# --- few rows ---


def test_a_single_row_in_a_batch_of_eight_is_trained_on_without_validation(
    check: Run, sft: Run, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.json", ROWS[:1])
    figures = report(check(path, "--training.batch_size", "8", "--json"))
    assert found(figures) == {"no_validation": 1}
    assert (figures["rows"]["training"]["rows"], figures["training"]["steps_per_epoch"]) == (1, 1)
    result = sft(path, "--training.batch_size", "8")
    assert result.exit_code == 0, result.stderr
    assert "1 row cannot be split; there is no validation" in result.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [math.isfinite(line["loss"]) for line in metrics if "loss" in line] == [True]
    assert not any("validation_loss" in line for line in metrics)


def test_fewer_rows_than_a_batch_make_one_step(check: Run, tmp_path: Path) -> None:
    figures = report(check(write(tmp_path / "rows.json", ROWS[:3]), "--training.batch_size", "8", "--json"))
    assert {name: split["rows"] for name, split in figures["rows"].items()} == {"training": 2, "validation": 1}
    assert figures["training"]["steps_per_epoch"] == 1
    assert found(figures) == {"few_rows": 3}


@pytest.mark.parametrize("flags", [(), ("--data.validation", "0")])
def test_a_setting_that_leaves_no_row_is_told(check: Run, sft: Run, tmp_path: Path, flags: Any) -> None:
    path = write(tmp_path / "rows.json", [{"instruction": "a", "output": ""}, {"instruction": "b", "output": " "}])
    before = tree(tmp_path)
    for result in (check(path, *flags, "--data.remove", "empty"), sft(path, *flags, "--data.remove", "empty")):
        assert f"data.remove leaves no training row of {path}" in refusal(result)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_are_left_out_take_no_place_in_the_validation(check: Run, tmp_path: Path, seed: int) -> None:
    path = write(tmp_path / "rows.json", [ROWS[0], LONG_ANSWER, LONG_QUESTION, ROWS[1]])
    figures = report(check(path, "--training.max_length", "64", "--seed", seed, "--json"))
    assert {name: split["sequences"] for name, split in figures["rows"].items()} == {"training": 1, "validation": 1}


def test_training_rows_that_are_all_in_validation_too_leave_nothing_where_they_are_removed(
    check: Run, rows_file: Path
) -> None:
    flags = ("--data.validation", rows_file, "--data.remove", "overlap")
    assert f"data.remove leaves no training row of {rows_file}" in refusal(check(rows_file, *flags))


def test_half_of_two_rows_is_one_row_on_each_side(check: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", ROWS[:2])
    figures = report(check(path, "--data.validation", "0.9", "--json"))
    assert {name: split["rows"] for name, split in figures["rows"].items()} == {"training": 1, "validation": 1}


def test_a_validation_file_without_a_usable_row_is_told(check: Run, tmp_path: Path, rows_file: Path) -> None:
    held_out = write(tmp_path / "held.json", [LONG_ANSWER])
    result = check(rows_file, "--data.validation", held_out, "--training.max_length", "64", "--json")
    assert "1 of 1 row of data.validation is longer" in result.stderr
    assert set(report(result)["rows"]) == {"training"}


def test_repetitions_and_rows_on_both_sides_are_counted_and_named(check: Run, tmp_path: Path) -> None:
    train = write(tmp_path / "train.json", [*ROWS[:3], ROWS[1], ROWS[0]])
    held_out = write(tmp_path / "held.json", [ROWS[5], ROWS[2]])
    result = check(train, "--data.validation", held_out, "--json")
    assert found(report(result)) == {"duplicates": 2, "overlap": 1}
    for told in (f"{train} row 4 is row 2", f"{train} row 5 is row 1", f"{held_out} row 2 is {train} row 3"):
        assert told in result.stderr


@pytest.mark.parametrize("seed", range(3))
def test_the_only_row_that_fits_is_trained_on(check: Run, tmp_path: Path, seed: int) -> None:
    path = write(tmp_path / "rows.json", [LONG_ANSWER, ROWS[0], LONG_QUESTION])
    figures = report(check(path, "--training.max_length", "64", "--seed", seed, "--json"))
    assert {name: split["sequences"] for name, split in figures["rows"].items()} == {"training": 1}
    assert found(figures) == {"too_long": 2, "repetitive": 1, "no_validation": 1}


# --- files that change ---


def test_a_file_that_changes_while_it_is_read_is_told_and_not_kept(
    check: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.jsonl", [row | {"output": "It is late."} for row in ROWS])
    encode = Encoder.encode_all

    def encode_slowly(*arguments: Any, **options: Any) -> Any:
        write(path, path.read_text() + json.dumps({"instruction": "late?", "output": "late!"}))
        return encode(*arguments, **options)

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Encoder, "encode_all", encode_slowly)
        assert f"{path}: changed while it was read; start again" in refusal(check(path))
    assert report(check(path, "--json"))["files"][0]["seen"] == 13


def test_a_changed_file_is_read_anew(check: Run, rows_file: Path) -> None:
    first = report(check(rows_file, "--json"))
    write(rows_file, [*ROWS, ROWS[0] | {"output": "It is nothing."}])
    second = report(check(rows_file, "--json"))
    assert (first["files"][0]["rows"], second["files"][0]["rows"]) == (12, 13)
    assert first["files"][0]["sha256"] != second["files"][0]["sha256"]


# --- what is not read at all ---


@pytest.mark.parametrize(
    "address",
    [
        "https://example.org/rows.json",
        "http://localhost:1/rows.jsonl",
        "hf://datasets/org/name/rows.json",
        "s3://bucket/rows.parquet",
        "file:///tmp/rows.json",
    ],
)
def test_an_address_is_refused_without_a_look_at_the_network(
    check: Run, sft: Run, tmp_path: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    def dial(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", dial)
    monkeypatch.setattr(socket, "getaddrinfo", dial)
    before = tree(tmp_path)
    for result in (check(rows_file, "--data.train", address), sft(address)):
        assert f"{address}: nothing is fetched from the network" in refusal(result)
    assert tree(tmp_path) == before


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("name", ["rows.arrow", "rows.pkl", "rows.py", "rows.xlsx", "rows.pt", "rows"])
def test_other_kinds_of_files_are_refused_by_their_name_alone(check: Run, tmp_path: Path, name: str) -> None:
    missing = refusal(check(tmp_path / name))
    write(tmp_path / name, pickle.dumps(Canary(tmp_path / "canary")))
    there = refusal(check(tmp_path / name))
    assert there == missing
    assert f"{tmp_path / name}: not a .json, .jsonl, .csv or .parquet file" in there
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.parquet"])
def test_a_pickle_under_another_name_is_never_unpickled(check: Run, tmp_path: Path, name: str) -> None:
    write(tmp_path / name, pickle.dumps(Canary(tmp_path / "canary"), protocol=0))
    assert str(tmp_path / name) in refusal(check(tmp_path / name))
    assert not (tmp_path / "canary").exists()


# --- tokenizers ---


@pytest.fixture
def model(random_qwen: Path, tmp_path: Path) -> Path:
    """A copy of the random model whose tokenizer a test may change."""
    return shutil.copytree(random_qwen, tmp_path / "model")


def edit_tokenizer(model: Path, **values: Any) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("pad", ["<|im_end|>", None], ids=["pad is end", "no pad"])
def test_the_end_of_every_answer_is_trained_whatever_pads_a_batch(
    cli: Run, model: Path, rows_file: Path, pad: str | None
) -> None:
    edit_tokenizer(model, pad_token=pad)
    end = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("<|im_end|>")
    shown = cli("data", "preview", "--model.base", model, "--data.train", rows_file, "--rows", "99", "--json")
    assert [row["labels"][-1] for row in json.loads(shown.stdout)["sequences"]] == [end] * 11


def test_the_loss_of_a_padded_batch_is_that_of_its_rows_where_the_end_token_pads(
    sft: Run, model: Path, tmp_path: Path
) -> None:
    edit_tokenizer(model, pad_token="<|im_end|>")
    rows = [ROWS[0], {"instruction": "And?", "output": "It is a longer answer."}]
    result = sft(write(tmp_path / "rows.json", rows), "--data.validation", "0", model=model)
    assert result.exit_code == 0, result.stderr
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    losses = []
    for row in rows:  # without any padding
        turns = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        context = TOKENIZER.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
        answer = TOKENIZER(f"{row['output']}<|im_end|>").input_ids
        with torch.no_grad():
            logits = plain(torch.tensor([TOKENIZER(context).input_ids + answer])).logits[0, -len(answer) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none").tolist()
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_tokenizer_without_a_chat_template_needs_another_template(
    check: Run, sft: Run, model: Path, tmp_path: Path, rows_file: Path
) -> None:
    (model / "chat_template.jinja").unlink()
    before = tree(tmp_path)
    for result in (check(rows_file, "--model.base", model), sft(rows_file, model=model)):
        assert "set prompt.template to plain or alpaca" in refusal(result, Exit.MODEL)
    assert tree(tmp_path) == before
    assert report(check(rows_file, "--model.base", model, "--prompt.template", "alpaca", "--json"))["findings"] == []
