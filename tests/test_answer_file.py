"""`loratune infer --input`: rows of all kinds, scores, stops at any place, and what is refused before loading."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from conftest import ROWS, TINY_QWEN
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from loratune.cli.app import app
from loratune.errors import Exit, LoratuneError
from loratune.generation.batch.answer_file import AnswerFile, json_line, open_answers
from loratune.generation.batch.questions import read_questions
from loratune.model.hardware import detect_hardware, resolve_dtype

Cli = Callable[..., Result]
QUESTIONS = ["Who are you?", "What is 2+3?", "What colour is a banana? Think well before you answer.", "你是谁？"]


def write_questions(path: Path) -> Path:
    path.write_text("".join(json.dumps({"prompt": text, "id": n}) + "\n" for n, text in enumerate(QUESTIONS)))
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Four prompts, the longest neither first nor last."""
    return write_questions(tmp_path / "rows.jsonl")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same prompts as rows.jsonl, and their answers as a.jsonl."""
    folder = tmp_path_factory.mktemp("undisturbed")
    rows = write_questions(folder / "rows.jsonl")
    command = ["infer", "--model", "tiny-qwen", "--input", str(rows), "--output", str(folder / "a.jsonl")]
    assert CliRunner().invoke(app, command).exit_code == 0
    return folder


@pytest.fixture
def complete(undisturbed: Path, rows: Path) -> tuple[tuple[Any, ...], Path]:
    """A command that has been carried out, and its output."""
    for name in ("a.jsonl", "a.jsonl.report.json"):
        shutil.copy(undisturbed / name, rows.with_name(name))
    return ("infer", "--model", "tiny-qwen", "--input", rows, "--output", rows.with_name("a.jsonl")), rows.with_name(
        "a.jsonl"
    )


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may load a model."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("loratune.engine.engine.load_engine", refuse)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def says(result: Result, words: str) -> bool:
    """Whether words are in what people see, wherever its lines are broken."""
    return "".join(words.split()) in "".join(result.stderr.split())


def greedy(folder: Path, turns: list[dict[str, str]], adapter: Path | None = None, tokens: int = 60) -> str:
    """The answer of plain transformers and PEFT."""
    tokenizer, model = model_of(folder, adapter)
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@lru_cache
def model_of(folder: Path, adapter: Path | None) -> tuple[Any, Any]:
    """Tokenizer and model, in the type that loratune takes by itself, or in that of the adapter's training."""
    dtype = resolve_dtype("auto", detect_hardware()) if folder == TINY_QWEN else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return AutoTokenizer.from_pretrained(folder), PeftModel.from_pretrained(model, adapter) if adapter else model


def perplexity(folder: Path, question: str, answer: str, adapter: Path | None = None) -> float:
    """exp of transformers' own mean loss over the answer and its end token."""
    tokenizer, model = model_of(folder, adapter)
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    ids = torch.tensor([[*prompt, *tokenizer(answer + "<|im_end|>").input_ids]])
    labels = ids.clone()
    labels[0, : len(prompt)] = -100
    with torch.inference_mode():
        return math.exp(model(input_ids=ids, labels=labels).loss)


# --- rows and answers ---


def test_answers_are_those_of_plain_transformers_in_the_rows_order_with_their_columns(
    cli: Cli, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    result = cli("infer", "--model", "tiny-qwen", "--input", rows, "--output", output, "--json")
    assert result.exit_code == 0, result.stderr
    found = lines_of(output)
    for number, (line, question) in enumerate(zip(found, QUESTIONS, strict=True)):
        assert list(line) == ["prompt", "id", "row", "answer", "finish", "tokens"]
        assert (line["prompt"], line["id"], line["row"], line["finish"]) == (question, number, number + 1, "stop")
        assert line["answer"] == greedy(TINY_QWEN, [{"role": "user", "content": question}])
    summary = json.loads(result.stdout)
    assert (summary["rows"], summary["answered"], summary["kept"], summary["finish"]) == (4, 4, 0, {"stop": 4})
    assert summary["tokens"] == sum(line["tokens"] for line in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "answers.jsonl", "answers.jsonl.report.json", "rows.jsonl",
    ]  # fmt: skip


def test_system_prompt_and_stop_text_and_length_are_heeded(cli: Cli, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    flags = ("--system", "Your name is Kim.", "--stop", ",", "--max-new-tokens", 5)
    assert cli("infer", "--model", "tiny-qwen", "--input", rows, "--output", output, *flags).exit_code == 0
    turns = [{"role": "system", "content": "Your name is Kim."}, {"role": "user", "content": QUESTIONS[0]}]
    first = lines_of(output)[0]
    assert first["answer"] == greedy(TINY_QWEN, turns, tokens=5).partition(",")[0]
    assert first["tokens"] <= 5
    assert {line["finish"] for line in lines_of(output)} <= {"stop", "length"}


def test_every_row_draws_its_own_numbers_and_a_seed_repeats_them(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Tell me about rivers and dogs"}\n' * 4)

    def draw(name: str, seed: int) -> list[str]:
        flags = ("--temperature", 3, "--max-new-tokens", 20, "--seed", seed, "--output", tmp_path / name)
        assert cli("infer", "--model", "tiny-qwen", "--input", tmp_path / "rows.jsonl", *flags).exit_code == 0
        return [line["answer"] for line in lines_of(tmp_path / name)]

    first = draw("a.jsonl", 1)
    assert len(set(first)) > 1
    assert draw("b.jsonl", 1) == first
    assert draw("c.jsonl", 2) != first


FILES: dict[str, tuple[str, list[tuple[list[str], str | None]]]] = {
    "alpaca.json": (
        '[{"instruction": "Say", "input": "hi", "output": "ho", "system": "S"}, {"instruction": "Go", "output": " "}]',
        [(["S", "Say\nhi"], "ho"), (["Go"], None)],
    ),
    "alpaca_without_answers.jsonl": ('{"instruction": "Say"}\n{"instruction": "Go", "output": null}\n',
                                     [(["Say"], None), (["Go"], None)]),
    "prompts.csv": ('prompt,note\n"a, b",x\nc,\n', [(["a, b"], None), (["c"], None)]),
    "pairs.jsonl": ('{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n', [(["a"], "b"), (["c"], None)]),
    "queries.jsonl": ('{"query": "a"}\n{"query": "c", "response": "d"}\n', [(["a"], None), (["c"], "d")]),
    "messages.jsonl": (
        '{"messages": [{"role": "user", "content": "a"}]}\n'
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}\n'
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},'
        ' {"role": "user", "content": "c"}]}\n',
        [(["a"], None), (["a"], "b"), (["a", "b", "c"], None)],
    ),
    "sharegpt.json": (
        '[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},'
        ' {"conversations": [{"from": "human", "value": "c"}], "system": "S"}]',
        [(["a"], "b"), (["S", "c"], None)],
    ),
    "other_keys.json": (
        '[{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},'
        ' {"conversations": [{"role": "user", "content": "c"}]}]',
        [(["a"], "b"), (["c"], None)],
    ),
    "other_keys.jsonl": (
        '{"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n'
        '{"messages": [{"from": "human", "value": "c"}], "system": "S"}\n',
        [(["a"], "b"), (["S", "c"], None)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_rows_of_every_format_become_questions_with_or_without_an_answer(tmp_path: Path, name: str) -> None:
    text, expected = FILES[name]
    (tmp_path / name).write_text(text)
    read = read_questions(str(tmp_path / name), {}, {})
    assert [([m["content"] for m in row.messages], row.reference) for row in read.rows] == expected
    assert [row.number for row in read.rows] == list(range(1, len(expected) + 1))


def test_a_file_of_which_no_row_can_be_read_is_told_with_its_columns(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("frage,antwort\nWie?,So.\nWo?,Hier.\n")
    with pytest.raises(LoratuneError, match=r"2 of 2 rows (.|\n)*its columns begin with 'frage', 'antwort', and"):
        read_questions(str(tmp_path / "rows.csv"), {}, {})
    assert len(read_questions(str(tmp_path / "rows.csv"), {"instruction": "frage"}, {}).rows) == 2


def test_columns_and_placeholders_of_the_adapter_s_recipe_are_known(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "Are you {{name}}?", "a": "Yes, {{NAME}}."}\n')
    (row,) = read_questions(
        str(tmp_path / "rows.jsonl"), {"instruction": "q", "output": "a"}, {"name": "Kim", "author": "Lee"}
    ).rows
    assert (row.messages[0]["content"], row.reference) == ("Are you Kim?", "Yes, Kim.")
    assert row.fields == {"q": "Are you {{name}}?", "a": "Yes, {{NAME}}."}


BAD_FILES = {
    "not_json.jsonl": ('{"prompt": "a"}\n{"prompt": \n', "not_json.jsonl:2"),
    "not_text.jsonl": ('{"prompt": "a"}\n{"prompt": 5}\n', "not_text.jsonl:2: 'prompt' is a number, not a text"),
    "missing.jsonl": ('{"prompt": "a"}\n{"question": "b"}\n', "missing.jsonl:2: 'prompt' is missing or empty"),
    "list.json": ('[["a"], {"prompt": "b"}]', "list.json row 1: is a list, not an object"),
    "answer_first.jsonl": ('{"messages": [{"role": "assistant", "content": "a"}]}', "message 1 is an answer"),
    "tools.jsonl": (
        '{"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]}',
        "tools.jsonl:1: the chat template (chat) does not support tools",
    ),
    "placeholder.jsonl": ('{"prompt": "Are you {{ name }}?"}', "holds {{name}}, for which"),
    "unknown.csv": ("question,answer\na,b\n", "'instruction' is missing or empty"),
    "empty.jsonl": ("", "0 rows"),
}  # fmt: skip


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_rows_are_told_with_their_places_before_the_model_is_loaded(cli: Cli, tmp_path: Path, name: str) -> None:
    text, words = BAD_FILES[name]
    (tmp_path / name).write_text(text)
    result = cli("infer", "--model", "tiny-qwen", "--input", tmp_path / name, "--output", tmp_path / "a.jsonl")
    assert result.exit_code == Exit.DATA, result.stderr
    assert says(result, words)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_of_many_bad_rows_five_are_shown_and_all_are_counted(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n' + '{"prompt": 1}\n' * 9)
    result = cli("infer", "--model", "tiny-qwen", "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "a.jsonl")
    assert says(result, "9 of 10 rows cannot be answered")
    assert result.stderr.count("'prompt' is a number") == 5
    assert "… and 4 more" in result.stderr


def test_a_column_that_an_answer_s_name_would_hide_is_kept_under_another(cli: Cli, tmp_path: Path) -> None:
    row = {"prompt": "Who are you?", "answer": "a", "row": 7, "input_row": 8}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    output = tmp_path / "a.jsonl"
    result = cli("infer", "--model", "tiny-qwen", "--input", tmp_path / "rows.jsonl", "--output", output)
    (line,) = lines_of(output)
    assert (line["input_answer"], line["input_input_row"], line["input_row"], line["row"]) == ("a", 7, 8, 1)
    assert "tiny-qwen" in line["answer"]
    assert says(result, "column answer is written as input_answer")


def test_a_question_that_does_not_fit_is_reported_and_the_others_are_answered(cli: Cli, rows: Path) -> None:
    with rows.open("a") as file:
        for text in ("long ", "longer "):
            file.write("\n" + json.dumps({"prompt": text * 3000, "completion": "b"}) + "\n")
    output = rows.with_name("a.jsonl")
    result = cli("infer", "--model", "tiny-qwen", "--input", rows, "--output", output, "--metrics")
    assert result.exit_code == 0, result.stderr
    last = lines_of(output)[-1]
    assert (last["answer"], last["finish"], last["tokens"]) == ("", "too_long", 0)
    assert last["metrics"]["exact_match"] is False
    assert [line["finish"] for line in lines_of(output)[:-2]] == ["stop"] * 4
    assert says(result, f"2 rows of 6 did not fit into the context and got no answer: {rows}:6, :8")


@pytest.fixture
def alternating(tmp_path: Path) -> Path:
    """A base whose template takes questions and answers in turn only."""
    folder = shutil.copytree(TINY_QWEN, tmp_path / "alternating")
    own = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages if m.role != 'system' %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}" + own
    )
    return folder


def write_spoken(path: Path, *rows: str) -> Path:
    """Rows of messages, whose speakers are u for a user and a for an assistant."""
    roles = {"u": "user", "a": "assistant"}
    told = [[{"role": roles[one], "content": f"{QUESTIONS[0]} {n}"} for one in row] for n, row in enumerate(rows)]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in told))
    return path


def test_rows_that_the_template_refuses_get_an_error_and_all_others_an_answer(
    cli: Cli, alternating: Path, tmp_path: Path
) -> None:
    rows, output = write_spoken(tmp_path / "rows.jsonl", "u", "uu", "uau", "uaau"), tmp_path / "a.jsonl"
    command = ("infer", "--model", alternating, "--input", rows, "--output", output, "--max-new-tokens", "4", "--json")
    done = cli(*command)
    assert done.exit_code == Exit.DATA, done.stderr
    found = lines_of(output)
    assert [line["finish"] == "refused" for line in found] == [False, True, False, True]
    assert all(("error" in line) == (line["finish"] == "refused") for line in found)
    assert all("Roles must alternate" in found[place]["error"] for place in (1, 3))
    assert [line["answer"] for line in found[1::2]] == ["", ""]
    assert all(line["answer"] for line in found[::2])
    summary = json.loads(done.stdout)
    assert [(one["row"], one["place"]) for one in summary["refused"]] == [(2, f"{rows}:2"), (4, f"{rows}:4")]
    assert summary["finish"]["refused"] == 2
    assert says(done, "2 of 4 rows could not be asked and got no answer")
    assert says(done, f"{rows}:4: the tokenizer's chat template refuses the messages user, assistant, assistant, user")


def test_a_complete_file_with_refused_rows_says_so_again(
    cli: Cli, alternating: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, output = write_spoken(tmp_path / "rows.jsonl", "ua", "uua"), tmp_path / "a.jsonl"
    command = ("infer", "--model", alternating, "--input", rows, "--output", output, "--max-new-tokens", "4", "--json")
    assert cli(*command).exit_code == Exit.DATA
    scored = cli(*command, "--metrics")
    assert scored.exit_code == Exit.DATA, scored.stderr
    assert json.loads(scored.stdout)["answered"] == 0
    assert [line["metrics"]["exact_match"] for line in lines_of(output)] == [False, False]
    assert "Roles must alternate" in lines_of(output)[1]["error"]
    monkeypatch.setattr("loratune.engine.engine.load_engine", None)
    again = cli(*command)
    assert again.exit_code == Exit.DATA
    assert says(again, "1 of 2 rows could not be asked")
    assert [one["row"] for one in json.loads(again.stdout)["refused"]] == [2]


def test_a_template_that_refuses_every_row_is_at_fault(cli: Cli, alternating: Path, tmp_path: Path) -> None:
    rows, output = write_spoken(tmp_path / "rows.jsonl", "uu", "uaau"), tmp_path / "a.jsonl"
    done = cli("infer", "--model", alternating, "--input", rows, "--output", output)
    assert done.exit_code == Exit.MODEL
    assert says(done, "no row could be asked")


def test_a_fault_of_the_engine_is_not_taken_for_a_row_s(
    cli: Cli, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise LoratuneError("the engine is broken", Exit.IO)

    monkeypatch.setattr("loratune.engine.engine.Engine.submit", refuse)
    done = cli("infer", "--model", "tiny-qwen", "--input", rows, "--output", tmp_path / "a.jsonl")
    assert done.exit_code == Exit.IO
    assert says(done, "the engine is broken")


def test_json_holds_what_no_encoding_can_write() -> None:
    assert json.loads(json_line({"a": "\ud800", "b": "é"})) == {"a": "\ud800", "b": "é"}
    assert json_line({"a": "é"}) == '{"a": "é"}\n'.encode()
    assert json_line({"day of a Parquet file": date(2024, 2, 29)}) == b'{"day of a Parquet file": "2024-02-29"}\n'


# --- scores ---


def test_scores_are_those_of_the_libraries_and_of_plain_transformers(cli: Cli, tmp_path: Path) -> None:
    pairs = [("Who are you?", "I am tiny-qwen."), ("你是谁？", "我是小模型。"), ("What is 2+3?", "")]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("instruction", "output"), *pairs])
    output = tmp_path / "a.jsonl"
    command = ("infer", "--model", "tiny-qwen", "--input", tmp_path / "rows.csv", "--output", output)
    result = cli(*command, "--metrics", "--json")
    assert result.exit_code == 0, result.stderr
    found = lines_of(output)
    assert "metrics" not in found[2]
    for line, (question, answer) in zip(found[:2], pairs, strict=False):
        expected = sacrebleu.sentence_bleu(line["answer"], [answer], tokenize="zh").score
        assert line["metrics"]["bleu"] == pytest.approx(expected, abs=1e-3)
        assert line["metrics"]["perplexity"] == pytest.approx(perplexity(TINY_QWEN, question, answer), rel=5e-3)
    sums = json.loads(result.stdout)["metrics"]["answers"]
    whole = sacrebleu.corpus_bleu([line["answer"] for line in found[:2]], [[a for _, a in pairs[:2]]], tokenize="zh")
    assert sums["bleu"] == pytest.approx(whole.score)
    assert (sums["rows"], sums["rows_with_perplexity"]) == (2, 2)
    assert "ROUGE-L" in result.stderr


def test_base_and_adapter_are_scored_side_by_side(cli: Cli, short_run: Path, random_qwen: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:2]))
    output = tmp_path / "a.jsonl"
    command = ("infer", "--adapter", f"mine={short_run}", "--input", tmp_path / "rows.json", "--output", output)
    result = cli(*command, "--metrics", "--no-adapter", "--max-new-tokens", 8)
    assert result.exit_code == 0, result.stderr
    assert re.search(r"mine +base", result.stderr)
    for line, row in zip(lines_of(output), ROWS, strict=False):
        turns = [{"role": "user", "content": row["instruction"]}]
        adapter = short_run / "adapter"
        assert line["answer"] == greedy(random_qwen, turns, adapter, tokens=8)
        assert line["base"]["answer"] == greedy(random_qwen, turns, tokens=8)
        expected = perplexity(random_qwen, row["instruction"], row["output"], adapter)
        assert line["metrics"]["perplexity"] == pytest.approx(expected, rel=1e-3)
        expected = perplexity(random_qwen, row["instruction"], row["output"])
        assert line["base"]["metrics"]["perplexity"] == pytest.approx(expected, rel=1e-3)
        assert line["base"]["metrics"]["perplexity"] > line["metrics"]["perplexity"]


@pytest.mark.slow
def test_base_alone_answers_without_the_adapter(
    cli: Cli, short_run: Path, random_qwen: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a.jsonl"
    command = (
        "infer",
        "--adapter",
        short_run,
        "--no-adapter",
        "--input",
        rows,
        "--output",
        output,
        "--max-new-tokens",
        8,
    )
    assert cli(*command).exit_code == 0
    turns = [{"role": "user", "content": QUESTIONS[0]}]
    assert lines_of(output)[0]["answer"] == greedy(random_qwen, turns, tokens=8)


@pytest.mark.usefixtures("no_model")
def test_metrics_need_an_answer_to_compare_with(cli: Cli, rows: Path) -> None:
    flags = ("--metrics", "--output", rows.with_name("a.jsonl"))
    result = cli("infer", "--model", "tiny-qwen", "--input", rows, *flags)
    assert result.exit_code == Exit.DATA
    assert says(result, "none has one")


# --- stops and resuming ---


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_keeps_what_is_finished_and_the_next_call_makes_the_rest(
    cli: Cli, rows: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    output = rows.with_name("a.jsonl")
    command = ("infer", "--model", "tiny-qwen", "--input", rows, "--json", "--output")
    add = AnswerFile.add

    def add_and_kill(self: AnswerFile, *arguments: Any) -> None:
        add(self, *arguments)
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(AnswerFile, "add", add_and_kill)
        stopped = cli(*command, output)
    assert stopped.exit_code == 128 + number
    assert says(stopped, "the same command resumes")
    assert not output.exists()
    kept = len(lines_of(rows.with_name("a.jsonl.part"))) - 1
    assert 1 <= kept < len(QUESTIONS)

    resumed = cli(*command, output)
    assert resumed.exit_code == 0, resumed.stderr
    summary = json.loads(resumed.stdout)
    assert (summary["kept"], summary["answered"]) == (kept, len(QUESTIONS) - kept)
    assert output.read_bytes() == (undisturbed / "a.jsonl").read_bytes()
    assert not rows.with_name("a.jsonl.part").exists()


@pytest.mark.slow
def test_a_killed_process_is_continued(cli: Cli, random_qwen: Path, tmp_path: Path) -> None:
    path, whole, output = (tmp_path / name for name in ("rows.jsonl", "whole.jsonl", "a.jsonl"))
    path.write_text("".join(json.dumps({"prompt": f"Count to {n}"}) + "\n" for n in range(300)))
    command = ["infer", "--model", str(random_qwen), "--input", str(path), "--max-new-tokens", "40", "--json"]
    process = subprocess.Popen([sys.executable, "-m", "loratune", *command, "--output", str(output)])
    part = tmp_path / "a.jsonl.part"
    end = time.monotonic() + 120
    while (not part.exists() or part.read_bytes().count(b"\n") < 5) and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not output.exists()
    with part.open("ab") as file:
        file.write(b'{"row": 299, "kind": "answer", "ans')

    summary = json.loads(cli(*command, "--output", output).stdout)
    assert summary["kept"] >= 4
    assert summary["kept"] + summary["answered"] == 300
    assert cli(*command, "--output", whole).exit_code == 0
    assert output.read_bytes() == whole.read_bytes()


def part_file(output: Path, about: dict[str, Any], results: int) -> Path:
    with open_answers(output, about, overwrite=False) as file:
        for row in range(results):
            file.add(row, "answer", {"answer": f"é{row}"})
        return file.part


def test_a_half_written_line_is_dropped_and_nothing_else(tmp_path: Path) -> None:
    part = part_file(tmp_path / "a.jsonl", {"x": 1}, 3)
    whole = part.read_bytes()
    for cut in range(len(whole.splitlines(keepends=True)[0]), len(whole)):
        part.write_bytes(whole[:cut])
        with open_answers(tmp_path / "a.jsonl", {"x": 1}, overwrite=False) as file:
            kept = whole[:cut].count(b"\n") - 1
            assert file.count("answer") == kept
            assert [file.read(row, "answer") for row in range(kept)] == [{"answer": f"é{row}"} for row in range(kept)]
            file.add(kept, "answer", {"answer": f"é{kept}"})
        assert part.read_bytes() == b"".join(whole.splitlines(keepends=True)[: kept + 2])


def test_a_hole_behind_the_results_is_dropped_without_being_held_in_memory(tmp_path: Path) -> None:
    part = part_file(tmp_path / "a.jsonl", {"x": 1}, 2)
    whole = part.read_bytes()
    with part.open("r+b") as file:
        file.truncate(20 * 2**30)
    tracemalloc.start()
    with open_answers(tmp_path / "a.jsonl", {"x": 1}, overwrite=False) as answers:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert answers.count("answer") == 2
    assert peak < 100 * 2**20
    assert part.read_bytes() == whole


def test_a_part_file_that_is_all_hole_is_not_touched(tmp_path: Path) -> None:
    part = tmp_path / "a.jsonl.part"
    with part.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(LoratuneError, match="was not written by loratune or was changed since"):
        part_file(tmp_path / "a.jsonl", {"x": 1}, 1)
    assert part.stat().st_size == 2**30


def test_a_half_written_first_line_is_begun_again_and_a_foreign_file_is_not_touched(tmp_path: Path) -> None:
    part = part_file(tmp_path / "a.jsonl", {"x": 1}, 1)
    whole = part.read_bytes()
    part.write_bytes(whole[:20])
    assert part_file(tmp_path / "a.jsonl", {"x": 1}, 1).read_bytes() == whole

    part.write_bytes(b"somebody's own\n")
    with pytest.raises(LoratuneError, match="was not written by loratune or was changed since"):
        part_file(tmp_path / "a.jsonl", {"x": 1}, 1)
    assert part.read_bytes() == b"somebody's own\n"


def test_a_part_without_a_result_vanishes(tmp_path: Path) -> None:
    assert not part_file(tmp_path / "a.jsonl", {"x": 1}, 0).exists()


def test_of_two_processes_one_writes(tmp_path: Path) -> None:
    with open_answers(tmp_path / "a.jsonl", {"x": 1}, overwrite=False):
        with pytest.raises(LoratuneError, match="by another process") as caught:
            part_file(tmp_path / "a.jsonl", {"x": 1}, 1)
        assert caught.value.exit_code == Exit.USAGE


def test_a_full_disk_is_one_message_and_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "a.jsonl"

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> int:
            if len(data) > 5:
                return int(self.file.write(data[:5]))
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            self.file.close()

    with open_answers(output, {"x": 1}, overwrite=False) as file:
        file.add(1, "answer", {"answer": "a"})
        monkeypatch.setattr(file, "_file", Full(file._file))
        with pytest.raises(LoratuneError, match="No space left") as caught:
            file.add(2, "answer", {"answer": "b"})
    assert caught.value.exit_code == Exit.IO
    with open_answers(output, {"x": 1}, overwrite=False) as file:
        assert (file.has(1, "answer"), file.has(2, "answer")) == (True, False)


def test_a_failure_while_answering_keeps_what_is_finished(
    cli: Cli, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = rows.with_name("a.jsonl")
    add = AnswerFile.add

    def add_one(self: AnswerFile, *arguments: Any) -> None:
        if self.count("answer"):
            raise LoratuneError("the disk is full", Exit.IO)
        add(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(AnswerFile, "add", add_one)
        failed = cli("infer", "--model", "tiny-qwen", "--input", rows, "--output", output)
    assert failed.exit_code == Exit.IO
    result = cli("infer", "--model", "tiny-qwen", "--input", rows, "--output", output, "--json")
    assert json.loads(result.stdout)["kept"] == 1


# --- complete files, and what has changed since ---


def test_a_complete_file_is_left_as_it_is_without_loading_a_model(
    cli: Cli, complete: tuple[tuple[Any, ...], Path], request: pytest.FixtureRequest
) -> None:
    command, output = complete
    request.getfixturevalue("no_model")
    before = output.read_bytes()
    result = cli(*command, "--json")
    assert result.exit_code == 0
    assert says(result, "is complete: 4 rows")
    assert json.loads(result.stdout)["answered"] == 0
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--temperature", 1), "temperature: 0.0 there, 1.0 now"),
        (("--system", "x"), 'system: null there, "x" now'),
        (("--stop", "x"), 'stop: [] there, ["x"] now'),
    ],
)
def test_other_settings_are_refused_with_the_differences_unless_the_file_may_be_replaced(
    cli: Cli, complete: tuple[tuple[Any, ...], Path], flags: tuple[Any, ...], words: str
) -> None:
    command, output = complete
    before = output.read_bytes()
    result = cli(*command, *flags)
    assert result.exit_code == Exit.USAGE
    assert says(result, words)
    assert output.read_bytes() == before
    assert cli(*command, *flags, "--overwrite").exit_code == 0


def test_changed_rows_and_another_model_are_refused(
    cli: Cli, complete: tuple[tuple[Any, ...], Path], rows: Path, random_qwen: Path
) -> None:
    command, _ = complete
    other = cli(*command, "--model", random_qwen)
    assert other.exit_code == Exit.USAGE
    assert says(other, "model:")
    rows.write_text(rows.read_text().replace("banana", "cherry"))
    changed = cli(*command)
    assert changed.exit_code == Exit.USAGE
    assert says(changed, "rows:")


def test_an_unfinished_file_of_other_settings_is_refused_too(cli: Cli, rows: Path) -> None:
    output = rows.with_name("a.jsonl")
    part = part_file(output, {"temperature": 0.0}, 1)
    result = cli("infer", "--model", "tiny-qwen", "--input", rows, "--output", output)
    assert result.exit_code == Exit.USAGE
    assert says(result, "max_new_tokens: null there, 512 now")
    assert part.exists()
    assert cli("infer", "--model", "tiny-qwen", "--input", rows, "--output", output, "--overwrite").exit_code == 0
    assert not part.exists()


def test_a_file_that_was_edited_or_is_somebody_s_own_is_not_replaced(
    cli: Cli, complete: tuple[tuple[Any, ...], Path]
) -> None:
    command, output = complete
    output.write_text("mine\n")
    result = cli(*command)
    assert result.exit_code == Exit.USAGE
    assert says(result, "--overwrite")
    assert output.read_text() == "mine\n"


@pytest.mark.slow
def test_an_overwriting_call_that_was_stopped_is_continued_by_the_same_command_without_the_flag(
    cli: Cli, complete: tuple[tuple[Any, ...], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, _ = complete
    add = AnswerFile.add

    def add_and_kill(self: AnswerFile, *arguments: Any) -> None:
        add(self, *arguments)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(AnswerFile, "add", add_and_kill)
        assert cli(*command, "--overwrite").exit_code == 130
    result = cli(*command, "--json")
    assert json.loads(result.stdout)["answered"] in (1, 2, 3)


def test_scores_are_added_to_a_complete_file_without_answering_again(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:3]))
    output = tmp_path / "a.jsonl"
    command = ("infer", "--model", "tiny-qwen", "--input", tmp_path / "rows.json", "--output", output, "--json")
    assert cli(*command).exit_code == 0
    before = lines_of(output)
    scored = json.loads(cli(*command, "--metrics").stdout)
    assert (scored["answered"], scored["kept"], scored["metrics"]["answers"]["rows"]) == (0, 3, 3)
    after = lines_of(output)
    assert [{key: line[key] for key in line if key != "metrics"} for line in after] == before
    assert all(line["metrics"]["perplexity"] > 1 for line in after)
    again = json.loads(cli(*command).stdout)
    assert again["metrics"] == scored["metrics"]


# --- places ---


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("input_name", "output_name", "words"),
    [
        ("rows.jsonl", "rows.jsonl", "would replace the rows"),
        ("rows.jsonl", "./x/../rows.jsonl", "would replace the rows"),
        ("a.jsonl.part", "a.jsonl", "would replace the rows"),
        ("rows.jsonl", "x", "is a folder"),
        ("rows.jsonl", "missing/a.jsonl", "there is no folder"),
        ("rows.jsonl", "", "--output . is a folder; give a file"),
        ("rows.jsonl", "/dev/null", "is not a regular file"),
        ("rows.jsonl#2", "a.jsonl", "remove the # and what follows it"),
    ],
)
def test_places_that_do_not_go_are_refused_before_the_model_is_loaded(
    cli: Cli, rows: Path, monkeypatch: pytest.MonkeyPatch, input_name: str, output_name: str, words: str
) -> None:
    monkeypatch.chdir(rows.parent)
    Path("x").mkdir()
    Path("a.jsonl.part").write_bytes(rows.read_bytes())
    if input_name.endswith(".part"):
        Path("rows.jsonl").unlink()
        Path("rows.jsonl").symlink_to("a.jsonl.part")
        input_name = "rows.jsonl"
    result = cli("infer", "--model", "tiny-qwen", "--input", input_name, "--output", output_name)
    assert result.exit_code == Exit.USAGE, result.stderr
    assert says(result, words)


@pytest.mark.usefixtures("no_model")
def test_an_unwritable_place_is_told_before_the_model_is_loaded(cli: Cli, rows: Path) -> None:
    result = cli("infer", "--model", "tiny-qwen", "--input", rows, "--output", rows.with_name("a" * 300))
    assert result.exit_code == Exit.IO
    assert says(result, "cannot be written")
    assert "Traceback" not in result.stderr
