"""The asserts of test rows: what each means, and what is refused before a model is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loratune.errors import Exit, LoratuneError
from loratune.evaluation import asserts
from loratune.evaluation.asserts import KINDS, Said, read_asserts
from loratune.evaluation.rows_file import read_tests

SCHEMA = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}
CALL = {"name": "weather", "arguments": {"city": "Rome"}}
EXAMPLES: list[tuple[dict[str, Any], Any, Any]] = [
    ({"type": "equals", "value": "Yes."}, " Yes.\n", "Yes"),
    ({"type": "contains", "value": "Rome"}, "In Rome.", "in rome"),
    ({"type": "icontains", "value": "ROME"}, "In Rome.", "In Paris."),
    ({"type": "contains-any", "value": ["a", "b"]}, "b", "c"),
    ({"type": "contains-all", "value": ["a", "b"]}, "ba", "a"),
    ({"type": "starts-with", "value": "Yes"}, "  Yes, but", "Oh yes"),
    ({"type": "regex", "value": r"\d{4}-\d\d"}, "on 2011-05", "on 11-05"),
    ({"type": "number", "value": 1234.5, "within": 0.5}, "2 + 2 is 1,235.", "1,234 or 4"),
    ({"type": "number", "value": -4}, "It is −4.", "It is 4."),
    ({"type": "number", "value": 5}, "It is 3-5", "It is -5"),
    ({"type": "number", "value": -5}, "x=-5", "3-5"),
    ({"type": "is-json"}, '{"a": [1]}', "{'a': 1}"),
    ({"type": "is-json"}, "3", "NaN"),
    ({"type": "is-json", "value": {"multipleOf": 0.5}}, "1.5", "1e400"),
    ({"type": "is-json", "value": SCHEMA}, '{"age": 3}', '{"age": "3"}'),
    ({"type": "tool-call", "value": CALL}, Said("", (CALL,)), Said("", (CALL, CALL))),
    ({"type": "tool-call", "value": {"name": "now"}}, Said("", ({"name": "now", "arguments": {}},)), "now()"),
]


def holds(spec: dict[str, Any], answer: Any) -> bool:
    (one,), problems = read_asserts(spec)
    assert problems == []
    return one.holds(answer if isinstance(answer, Said) else Said(answer))


@pytest.mark.parametrize(
    ("spec", "good", "bad"), EXAMPLES, ids=lambda value: value.get("type") if isinstance(value, dict) else ""
)
def test_an_assert_holds_for_what_it_says_and_its_negation_for_the_rest(
    spec: dict[str, Any], good: Any, bad: Any
) -> None:
    assert holds(spec, good)
    assert not holds(spec, bad)
    negated = {**spec, "type": f"not-{spec['type']}"}
    assert not holds(negated, good)
    assert holds(negated, bad)


def test_every_kind_has_an_example_and_is_in_the_help() -> None:
    from loratune.cli.eval import DETAILS

    assert {spec["type"] for spec, _, _ in EXAMPLES} == set(KINDS)
    assert [kind for kind in KINDS if kind not in DETAILS] == []


def test_an_expression_that_takes_too_long_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asserts, "REGEX_SECONDS", 0.05)
    for kind in ("regex", "not-regex"):
        assert not holds({"type": kind, "value": "(a|aa)+$"}, "a" * 60 + "b")


@pytest.mark.parametrize("place", ["http://127.0.0.1:9/schema.json", "#/nowhere", "#"])
def test_a_schema_fetches_nothing_and_does_not_hold_without_what_it_refers_to(place: str) -> None:
    for kind in ("is-json", "not-is-json"):
        assert not holds({"type": kind, "value": {"$ref": place}}, "{}")


def test_all_that_is_wrong_with_asserts_is_told_at_once(tmp_path: Path) -> None:
    wrong = [
        "contains", {"type": "contain", "value": "a"}, {"type": "contains"}, {"type": "regex", "value": "("},
        {"type": "number", "value": "4"}, {"type": "number", "value": 4, "within": -1},
        {"type": "contains", "value": "a", "threshold": 1}, {"type": "is-json", "value": {"type": "text"}},
        {"type": "contains-any", "value": []}, {"type": "tool-call", "value": {"function": "f"}},
        {"type": "number", "value": 10**400}, {"type": "number", "value": float("nan")},
        {"type": "number", "value": 4, "within": float("inf")}, {"type": "is-json", "value": {"$schema": ["a"]}},
    ]  # fmt: skip
    found, problems = read_asserts(wrong)
    assert found == []
    assert len(problems) == len(wrong)
    path = tmp_path / "tests.jsonl"
    rows = [{"prompt": "a", "assert": wrong[:1]}, {"prompt": "b", "assert": wrong[1]}]
    path.write_text("\n\n".join(map(json.dumps, rows)))  # rows are named by their lines, as data check does
    told = r"(?s)2 asserts.*tests\.jsonl:1: assert 1.*tests\.jsonl:3: assert 1: no type 'contain'"
    with pytest.raises(LoratuneError, match=told) as caught:
        read_tests(str(path), {}, {})
    assert caught.value.exit_code == Exit.DATA


def test_yaml_and_json_lines_give_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "tests.yaml").write_text(
        "tests:\n- prompt: How much is 2+2?\n  assert:\n  - {type: number, value: 4}\n"
        "- prompt: 你好\n  completion: 你好！\n",
        encoding="utf-8",
    )
    lines = [
        {"prompt": "How much is 2+2?", "assert": [{"type": "number", "value": 4}]},
        {"prompt": "你好", "completion": "你好！"},
    ]
    (tmp_path / "tests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    one, other = (read_tests(str(tmp_path / name), {}, {}) for name in ("tests.yaml", "tests.jsonl"))
    assert one.rows == [replace(row, place=f"{tmp_path / 'tests.yaml'} row {row.number}") for row in other.rows]
    assert one.asserts == other.asserts
    assert [row.reference for row in one.rows] == [None, "你好！"]


@pytest.mark.parametrize(
    ("text", "told"),
    [("tests: 3", "holds no list"), ("- {prompt: a", "not valid YAML"), ("- prompt: &x a\n- prompt: *x", "aliases")],
)
def test_yaml_that_is_not_a_list_of_rows_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "tests.yml").write_text(text)
    with pytest.raises(LoratuneError, match=told):
        read_tests(str(tmp_path / "tests.yml"), {}, {})
    with pytest.raises(LoratuneError, match=r"none\.yml: no such file"):
        read_tests(str(tmp_path / "none.yml"), {}, {})
