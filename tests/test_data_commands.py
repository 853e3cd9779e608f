"""`loratune data check` and `loratune data preview`: every figure and every token compared with plain arithmetic."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from conftest import ROWS, TINY_QWEN
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from transformers import AutoTokenizer
from typer.testing import Result

from loratune.errors import Exit
from loratune.training.data_report import BARS, histogram

Run = Callable[..., Result]
TOKENIZER = AutoTokenizer.from_pretrained(TINY_QWEN)
SYSTEM = "You are a helpful assistant."
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def check(cli: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "1000")  # no message is broken into lines

    def run(train: Any, *flags: Any) -> Result:
        return cli("data", "check", "--model.base", "tiny-qwen", "--data.train", train, *flags)

    return run


@pytest.fixture
def preview(cli: Run) -> Run:
    def run(train: Any, *flags: Any, **options: Any) -> Result:
        arguments = ("--model.base", "tiny-qwen", "--data.train", train, "--data.validation", "0")
        result = cli("data", "preview", *arguments, *flags, **options)
        assert result.exit_code == 0, result.stderr
        return result

    return run


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


@cache
def context_of(question: str, system: str = SYSTEM) -> str:
    """What stands before an answer, written out by hand."""
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def lengths_of(rows: list[dict[str, str]]) -> list[tuple[int, int]]:
    """Tokens and trained tokens of each row, whose answer ends with the end token."""
    found = []
    for row in rows:
        trained = len(TOKENIZER(row["output"]).input_ids) + 1
        found.append((len(TOKENIZER(context_of(row["instruction"])).input_ids) + trained, trained))
    return found


def figures_of(result: Result, code: Exit = Exit.OK) -> dict[str, Any]:
    """What --json printed."""
    assert result.exit_code == code, result.stderr
    figures: dict[str, Any] = json.loads(result.stdout)
    return figures


UNEVEN = [{"instruction": f"Count from {5 * size}.", "output": " ".join(str(n) for n in range(5 * size, 6 * size + 1))}
          for size in range(1, 30)]  # fmt: skip


# --- check: figures ---


@pytest.mark.parametrize("rows", [ROWS, UNEVEN], ids=["even", "uneven"])
def test_figures_are_those_of_the_rows_counted_with_the_tokenizer(
    check: Run, tmp_path: Path, rows: list[dict[str, str]]
) -> None:
    path = write_rows(tmp_path / "rows.json", rows)
    report = figures_of(check(path, "--data.validation", "0", "--json"))
    tokens, trained = zip(*lengths_of(rows), strict=True)
    assert report["rows"] == {
        "training": {
            "rows": len(rows),
            "sequences": len(rows),
            "tokens": sum(tokens),
            "trained_tokens": sum(trained),
            "shortest": min(tokens),
            "median": int(median(tokens)),
            "longest": max(tokens),
        }
    }
    for bar in report["histogram"]:
        assert bar["rows"] == sum(bar["from"] <= length <= bar["to"] for length in tokens)
    assert report["findings"] == []
    assert report["refused"] is False


def test_a_split_divides_rows_and_tokens_among_training_and_validation(check: Run, rows_file: Path) -> None:
    report = figures_of(check(rows_file, "--data.validation", "0.25", "--json"))
    train, held_out = report["rows"]["training"], report["rows"]["validation"]
    assert (train["rows"], held_out["rows"]) == (9, 3)
    tokens, trained = zip(*lengths_of(ROWS), strict=True)
    assert train["tokens"] + held_out["tokens"] == sum(tokens)
    assert train["trained_tokens"] + held_out["trained_tokens"] == sum(trained)


@pytest.mark.parametrize(("batch", "epochs"), [(16, 3.0), (1, 1.0), (10, 2.5), (24, 0.4), (64, 10.0)])
def test_steps_are_plain_arithmetic(check: Run, tmp_path: Path, batch: int, epochs: float) -> None:
    path = write_rows(tmp_path / "rows.json", UNEVEN)
    flags = ("--training.batch_size", batch, "--training.epochs", epochs)
    training = figures_of(check(path, "--data.validation", "0", *flags, "--json"))["training"]
    steps = math.ceil(29 / batch)
    assert training["rows_per_step"] == min(batch, 29)
    assert training["steps_per_epoch"] == steps
    assert training["steps"] == math.ceil(epochs * steps)
    assert training["tokens_per_epoch"] == sum(tokens for tokens, _ in lengths_of(UNEVEN))


def test_the_training_takes_as_many_steps_as_the_check_says(
    cli: Run, check: Run, random_qwen: Path, rows_file: Path, tmp_path: Path
) -> None:
    flags = ("--training.batch_size", "8", "--training.epochs", "1.5",
             "--data.validation", "0")  # fmt: skip
    expected = figures_of(check(rows_file, *flags, "--json"))["training"]["steps"]
    result = cli("sft", "--model.base", random_qwen, "--model.dtype", "float32", "--data.train", rows_file, *flags,
                 "--output", tmp_path / "run")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == expected == 3


def test_padding_is_the_share_of_positions_without_a_token(check: Run, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.json", UNEVEN)
    tokens = [tokens for tokens, _ in lengths_of(UNEVEN)]

    def efficiency(batch: int) -> float:
        flags = ("--training.batch_size", batch, "--data.validation", "0")
        shares: dict[str, float] = figures_of(check(path, *flags, "--json"))["training"]
        return shares["padded_efficiency"]

    assert efficiency(1) == 1
    assert efficiency(29) == pytest.approx(sum(tokens) / (29 * max(tokens)), abs=1e-4)
    assert efficiency(29) < efficiency(4) < 1


@settings(deadline=None, max_examples=300)
@given(st.lists(st.one_of(st.integers(1, 60), st.integers(1, 5000), st.integers(1, 10**6)), min_size=1, max_size=300))
def test_the_bars_of_a_histogram_join_and_hold_every_length_once(lengths: list[int]) -> None:
    bars = histogram(np.array(lengths, np.int64))
    assert bars[0]["from"] <= min(lengths) <= bars[0]["to"]
    assert [bar["from"] for bar in bars[1:]] == [bar["to"] + 1 for bar in bars[:-1]]
    assert [bar["rows"] for bar in bars] == [
        sum(bar["from"] <= length <= bar["to"] for length in lengths) for bar in bars
    ]
    assert sum(bar["rows"] for bar in bars) == len(lengths)
    assert len(bars) <= BARS + 1
    assert len({bar["to"] - bar["from"] for bar in bars[:-1]}) <= 1


# --- check: what is shown ---


def lines_of(text: str) -> dict[str, str]:
    """First word or words of each line of a table → the rest, single blanks between words."""
    cells = (re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in text.splitlines())
    return {name: " ".join(rest[0].split()) for name, *rest in cells if rest}


def test_the_tables_show_what_the_json_says(check: Run, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.json", UNEVEN)
    result = check(path, "--data.validation", "0.2", "--json")
    report, lines = figures_of(result), lines_of(result.stderr)
    train, training = report["rows"]["training"], report["training"]
    assert lines[f"…{str(path)[-29:]}"] == "29 rows, alpaca"
    assert lines["training"] == (
        f"{train['rows']}, {train['tokens']:,} tokens ({train['trained_tokens'] / train['tokens']:.0%} trained); "
        f"{train['shortest']} to {train['longest']}, median {train['median']}"
    )
    assert lines["validation"].startswith(f"{report['rows']['validation']['rows']}, ")
    assert lines["an epoch"].startswith(f"{train['tokens']:,} tokens, {training['steps_per_epoch']} step")
    assert lines["the run"] == f"{training['steps']} steps"
    assert lines["padding"].startswith(
        f"{1 - training['padded_efficiency']:.0%} of a step's positions if rows are padded"
    )
    for bar in report["histogram"]:
        label = f"{bar['from']}–{bar['to']}"
        assert lines[label].split()[-1] == str(bar["rows"])
        assert ("█" in lines[label] or "▏" in lines[label]) or not bar["rows"]
    assert "sft would train on these rows" in result.stderr


def test_the_longest_bar_is_the_largest_count_and_a_few_rows_are_still_seen(check: Run, tmp_path: Path) -> None:
    rows = [{"instruction": str(n % 10), "output": "It is so."} for n in range(600)]
    rows += [{"instruction": "?", "output": "It is so, and so on, and on. " * 4}] * 10
    ignored = [
        flag for name in ("duplicates", "repetitive", "overlap") for flag in ("--data.severity", f"{name}=ignore")
    ]
    result = check(write_rows(tmp_path / "rows.json", rows), "--data.validation", "0", *ignored)
    bars = [line for line in result.stderr.splitlines() if re.match(r"\s*\d+–\d+ ", line)]
    shown = {int(line.split()[-1]): len(re.findall("[█▏▎▍▌▋▊▉]", line)) for line in bars}
    assert shown[600] == 40
    assert shown[10] == 1
    assert shown[0] == 0


def test_rows_that_are_not_used_are_told_per_file(check: Run, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.json", [row | {"id": 1} for row in ROWS])
    held_out = write_rows(tmp_path / "held.json", UNEVEN[:3])
    result = check(f"{train}#5", "--data.validation", held_out, "--json")
    report, lines = figures_of(result), lines_of(result.stderr)
    assert [(use["path"], use["rows"], use["seen"], use["ignored"]) for use in report["files"]] == [
        (str(train), 5, 12, ["id"]),
        (str(held_out), 3, 3, []),
    ]
    assert lines[f"…{str(train)[-29:]}"] == "5 of 12 rows, alpaca; ignored: id"


def test_the_key_that_rows_are_under_is_told_of_a_fresh_file_and_of_a_cached_one(check: Run, tmp_path: Path) -> None:
    rows = [{"instruction": f"question {number}", "output": f"answer {number}"} for number in range(6)]
    path = tmp_path / "object.json"
    path.write_text(json.dumps({"version": 1, "data": rows}, indent=1))
    for _ in range(2):
        figures = figures_of(check(path, "--data.validation", "0", "--json"))
        assert [(use["seen"], use["format"]) for use in figures["files"]] == [(6, "alpaca under 'data'")]


def test_only_json_goes_to_stdout_and_only_if_it_is_asked_for(check: Run, rows_file: Path) -> None:
    assert check(rows_file).stdout == ""
    assert set(figures_of(check(rows_file, "--json"))) == {
        *("schema", "files", "template", "rows", "histogram", "training", "reasoning", "reasoning_form", "findings"),
        "refused",
    }


def test_nothing_but_the_cache_is_written(check: Run, tmp_path: Path, rows_file: Path) -> None:
    check(rows_file, "--output", tmp_path / "run")
    assert list(tmp_path.iterdir()) == [rows_file]


# --- check: findings ---

ODD: dict[str, tuple[dict[str, str], str]] = {
    "empty": ({"instruction": "Nothing?", "output": ""}, "refuse"),
    "control_tokens_in_answers": ({"instruction": "End?", "output": "The end.<|im_end|>"}, "refuse"),
    "control_tokens": ({"instruction": "Start <|im_start|>?", "output": "Started."}, "warn"),
    "short": ({"instruction": "Letter?", "output": "A"}, "warn"),
    "garbled": ({"instruction": "Coffee?", "output": "Un cafÃ© crÃ¨me, trÃ¨s bien."}, "warn"),
    "repetitive": ({"instruction": "Loop?", "output": "so on and on " * 40}, "warn"),
    "thinking": ({"instruction": "Think?", "output": "<think>Hm.</think>Yes."}, "warn"),
    "duplicates": (ROWS[0], "warn"),
    "other_answers": (ROWS[0] | {"output": "Another answer than before."}, "warn"),
}
PAIRS = {"duplicates": "is", "other_answers": "asks the same as"}
"""What stands between two rows that are compared."""


@pytest.mark.parametrize("name", ODD)
def test_a_finding_is_told_with_its_row_refused_ignored_or_removed(check: Run, tmp_path: Path, name: str) -> None:
    odd, usual = ODD[name]
    path = write_rows(tmp_path / "rows.json", [*ROWS, odd])
    more = ("--data.validation", "0", "--json")

    result = check(path, *more)
    report = figures_of(result, Exit.DATA if usual == "refuse" else Exit.OK)
    (found,) = report["findings"]
    assert (found["name"], found["level"], found["count"]) == (name, usual, 1)
    assert found["text"].startswith(tuple(f"1 of 13 rows of data.train {verb} " for verb in ("has", "holds", "is")))
    place = f"{path} row 13 {PAIRS[name]} row 1" if name in PAIRS else f"{path} row 13 «{odd['instruction']}»"
    assert found["text"].endswith(f"\n  {place}")
    assert f"--data.remove {name} removes them" in found["text"]
    assert found["text"] in result.stderr
    assert report["refused"] == (usual == "refuse")

    for level, code in (("refuse", Exit.DATA), ("warn", Exit.OK)):
        result = check(path, *more, "--data.severity", f"{name}={level}")
        assert [one["level"] for one in figures_of(result, code)["findings"]] == [level]
        assert (f"sft would refuse these rows: {name}" in result.stderr) == (level == "refuse")
        assert ("sft would train on these rows" in result.stderr) == (level == "warn")
    assert figures_of(check(path, *more, "--data.severity", f"{name}=ignore"))["findings"] == []

    report = figures_of(check(path, *more, "--data.remove", name))
    (removed,) = report["findings"]
    assert (removed["name"], removed["level"], removed["count"]) == (f"{name}, removed", "note", 1)
    assert "; removed:" in removed["text"]
    assert place in removed["text"]
    assert report["rows"] == figures_of(check(write_rows(tmp_path / "plain.json", ROWS), *more))["rows"]


ROLES = ("user", "assistant")


def test_answers_that_differ_are_told_once_a_question_and_without_the_repeated_rows(check: Run, tmp_path: Path) -> None:
    def said(*texts: str) -> dict[str, Any]:
        return {"messages": [{"role": ROLES[n % 2], "content": text} for n, text in enumerate(texts)]}

    rows = [
        said("Sum?", "Four."),
        said("Sum?", "Five."),
        said("Sum?", "Four."),
        said("Sum?", "Five."),
        said("Hi!", "Yes?", "Sum?", "Five."),
        said("Hello!", "Yes?", "Sum?", "Four."),
        said("Hello!", "Yes?", "Sum?", "Six."),
        *[said(f"{n}?", "The same answer.") for n in range(8)],
    ]
    path = write_rows(tmp_path / "rows.json", rows)
    flags = ("--data.validation", "0", "--json")
    found = {one["name"]: one["text"].splitlines()[1:] for one in figures_of(check(path, *flags))["findings"]}
    assert found == {
        "duplicates": [f"  {path} row 3 is row 1", f"  {path} row 4 is row 2"],
        "other_answers": [f"  {path} row 2 asks the same as row 1", f"  {path} row 7 asks the same as row 6"],
    }


def test_no_answer_goes_because_of_another_one_that_goes_too(check: Run, tmp_path: Path) -> None:
    answers = ["", "Paris is its capital.", "A" * 400, "It is Paris.", "It is Paris, the city."]
    asked = ["France?", "France?", "Spain?", "Spain?", "Spain?"]
    rows = [{"instruction": question, "output": answer} for question, answer in zip(asked, answers, strict=True)]
    path = write_rows(tmp_path / "rows.json", [*ROWS, *rows])
    flags = ["--data.validation", "0", "--training.max_length", "100", "--json"]
    flags += [flag for name in ("empty", "other_answers") for flag in ("--data.remove", name)]
    report = figures_of(check(path, *flags))
    told = {one["name"]: one["text"].splitlines()[1:] for one in report["findings"]}
    assert told["other_answers, removed"] == [f"  {path} row 17 asks the same as row 16"]
    assert told["too_long"][0].startswith(f"  {path} row 15: ")
    assert report["rows"]["training"]["rows"] == len(ROWS) + 2


def test_all_reasons_for_a_refusal_are_named_at_once(check: Run, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.json", [*ROWS, *(odd for odd, _ in ODD.values())])
    flags = ("--data.validation", "0", "--data.severity", "long_answers=ignore", "--json")
    result = check(path, *flags)
    found = {one["name"]: (one["level"], one["count"]) for one in figures_of(result, Exit.DATA)["findings"]}
    assert found == {name: (usual, 1) for name, (_, usual) in ODD.items()}
    assert "sft would refuse these rows: empty, control_tokens_in_answers" in result.stderr
    cleaned = figures_of(check(path, *flags, *[flag for name in ODD for flag in ("--data.remove", name)]))
    assert cleaned["rows"]["training"]["rows"] == 12
    assert {one["name"] for one in cleaned["findings"]} == {f"{name}, removed" for name in ODD}


def test_each_problem_of_several_files_has_its_own_remedy_in_json(check: Run, tmp_path: Path) -> None:
    bad = write_rows(tmp_path / "bad.json", [{"instruction": "a"}])
    unfilled = write_rows(tmp_path / "unfilled.json", [{"instruction": "{{name}}?", "output": "b"}])
    missing = str(tmp_path / "missing.json")
    result = check(bad, "--data.train", unfilled, "--data.train", missing, "--json")
    problems = figures_of(result, Exit.DATA)["problems"]
    assert [one["file"] for one in problems] == [str(bad), str(unfilled), missing]
    assert "correct or remove these rows" in problems[0]["remedy"]
    assert "--data.placeholders name=TEXT" in problems[1]["remedy"]
    assert problems[2]["remedy"] is None


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), ["{path}: rows hold {{Company}}, {{phone}}, for which data.placeholders has no value: such text stays "
              "as it is"]),
        (("company=Acme", "PHONE=5"), []),
        (("companny=Acme", "phone=5"), [
            "{path}: rows hold {{Company}}, for which data.placeholders has no value (it has 'companny' for 'Company')"
            ": such text stays as it is",
            "data.placeholders has values for what no row holds: {{companny}}",
        ]),
        (("company=Acme", "phone=5", "name=Li"), ["data.placeholders has values for what no row holds: {{name}}"]),
    ],
)  # fmt: skip
def test_placeholders_without_a_value_and_values_without_a_placeholder_are_told(
    check: Run, tmp_path: Path, flags: tuple[str, ...], told: list[str]
) -> None:
    rows = [*ROWS, {"instruction": "Who?", "output": "{{Company}}, {{ phone }}, { no } {{ no no }}."}]
    path = write_rows(tmp_path / "rows.json", rows)
    given = [flag for value in flags for flag in ("--data.placeholders", value)]
    for _ in range(2):  # from the cache too
        found = figures_of(check(path, "--data.validation", "0", *given, "--json"))["findings"]
        assert [one["text"] for one in found] == [text.replace("{path}", str(path)) for text in told]
        assert {one["name"] for one in found} <= {"placeholders"}


def test_placeholders_of_system_prompts_are_filled_in_those_of_sources_and_told_of_others(
    cli: Run, tmp_path: Path
) -> None:
    recipe, rows = tmp_path / "recipe.yaml", write_rows(tmp_path / "rows.json", ROWS)
    recipe.write_text(
        f"model: {{base: tiny-qwen}}\n"
        f"prompt: {{system: 'You are {{{{name}}}}.'}}\n"
        f"data: {{train: [{{path: {rows}, system: 'I am {{{{name}}}}.'}}], placeholders: {{name: Robin}}}}\n",
        encoding="utf-8",
    )
    (found,) = figures_of(cli("data", "check", "-c", recipe, "--json"))["findings"]
    assert found["text"].startswith("prompt.system holds {{name}}, which is no placeholder there: ")
    assert "I am Robin." in cli("data", "preview", "-c", recipe).stdout


def test_a_required_placeholder_is_told_with_the_value_that_may_be_meant(check: Run, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.json", [{"instruction": "{{name}}?", "output": "b"}])
    told = check(path, "--data.placeholders", "nmae=Li").stderr
    assert (
        "give values in data.placeholders (it has 'nmae' for 'name'), or as --data.placeholders name=TEXT"
        in " ".join(told.split())
    )


def test_of_many_files_with_problems_ten_are_shown_and_all_are_in_the_document(check: Run, tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{number:02}.json", [{"instruction": "a"}]) for number in range(14)]
    empty = write_rows(tmp_path / "empty.json", [{"instruction": "Nothing?", "output": ""}])
    more = [word for path in (*files[1:], empty) for word in ("--data.train", path)]
    result = check(files[0], *more, "--json")
    document = figures_of(result, Exit.DATA)
    for shown in (document["message"], result.stderr):
        assert [shown.count(f"{path} row 1: ") for path in files] == [1] * 10 + [0] * 4
        assert "\n… and 4 more problems, which the JSON document lists\n" in shown
        assert "has an answer without text" in shown.splitlines()[-2]
    assert [one["file"] for one in document["problems"]] == [*map(str, files), str(empty)]


def test_of_many_rows_with_a_finding_five_are_shown(check: Run, tmp_path: Path) -> None:
    rows = [*ROWS, *[{"instruction": f"Letter {n}?", "output": "A"} for n in range(8)]]
    (found,) = figures_of(
        check(write_rows(tmp_path / "rows.json", rows), "--data.validation", "0", "--json")
    )["findings"]  # fmt: skip
    assert found["count"] == 8
    assert re.findall(r"row (\d+) «", found["text"]) == ["13", "14", "15", "16", "17"]
    assert found["text"].endswith("… and 3 more")


def test_an_answer_far_longer_than_the_others_is_told(check: Run, tmp_path: Path) -> None:
    rows = [*ROWS, *[{"instruction": f"{n}!", "output": "It is so."} for n in range(12)], UNEVEN[-1]]
    path = write_rows(tmp_path / "rows.json", rows)
    report = figures_of(check(path, "--data.validation", "0", "--json"))
    assert {one["name"]: one["count"] for one in report["findings"]} == {"long_answers": 1}
    assert f"{path} row 25 «Count from 145.»" in report["findings"][0]["text"]


def test_rows_that_are_nearly_the_same_are_told_if_they_are_looked_for(check: Run, tmp_path: Path) -> None:
    numbers = " ".join(str(n * n % 97) for n in range(80))
    rows = [*ROWS, *[{"instruction": f"Count to {end}.", "output": f"{numbers} {end}"} for end in ("A", "B")]]
    path = write_rows(tmp_path / "rows.json", rows)
    flags = ("--data.validation", "0", "--data.severity", "long_answers=ignore", "--json")
    assert figures_of(check(path, *flags))["findings"] == []
    report = figures_of(check(path, *flags, "--data.near_duplicates", "0.8"))
    assert {one["name"]: one["count"] for one in report["findings"]} == {"near_duplicates": 1}
    assert f"{path} row 14 is row 13" in report["findings"][0]["text"]
    cleaned = figures_of(check(path, *flags, "--data.near_duplicates", "0.8", "--data.remove", "near_duplicates"))
    assert cleaned["rows"]["training"]["rows"] == 13


def test_rows_are_nearly_the_same_even_if_all_of_a_file_are(check: Run, tmp_path: Path) -> None:
    numbers = " ".join(str(n * n % 97) for n in range(80))
    path = write_rows(tmp_path / "rows.json", [{"instruction": "Count.", "output": f"{numbers} {n}"} for n in range(6)])
    report = figures_of(check(path, "--data.validation", "0", "--data.near_duplicates", "0.8", "--json"))
    assert {one["name"]: one["count"] for one in report["findings"]} == {"near_duplicates": 5, "other_answers": 5}


@pytest.mark.parametrize("flags", [("--data.remove", "near_duplicates"), ("--data.severity", "near_duplicates=refuse")])
def test_what_is_to_be_done_with_similar_rows_needs_to_be_told_how_similar(
    check: Run, rows_file: Path, flags: tuple[str, str]
) -> None:
    result = check(rows_file, *flags)
    assert result.exit_code == Exit.USAGE
    assert "data.near_duplicates" in result.stderr


def test_of_rows_in_training_and_validation_those_of_training_are_removed(check: Run, tmp_path: Path) -> None:
    train, held_out = write_rows(tmp_path / "train.json", ROWS), write_rows(tmp_path / "held.json", ROWS[10:])
    result = check(train, "--data.validation", held_out, "--json")
    (found,) = figures_of(result)["findings"]
    assert (found["name"], found["level"], found["count"]) == ("overlap", "warn", 2)
    cleaned = figures_of(check(train, "--data.validation", held_out, "--data.remove", "overlap", "--json"))
    assert {name: split["rows"] for name, split in cleaned["rows"].items()} == {"training": 10, "validation": 2}
    assert [one["name"] for one in cleaned["findings"]] == ["overlap, removed"]


def test_an_unknown_finding_is_told_with_the_known_ones(check: Run, rows_file: Path) -> None:
    for flags in (("--data.severity", "dublicates=ignore"), ("--data.remove", "dublicates")):
        result = check(rows_file, *flags)
        assert result.exit_code == Exit.USAGE
        assert flags[0] in result.stderr
        assert "'duplicates'" in result.stderr


def test_a_fraction_that_is_given_twice_is_no_file_that_is_missing(check: Run, rows_file: Path) -> None:
    result = check(rows_file, "--data.validation", "0.1", "--data.validation", "0")
    assert result.exit_code == Exit.USAGE
    assert "data.validation" in result.stderr


# --- preview ---


def test_exactly_the_answers_and_their_ends_stand_in_brackets(preview: Run, rows_file: Path) -> None:
    result = preview(rows_file, "--rows", "12")
    expected = "".join(
        f"{rows_file} row {number}: {tokens} tokens, {trained} trained\n"
        f"{context_of(row['instruction'])}⟦{row['output']}<|im_end|>⟧\n\n".replace("\n<|", "⏎\n<|")
        for number, (row, (tokens, trained)) in enumerate(zip(ROWS, lengths_of(ROWS), strict=True), start=1)
    )
    shown = result.stdout.replace("⏎\n", "\n")
    assert shown == expected.replace("⏎\n", "\n")
    assert result.stdout.count("⏎\n") == 5 * 12


def test_of_a_conversation_every_answer_is_in_brackets_or_only_the_last(preview: Run, tmp_path: Path) -> None:
    row = {"instruction": "And you?", "output": "Me\ntoo.", "history": [["How are you?", "Fine."]]}
    path = write_rows(tmp_path / "rows.json", [row])
    assert re.findall("⟦(.*?)⟧", preview(path).stdout, re.DOTALL) == ["Fine.<|im_end|>", "Me⏎\ntoo.<|im_end|>"]
    assert re.findall("⟦(.*?)⟧", preview(path, "--data.train_on_turns", "last").stdout, re.DOTALL) == [
        "Me⏎\ntoo.<|im_end|>"
    ]


def test_tokens_are_listed_with_their_ids_and_whether_they_are_trained(preview: Run, tmp_path: Path) -> None:
    row = {"instruction": "Größe? 你好", "output": "Zwei\nMeter 狐狸."}
    lines = preview(write_rows(tmp_path / "rows.json", [row]), "--ids").stdout.splitlines()
    context = TOKENIZER(context_of(row["instruction"])).input_ids
    ids = context + TOKENIZER(f"{row['output']}<|im_end|>").input_ids
    listed = [re.fullmatch(r" *(\d+) +(\d+) (trained| {7})  (.*)", line) for line in lines if line][1:]
    assert [int(match[1]) for match in listed if match] == list(range(len(ids)))
    assert [int(match[2]) for match in listed if match] == ids
    assert [match[3] == "trained" for match in listed if match] == [n >= len(context) for n in range(len(ids))]
    assert [match[4] for match in listed if match] == [TOKENIZER.decode([id_]).replace("\n", "⏎") for id_ in ids]


def test_json_holds_text_ids_and_labels(preview: Run, rows_file: Path) -> None:
    shown = json.loads(preview(rows_file, "--rows", "2", "--json").stdout)["sequences"]
    for number, (found, row) in enumerate(zip(shown, ROWS[:2], strict=True), start=1):
        context, answer = context_of(row["instruction"]), f"{row['output']}<|im_end|>"
        before, trained = TOKENIZER(context).input_ids, TOKENIZER(answer).input_ids
        assert found == {
            "row": f"{rows_file} row {number}",
            "text": context + answer,
            "input_ids": before + trained,
            "labels": [-100] * len(before) + trained,
        }


@pytest.mark.parametrize(("count", "shown"), [(1, (1, 0)), (4, (2, 2)), (6, (4, 2)), (99, (5, 2))])
def test_each_source_shows_as_many_rows_as_it_has_of_its_share(
    preview: Run, tmp_path: Path, count: int, shown: tuple[int, int]
) -> None:
    files = write_rows(tmp_path / "a.json", ROWS[:5]), write_rows(tmp_path / "b.json", ROWS[5:7])
    places = [f"{file} row {n + 1}" for file, of_it in zip(files, shown, strict=True) for n in range(of_it)]
    result = preview(files[0], "--data.train", files[1], "--rows", count, "--json")
    assert [row["row"] for row in json.loads(result.stdout)["sequences"]] == places
    assert ("(--rows shows more), of each file in turn" in result.stderr) == (count < 7)


def test_a_row_that_is_repeated_is_shown_once(preview: Run, rows_file: Path) -> None:
    result = preview(f"{rows_file}#3x", "--json")
    shown = [row["row"] for row in json.loads(result.stdout)["sequences"]]
    assert shown == [f"{rows_file} row {n}" for n in (1, 2, 3)]
    assert "the first 3 of 12 training sequences" in result.stderr


@pytest.mark.parametrize(("share", "held"), [("0.1", 1), ("0.5", 4), ("0.75", 6), ("0", 0)])
def test_rows_held_for_validation_are_named(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: str, held: int
) -> None:
    monkeypatch.setenv("COLUMNS", "2000")
    files = write_rows(tmp_path / "a.json", ROWS[:5]), write_rows(tmp_path / "b.json", ROWS[5:8])
    line = ("data", "preview", *files, "--model.base", "tiny-qwen", "--data.validation", share)
    whole = cli(*line, "--rows", "99", "--json")
    shown = {row["row"] for row in json.loads(whole.stdout)["sequences"]}
    places = [
        f"{file} row {number}" for file, count in zip(files, (5, 3), strict=True) for number in range(1, count + 1)
    ]
    hidden = [place for place in places if place not in shown]
    assert len(hidden) == held
    (told,) = (line for line in whole.stderr.splitlines() if line.startswith(f"all of {8 - held} training sequences"))
    counted = f"{held} row is" if held == 1 else f"{held} rows are"
    named = f"{counted} held for validation: {', '.join(hidden[:5])}{', …' if held > 5 else ''}"
    assert told.partition("; ")[2] == (named if held else "")
    assert f"the first 1 of {8 - held} training sequences (--rows shows more)" in cli(*line, "--rows", "1").stderr


def test_rows_of_another_file_for_validation_are_not_called_held(cli: Run, tmp_path: Path) -> None:
    files = write_rows(tmp_path / "a.json", ROWS[:5]), write_rows(tmp_path / "b.json", ROWS[5:8])
    done = cli("data", "preview", files[0], "--model.base", "tiny-qwen", "--data.validation", files[1])
    assert done.exit_code == 0, done.stderr
    assert "held" not in done.stderr


def test_three_rows_are_shown_unless_more_are_asked_for(preview: Run, rows_file: Path) -> None:
    assert preview(rows_file).stdout.count("⟦") == 3


def test_a_template_that_replaces_the_one_a_model_was_trained_on_is_told(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    base, rows = tmp_path / "base", write_rows(tmp_path / "rows.json", ROWS)
    shutil.copytree(TINY_QWEN, base)
    generation = base / "generation_config.json"

    def told(template: str) -> bool:
        done = cli("data", "check", rows, "--model.base", base, "--prompt.template", template)
        assert done.exit_code == 0, done.stderr
        assert lines_of(done.stderr)["template"].startswith(f"{template}, ")
        return "stops on its end token" in done.stderr

    assert (told("plain"), told("alpaca"), told("chat")) == (True, True, False)
    planned = cli("plan", "--model.base", base, "--data.train", rows, "--prompt.template", "plain", "--gpu", "24GB")
    assert "--prompt.template chat uses it" in planned.stdout + planned.stderr
    # A base model stops on another token than the one with which its chat template ends answers.
    known = json.loads(generation.read_text())
    generation.write_text(json.dumps(known | {"eos_token_id": TOKENIZER.convert_tokens_to_ids("<|endoftext|>")}))
    assert not told("plain")
    generation.write_text(json.dumps(known | {"eos_token_id": [0, TOKENIZER.eos_token_id]}))
    assert told("plain")


@pytest.mark.parametrize("ids", [False, True])
def test_with_colours_what_is_trained_is_green_and_without_brackets(
    preview: Run, rows_file: Path, monkeypatch: pytest.MonkeyPatch, ids: bool
) -> None:
    flags = ("--rows", "1", *(["--ids"] if ids else []))
    plain = preview(rows_file, *flags).stdout
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    coloured = preview(rows_file, *flags).stdout
    assert "⟦" not in coloured
    assert ESCAPE.sub("", coloured) == plain.replace("⟦", "").replace("⟧", "")
    green = "".join(re.findall(r"\x1b\[(?:32|7;32)m(.*?)\x1b\[0m", coloured))
    assert green == "It is 0.<|im_end|>"
    assert "\x1b[7;32m<|im_end|>" in coloured


@pytest.mark.parametrize("ids", [False, True])
def test_control_characters_of_a_row_never_reach_the_terminal(
    preview: Run, check: Run, tmp_path: Path, ids: bool
) -> None:
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m\r\x08\x7f"
    row = {"instruction": f"red{evil}?", "output": f"green{evil}", "system": f"blue{evil}", f"column{evil}": 1}
    path = write_rows(tmp_path / "rows.json", [row, row])
    shown = preview(path, *(["--ids"] if ids else [])).stdout
    said = check(path).stderr
    for text in (shown, said):
        assert not [one for one in text if unicodedata.category(one) == "Cc" and one != "\n"]
    assert ids or "green]0;title[2J31m<|im_end|>" in shown
    assert "«red]0;title[2J31m ?»" in said


def test_json_holds_control_characters_of_a_row_to_the_letter(preview: Run, tmp_path: Path) -> None:
    row = {"instruction": "a\x1b\x85b\x7f", "output": "c\x9b31m\u2028d"}
    (shown,) = json.loads(preview(write_rows(tmp_path / "rows.json", [row]), "--json").stdout)["sequences"]
    assert shown["text"] == f"{context_of(row['instruction'])}{row['output']}<|im_end|>"


def test_markup_of_a_row_is_only_text(preview: Run, check: Run, tmp_path: Path) -> None:
    row = {"instruction": "[bold]Hi[/bold] [/] :smile:", "output": "[red]x[/red] [link=a]", "[dim]": 1}
    path = write_rows(tmp_path / "rows.json", [row, row])
    assert f"{row['instruction']}<|im_end|>" in preview(path).stdout
    assert f"⟦{row['output']}<|im_end|>⟧" in preview(path).stdout
    assert "ignored: [dim]" in check(path).stderr


def test_rows_that_are_refused_are_not_shown(cli: Run, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.json", [ROWS[0], {"instruction": "a", "output": ""}])
    result = cli("data", "preview", "--model.base", "tiny-qwen", "--data.train", path)
    assert result.exit_code == Exit.DATA
    assert result.stdout == ""
    assert "has an answer without text" in " ".join(result.stderr.split())


def test_long_lines_are_not_broken(preview: Run, tmp_path: Path) -> None:
    row = {"instruction": "long " * 60, "output": "It is " + "longer " * 60}
    shown = preview(write_rows(tmp_path / "rows.json", [row]), "--data.severity", "repetitive=ignore").stdout
    assert f"⟦{row['output']}<|im_end|>⟧\n" in shown


# --- the commands themselves ---


@pytest.mark.parametrize("page", [("data",), ("data", "check"), ("data", "preview")])
def test_help_fits_eighty_columns(cli: Run, page: tuple[str, ...]) -> None:
    result = cli(*page, "--help", env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert max(map(cell_len, result.stdout.splitlines())) == 80


def test_the_help_of_data_names_both_commands(cli: Run) -> None:
    page = cli("data", "--help", env={"COLUMNS": "80"}).stdout
    assert re.findall(r"^│ (\w+) ", page, re.MULTILINE) == ["check", "preview"]
    assert cli("data", "-h", env={"COLUMNS": "80"}).stdout == page


@pytest.mark.parametrize(("command", "own"), [("check", ["--json"]), ("preview", ["--rows", "--ids", "--json"])])
def test_help_of_a_command_names_its_own_options_and_the_settings(cli: Run, command: str, own: list[str]) -> None:
    page = cli("data", command, "--help", env={"COLUMNS": "80"}).stdout
    assert all(f"│ {option}" in page for option in [*own, "--data.remove", "--training.max_length"])


def test_data_alone_shows_its_commands_and_is_wrong_usage(cli: Run) -> None:
    result = cli("data", env={"COLUMNS": "80"})
    assert result.exit_code == Exit.USAGE
    assert result.stdout.strip() == cli("data", "--help", env={"COLUMNS": "80"}).stdout.strip()


@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "nonsense"),
        ("data", "check"),
        ("data", "preview"),
        ("data", "check", "--nonsense"),
        ("data", "check", "stray"),
        ("data", "preview", "--rows", "0"),
        ("data", "preview", "--rows", "few"),
        ("data", "check", "--config", "nonsense"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2_with_words_on_stderr_alone(cli: Run, arguments: tuple[str, ...]) -> None:
    result = cli(*arguments)
    assert result.exit_code == Exit.USAGE
    assert result.stdout == ""
    assert any(word in result.stderr for word in (arguments[-1].lstrip("-"), "must be given", "'--rows'"))
    assert "Traceback" not in result.stderr


def test_a_shipped_recipe_is_checked_and_shown_from_any_folder(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("data", "check", "--config", "quickstart").exit_code == 0
    assert "⟦" in cli("data", "preview", "--config", "quickstart").stdout
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_shipped_are_told_from_a_file_of_that_name(
    check: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = check("data/general.json")
    assert lines_of(shipped.stderr)["data/general.json"].endswith("alpaca; shipped with loratune")
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "general.json", ROWS)
    assert lines_of(check("data/general.json").stderr)["data/general.json"] == f"{len(ROWS)} rows, alpaca"


def test_without_a_tokenizer_the_check_says_what_it_could_check(cli: Run, tmp_path: Path) -> None:
    line = ("data", "check", write_rows(tmp_path / "rows.json", ROWS), "--model.base", tmp_path / "none")
    done = cli(*line)
    assert done.exit_code == Exit.MODEL
    assert done.stderr.startswith("the rows can be read, and have questions and answers; all else is checked with the")
    write_rows(tmp_path / "rows.json", [{"instruction": "a"}])
    done = cli(*line)
    assert done.exit_code == Exit.DATA
    assert "can be read" not in done.stderr


def test_packed_passes_are_shown_with_the_rows_that_share_them(cli: Run, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.json", UNEVEN)
    flags = ("--model.base", "tiny-qwen", "--data.train", path, "--data.validation", "0", "--rows", "500", "--packed")
    flags += ("--training.tokens_per_pass", "200", "--data.severity", "repetitive=ignore")
    batches = json.loads(cli("data", "preview", *flags, "--json").stdout)["passes"]
    lengths = [[len(row["input_ids"]) for row in batch] for batch in batches]
    assert sorted(length for batch in lengths for length in batch) == sorted(tokens for tokens, _ in lengths_of(UNEVEN))
    assert all(sum(batch) <= 200 for batch in lengths)
    shown = cli("data", "preview", *flags).stdout
    assert f"pass 1: {len(batches[0])} row" in shown
    assert shown.count("each row attends to itself alone") == len(batches)
    refused = cli("data", "preview", *flags[:9], "--no-training.packing")
    assert (refused.exit_code, "no packed passes" in " ".join(refused.stderr.split())) == (Exit.USAGE, True)


def test_the_check_ends_with_the_command_that_trains_on_what_it_was_given(check: Run, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.json", ROWS)
    done = check(path, "--data.validation", "0", "--json")
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("train on them: "))
    assert line.startswith("train on them: loratune sft --")
    assert str(path) in line
    assert line.endswith("--data.validation 0")
    assert "train on them" not in check(write_rows(path, [{"instruction": "a", "output": " "}])).stderr


@pytest.mark.parametrize("command", ["check", "preview"])
def test_rows_without_a_flag_are_those_of_data_train(cli: Run, tmp_path: Path, command: str) -> None:
    rows, others = (write_rows(tmp_path / f"{name}.json", part) for name, part in (("a", ROWS[:5]), ("b", ROWS[5:])))
    given = ("data", command, "--model.base", "tiny-qwen", "--data.validation", "0", "--json")
    flagged = cli(*given, "--data.train", rows, "--data.train", others)
    assert flagged.exit_code == 0, flagged.stderr
    both = (rows, others, "--data.train", rows, "--data.train", others)
    for same in (cli(*given, rows, others), cli(*given[:2], rows, others, *given[2:]), cli(*given, *both)):
        assert (same.exit_code, same.stdout) == (0, flagged.stdout)
    assert cli(*given, others).stdout not in ("", flagged.stdout)
    for unlike in ((others, "--data.train", rows), ("--data.train", rows, others)):
        done = cli(*given, *unlike, env={"COLUMNS": "1000"})
        assert done.exit_code == Exit.USAGE
        assert f"rows are given as {str(others)[:50]}" in done.stderr
        assert f"--data.train {str(rows)[:40]}" in done.stderr
    done = cli(*given, tmp_path / "recipe.yaml")
    assert done.exit_code == Exit.USAGE
    assert "a recipe, not rows; give it with --config" in " ".join(done.stderr.split())


def test_the_command_that_trains_has_every_flag_of_the_check(cli: Run, tmp_path: Path) -> None:
    rows, recipe = write_rows(tmp_path / "my rows.json", ROWS), tmp_path / "recipe.yaml"
    recipe.write_text("model: {base: tiny-qwen}\n", encoding="utf-8")
    flags = ("--no-training.packing", "--data.placeholders", "name=Robin", "--lora.rank=4", "--json")
    done = cli("data", "check", rows, "-c", recipe, *flags, env={"COLUMNS": "1000"})
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("train on them: "))
    trained = cli(*shlex.split(line.partition("loratune ")[2]), "--show", "--json")
    assert trained.exit_code == 0, trained.stderr
    shown = json.loads(trained.stdout)["recipe"]
    assert shown["data"]["train"] == [str(rows)]
    assert (shown["training"]["packing"], shown["lora"]["rank"]) == (False, 4)
    assert shown["data"]["placeholders"] == {"name": "Robin"}
