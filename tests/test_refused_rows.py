"""Rows that a chat template refuses: problems of these rows, told together, unless the template refuses all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_chat_template import CHATML, model_folder
from typer.testing import Result

from loratune.errors import Exit

CLI = Callable[..., Result]
ALTERNATING = (
    "{% for m in messages if m.role != 'system' %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate: ' + m.role) }}{% endif %}{% endfor %}" + CHATML
)
WITHOUT_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('No system here') }}{% endif %}" + CHATML


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch, clean_environment: None) -> None:
    """No message is broken into lines."""
    monkeypatch.setenv("COLUMNS", "1000")


@pytest.fixture
def check(cli: CLI, tmp_path: Path) -> Callable[..., Result]:
    def run(template: str, rows: list[Any], *flags: Any) -> Result:
        if not (tmp_path / "base").exists():
            model_folder(tmp_path / "base", template)
        (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        command = ["data", "check", "--model.base", tmp_path / "base", "--data.train", tmp_path / "rows.json"]
        return cli(*command, "--data.validation", "0", *flags)

    return run


def spoken(*roles: str, number: int = 0) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"{role} {number}"} for role in roles]}


def good(count: int) -> list[dict[str, Any]]:
    return [spoken("user", "assistant", number=number) for number in range(count)]


def test_rows_that_the_template_refuses_are_told_together_with_all_others(check: Callable[..., Result]) -> None:
    rows = [*good(3), spoken("user", "user", "assistant"), {"messages": []}, spoken("user", "assistant", "assistant")]
    done = check(ALTERNATING, [*rows, *good(1)])
    assert done.exit_code == Exit.DATA, done.stderr
    assert "3 of 7 rows cannot be trained on" in done.stderr
    told = [line.partition("rows.json ")[2] for line in done.stderr.splitlines() if "rows.json row" in line]
    refuses = "the tokenizer's chat template refuses the messages"
    assert told == [
        f"row 4: {refuses} user, user, assistant: Roles must alternate: user",
        "row 5: 'messages' is an empty list, not a list of turns",
        f"row 6: {refuses} user, assistant, assistant: Roles must alternate: assistant",
    ]
    assert "--data.on_bad_row skip leaves them out" in done.stderr


def test_refused_rows_are_left_out_where_the_recipe_says_so_also_from_the_cache(check: Callable[..., Result]) -> None:
    rows = [spoken("user", "user", "assistant"), *good(3), spoken("user", "user", "assistant", number=1)]
    for _ in range(2):
        done = check(ALTERNATING, rows, "--data.on_bad_row", "skip", "--json")
        assert done.exit_code == Exit.OK, done.stderr
        report = json.loads(done.stdout)
        assert {one["name"]: one["count"] for one in report["findings"]}["bad_rows"] == 2
        assert report["rows"]["training"]["rows"] == 3
        assert "2 of 5 rows cannot be trained on" in done.stderr
        assert "they are left out" in done.stderr
    few = check(ALTERNATING, rows, "--data.on_bad_row", "skip", "--data.max_bad_rows", "1")
    assert few.exit_code == Exit.DATA
    assert "data.max_bad_rows allows 1" in few.stderr


def test_the_first_rows_of_many_batches_are_named(check: Callable[..., Result]) -> None:
    rows = good(2500)
    for place in (7, 1100, 2400):
        rows[place] = spoken("user", "user", "assistant")
    rows[2] = {"messages": 1}
    done = check(ALTERNATING, rows)
    assert "4 of 2,500 rows" in done.stderr
    assert [f"row {place}:" in done.stderr for place in (3, 8, 1101, 2401)] == [True] * 4


@pytest.mark.parametrize("skips", [True, False])
def test_a_template_that_refuses_every_row_is_at_fault(check: Callable[..., Result], skips: bool) -> None:
    rows = [spoken("system", "user", "assistant", number=number) for number in range(7)]
    done = check(WITHOUT_SYSTEM, [*rows, {"messages": "x"}], *(["--data.on_bad_row", "skip"] if skips else []))
    assert done.exit_code == Exit.MODEL, done.stderr
    assert "the tokenizer's chat template refuses every row that can be read" in done.stderr
    assert "refuses the messages system, user: No system here" in done.stderr
    assert "the template is at fault" in done.stderr


def test_the_recipe_s_system_prompt_is_what_the_template_refuses(check: Callable[..., Result]) -> None:
    done = check(WITHOUT_SYSTEM, good(3), "--prompt.system", "Be brief.")
    assert done.exit_code == Exit.MODEL
    assert "refuses every row" in done.stderr


def test_a_row_that_loses_a_turn_or_has_tools_without_a_place_is_one_bad_row(check: Callable[..., Result]) -> None:
    called = {"type": "function", "function": {"name": "add", "arguments": {}}}
    with_tools = spoken("user", "assistant") | {"tools": [{"name": "add", "parameters": {}}]}
    with_call = spoken("user", "assistant")
    with_call["messages"][1] |= {"content": "", "tool_calls": [called]}
    lossy = (
        "{% for m in messages %}{% if m.role != 'system' %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    done = check(lossy, [*good(2), with_tools, with_call, spoken("user", "system", "assistant")])
    assert done.exit_code == Exit.DATA
    assert "3 of 5 rows cannot be trained on" in done.stderr
    assert "row 3: the chat template (chat) does not support tools, and some are given" in done.stderr
    assert "row 5: the chat template does not render a message of system" in done.stderr


def test_a_row_that_is_refused_when_shortened_is_a_bad_row(check: Callable[..., Result]) -> None:
    long = spoken("user", "assistant", "user", "assistant")
    long["messages"][0]["content"] = "word " * 200
    opening = (
        "{% if messages[0].content == 'user 0' and messages|length == 3 or messages[0].content == 'again' %}"
        "{{ raise_exception('Begin otherwise') }}{% endif %}" + CHATML
    )
    long["messages"][2]["content"] = "again"
    flags = ("--training.max_length", "64", "--data.truncation_strategy", "truncate_prompt")
    done = check(opening, [*good(2), long], *flags)
    assert done.exit_code == Exit.DATA, done.stderr
    assert "1 of 3 rows cannot be trained on" in done.stderr
    assert "Begin otherwise" in done.stderr
