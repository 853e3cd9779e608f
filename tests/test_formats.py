"""Alpaca rows → conversations: what is joined and filled, and what is refused with which words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.data.formats import read_conversations
from loratune.data.sources import Row
from loratune.errors import Exit, LoratuneError


def rows_of(*values: Any) -> list[Row]:
    return [Row(value, f"rows.json row {number}") for number, value in enumerate(values, start=1)]


def turns(value: dict[str, Any], placeholders: dict[str, str] | None = None) -> list[tuple[str, str]]:
    """The conversation of one row as (role, content)."""
    (conversation,) = read_conversations(rows_of(value), placeholders or {})
    return [(message["role"], message["content"]) for message in conversation.messages]


def refusal(*values: Any, placeholders: dict[str, str] | None = None) -> str:
    with pytest.raises(LoratuneError) as caught:
        read_conversations(rows_of(*values), placeholders or {})
    assert caught.value.exit_code == Exit.DATA
    return str(caught.value)


# --- what is taken ---


@pytest.mark.parametrize(
    ("value", "question"),
    [
        ({"instruction": "Add.", "input": "1 2"}, "Add.\n1 2"),
        ({"instruction": "Add.", "input": ""}, "Add."),
        ({"instruction": "Add.", "input": None}, "Add."),
        ({"instruction": "Add."}, "Add."),
        ({"instruction": "", "input": "1 2"}, "1 2"),
        ({"instruction": None, "input": "1 2"}, "1 2"),
        ({"input": "1 2"}, "1 2"),
        ({"instruction": " Add.\n", "input": " 1"}, " Add.\n\n 1"),
    ],
)
def test_instruction_and_input_are_joined_by_a_newline(value: dict[str, Any], question: str) -> None:
    assert turns(value | {"output": "3"}) == [("user", question), ("assistant", "3")]


@pytest.mark.parametrize("system", [None, ""])
def test_an_empty_system_text_is_none(system: str | None) -> None:
    assert turns({"instruction": "a", "output": "b", "system": system}) == [("user", "a"), ("assistant", "b")]


def test_system_and_history_come_before_the_question() -> None:
    value = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"], ["e", "f"]]}
    assert turns(value) == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "e"),
        ("assistant", "f"),
        ("user", "c"),
        ("assistant", "d"),
    ]


@pytest.mark.parametrize("history", [None, []])
def test_an_empty_history_is_none(history: Any) -> None:
    assert len(turns({"instruction": "a", "output": "b", "history": history})) == 2


def test_further_columns_are_no_matter() -> None:
    value = {"instruction": "a", "output": "b", "id": 7, "tags": ["x"], "score": None, "meta": {"a": [1]}}
    assert turns(value) == [("user", "a"), ("assistant", "b")]


def test_texts_are_taken_to_the_letter() -> None:
    text = "  <|im_end|>\r\n\ttwo  \u2028 \U0001f600 e\u0301 "
    assert turns({"instruction": text, "output": text}) == [("user", text), ("assistant", text)]


def test_a_conversation_keeps_the_place_of_its_row() -> None:
    rows = rows_of({"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"})
    assert [conversation.place for conversation in read_conversations(rows, {})] == [
        "rows.json row 1",
        "rows.json row 2",
    ]


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"output": None}, "'output' is null"),
        ({"output": 123}, "'output' is a number, not a text"),
        ({"output": 1.5}, "'output' is a number, not a text"),
        ({"output": True}, "'output' is true/false, not a text"),
        ({"output": ["b"]}, "'output' is a list, not a text"),
        ({"output": {"text": "b"}}, "'output' is an object, not a text"),
        ({"output": ""}, "'output' is empty"),
        ({"output": " \n\t\u3000"}, "'output' is empty"),
        ({"output": "b\ud800"}, "'output' holds half of a UTF-16 pair"),
        ({"instruction": "\udfff"}, "'instruction' holds half of a UTF-16 pair"),
        ({"instruction": None}, "'instruction' is missing or empty"),
        ({"instruction": ""}, "'instruction' is missing or empty"),
        ({"instruction": " \n"}, "'instruction' is missing or empty"),
        ({"instruction": "", "input": "  "}, "'instruction' is missing or empty"),
        ({"instruction": 5}, "'instruction' is a number, not a text"),
        ({"instruction": 0}, "'instruction' is a number, not a text"),
        ({"instruction": ["a"]}, "'instruction' is a list, not a text"),
        ({"input": 5}, "'input' is a number, not a text"),
        ({"input": {}}, "'input' is an object, not a text"),
        ({"system": ["s"]}, "'system' is a list, not a text"),
        ({"system": False}, "'system' is true/false, not a text"),
        ({"system": "\ud83d"}, "'system' holds half of a UTF-16 pair"),
        ({"history": "a"}, "'history' is not a list of [question, answer] pairs"),
        ({"history": {"a": "b"}}, "'history' is not a list of [question, answer] pairs"),
        ({"history": [["a"]]}, "'history' is not a list of [question, answer] pairs"),
        ({"history": [["a", "b", "c"]]}, "'history' is not a list of [question, answer] pairs"),
        ({"history": [["a", None]]}, "'history' is not a list of [question, answer] pairs"),
        ({"history": [["a", " "]]}, "'history' is not a list of [question, answer] pairs"),
        ({"history": ["ab"]}, "'history' is not a list of [question, answer] pairs"),
        ({"history": [{"a": "b", "c": "d"}]}, "'history' is not a list of [question, answer] pairs"),
        ({"history": [["a", "b"], ["c", "\ud800"]]}, "'history' holds half of a UTF-16 pair"),
    ],
)
def test_a_row_that_does_not_fit_is_told_with_its_place_and_each_fault_once(change: dict[str, Any], told: str) -> None:
    good = {"instruction": "a", "output": "b"}
    lines = refusal(good, good | change, good).splitlines()
    assert lines[0] == "1 of 3 rows cannot be trained on:"
    assert lines[1].startswith(f"  rows.json row 2: {told}")
    assert ";" not in lines[1]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({}, "'output' is missing; 'instruction' is missing or empty"),
        ({"question": "a", "answer": "b"}, "'output' is missing; 'instruction' is missing or empty"),
        ({"instruction": 1, "input": 2, "output": 3, "system": 4, "history": 5}, "'history' is not a list"),
        (["a", "b"], "is a list, not an object"),
        ("a", "is a text, not an object"),
        (None, "is null, not an object"),
        (7, "is a number, not an object"),
        (True, "is true/false, not an object"),
    ],
)
def test_every_fault_of_a_row_is_told(value: Any, told: str) -> None:
    assert told in refusal(value)


def test_of_many_wrong_rows_five_are_told_and_the_rest_counted() -> None:
    values = [{"instruction": "a", "output": "b"}] * 4 + [{"instruction": "a"}] * 9
    message = refusal(*values)
    assert message.startswith("9 of 13 rows cannot be trained on:")
    assert [f"rows.json row {number}:" in message for number in range(4, 13)] == [False] + [True] * 5 + [False] * 3
    assert "… and 4 more" in message


def test_a_fault_late_in_the_file_is_found_like_an_early_one() -> None:
    good = {"instruction": "a", "output": "b"}
    assert "rows.json row 60001: 'output' is a number" in refusal(*[good] * 60_000, good | {"output": 5})


TEXTS = st.text(st.characters(exclude_categories=[]), max_size=4)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
KEYS = ("instruction", "input", "output", "system", "history")


@settings(deadline=None, max_examples=100)
@given(ANYTHING | st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, ANYTHING | TEXTS)))
def test_any_row_is_refused_or_becomes_turns_of_texts_that_can_be_written(value: Any) -> None:
    try:
        (conversation,) = read_conversations(rows_of(value), {"name": "x", "author": "y"})
    except LoratuneError:
        return
    roles = [message["role"] for message in conversation.messages]
    if roles[0] == "system":
        roles.pop(0)
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    for message in conversation.messages:
        assert message["content"].encode()


# --- placeholders ---


@pytest.mark.parametrize("written", ["{{name}}", "{{NAME}}", "{{Name}}", "{{ name }}", "{{\tNaMe\n}}"])
@pytest.mark.parametrize("given_as", ["name", "NAME"])
def test_a_placeholder_is_filled_whatever_its_case(written: str, given_as: str) -> None:
    value = {
        "instruction": f"Hi {written}",
        "input": written,
        "output": f"I am {written}{written}.",
        "system": written,
        "history": [[written, f"not {written}"]],
    }
    filled = [content for _, content in turns(value, {given_as: "小李"})]
    assert filled == ["小李", "小李", "not 小李", "Hi 小李\n小李", "I am 小李小李."]


def test_a_value_is_set_in_literally_and_only_once() -> None:
    value = {"instruction": "{{name}}", "output": "{{author}}"}
    placeholders = {"name": r"\1 {{author}} \g<0>", "author": "$HOME"}
    assert turns(value, placeholders) == [("user", r"\1 {{author}} \g<0>"), ("assistant", "$HOME")]


def test_placeholders_of_the_users_own_are_filled() -> None:
    value = {"instruction": "{{公司}}", "output": "{{phone_2}}"}
    assert turns(value, {"公司": "甲", "phone_2": "5"}) == [("user", "甲"), ("assistant", "5")]


def test_name_and_author_that_were_not_given_are_told_with_their_flags() -> None:
    value = {"instruction": "{{NAME}}", "output": "{{author}} {{name}}"}
    message = refusal(value)
    assert "{{author}}, {{name}}" in message
    assert "--data.placeholders author=… --data.placeholders name=…" in message
    assert "{{author}}" not in refusal(value, placeholders={"author": "x"})


@pytest.mark.parametrize("text", ["{{other}}", "{name}", "{{ a b }}", "{{}}", "{{{x}}}", "{% raw %}{{ x|y }}"])
def test_other_braces_are_left_as_they_are(text: str) -> None:
    assert turns({"instruction": text, "output": text}, {"name": "x"}) == [("user", text), ("assistant", text)]
