"""Alpaca rows → conversations: what is joined and filled, and what is refused with which words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.data.formats.conversation import Conversation
from loratune.data.formats.placeholders import braced, describe_literal, describe_unfilled, describe_unused
from loratune.data.formats.registry import ConversationReader, detect_format
from loratune.errors import Exit, LoratuneError


def read(value: Any, placeholders: dict[str, str] | None = None, **settings: Any) -> Conversation | str:
    """The conversation of a file's only row, or what is wrong with it."""
    reader = ConversationReader(detect_format([value], {}), placeholders or {}, {}, **settings)
    conversation = reader.read(value)
    if reader.fill.missing:
        raise LoratuneError(describe_unfilled(sorted(reader.fill.missing)), Exit.DATA)
    return conversation


def turns(value: dict[str, Any], placeholders: dict[str, str] | None = None, **settings: Any) -> list[tuple[str, str]]:
    """The conversation of one row as (role, content)."""
    conversation = read(value, placeholders, **settings)
    assert isinstance(conversation, Conversation), conversation
    return [(message["role"], message["content"]) for message in conversation.messages]


def refusal(value: Any, placeholders: dict[str, str] | None = None) -> str:
    problem = read(value, placeholders)
    assert isinstance(problem, str)
    return problem


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


def test_a_source_s_system_prompt_is_set_where_a_row_has_none() -> None:
    row = {"instruction": "a", "output": "b"}
    assert turns(row, system="s") == [("system", "s"), ("user", "a"), ("assistant", "b")]
    assert turns(row | {"system": "own"}, system="s")[0] == ("system", "own")
    weighed = {"role": "assistant", "content": "b", "weight": 0}
    others = [{"role": role, "content": role} for role in ("user", "assistant")]
    chat = {"messages": [{"role": "user", "content": "a"}, weighed, *others]}
    conversation = read(chat, system="s")
    assert isinstance(conversation, Conversation)
    assert [conversation.messages[place]["content"] for place in conversation.untrained] == ["b"]


def test_keys_that_say_nothing_to_a_format_are_kept_for_a_note() -> None:
    reader = ConversationReader(detect_format([{"instruction": ""}], {}), {}, {})
    for extra in ({"id": 1}, {}, {"late": 2}):
        reader.read({"instruction": "a", "output": "b"} | extra)
    assert reader.ignored == {"id", "late"}


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
        ({"output": "b\ud800"}, "'output' holds an unpaired UTF-16 surrogate"),
        ({"instruction": "\udfff"}, "'instruction' holds an unpaired UTF-16 surrogate"),
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
        ({"system": "\ud83d"}, "'system' holds an unpaired UTF-16 surrogate"),
        ({"history": "a"}, "'history' is not a list of [question, answer] pairs"),
        ({"history": {"a": "b"}}, "'history' is not a list of [question, answer] pairs"),
        ({"history": [["a"]]}, "'history' is not a list of [question, answer] pairs"),
        ({"history": [["a", "b", "c"]]}, "'history' is not a list of [question, answer] pairs"),
        ({"history": [["a", None]]}, "'history' is not a list of [question, answer] pairs"),
        ({"history": [[" ", "b"]]}, "'history' is not a list of [question, answer] pairs"),
        ({"history": ["ab"]}, "'history' is not a list of [question, answer] pairs"),
        ({"history": [{"a": "b", "c": "d"}]}, "'history' is not a list of [question, answer] pairs"),
        ({"history": [["a", "b"], ["c", "\ud800"]]}, "'history' holds an unpaired UTF-16 surrogate"),
    ],
)
def test_a_row_that_does_not_fit_is_told_with_each_fault_once(change: dict[str, Any], told: str) -> None:
    problem = refusal({"instruction": "a", "output": "b"} | change)
    assert problem.startswith(told)
    assert ";" not in problem


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({}, "'output' is missing; 'instruction' is missing or empty"),
        ({"question": "a", "answer": "b"}, "'output' is missing; 'instruction' is missing or empty"),
        ({"instruction": "a", "ouput": "b"}, "'output' is missing, but there is 'ouput'"),
        ({"instuction": "a", "output": "b"}, "'instruction' is missing or empty, but there is 'instuction'"),
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


@pytest.mark.parametrize(
    ("first", "row", "told"),
    [
        (
            {"prompt": "a", "completion": "b"},
            {"prompt": "a", "completon": "b"},
            "'completion' is missing, but there is",
        ),
        ({"messages": []}, {"mesages": []}, "'messages' is null, not a list of turns, but there is 'mesages'"),
        ({"instruction": ""}, {"instruction": "a", "output": None, "ouput": "b"}, "'output' is null"),
        ({"instruction": ""}, {"instruction": "a", "answer": "b"}, "'output' is missing"),
    ],
)
def test_a_misspelt_column_of_a_row_is_named(first: dict[str, Any], row: dict[str, Any], told: str) -> None:
    problem = ConversationReader(detect_format([first], {}), {}, {}).read(row)
    assert isinstance(problem, str)
    assert problem.startswith(told)
    assert ("but there is" in problem) == ("but there is" in told)


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
    conversation = read(value, {"name": "x", "author": "y"})
    if isinstance(conversation, str):
        return
    roles = [message["role"] for message in conversation.messages]
    if roles[0] == "system":
        roles.pop(0)
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    for message in conversation.messages:
        assert message["content"].encode() or message["role"] == "assistant"


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
    with pytest.raises(LoratuneError) as caught:
        read(value)
    assert caught.value.exit_code == Exit.DATA
    assert "{{author}}, {{name}}" in str(caught.value)
    assert "--data.placeholders author=TEXT --data.placeholders name=TEXT" in str(caught.value)
    with pytest.raises(LoratuneError, match=r"^rows hold \{\{name\}\};"):
        read(value, {"author": "x"})


@pytest.mark.parametrize("text", ["{{other}}", "{name}", "{{ a b }}", "{{}}", "{{{x}}}", "{% raw %}{{ x|y }}"])
def test_other_braces_are_left_as_they_are(text: str) -> None:
    assert turns({"instruction": text, "output": text}, {"name": "x"}) == [("user", text), ("assistant", text)]


def test_messages_of_placeholders_name_a_few_in_a_few_letters_each() -> None:
    names = [f"item{number}" for number in range(100)]
    told = describe_literal([*names, "x" * 50_000], ["item", "i" * 50_000])
    assert told.startswith("rows hold {{item0}}, {{item1}}, {{item2}}, {{item3}}, {{item4}}, …, for which ")
    assert "(it has 'item' for 'item0', 'item' for 'item1', " in told
    assert max(len(told), len(describe_literal(["x" * 50_000], [])), len(describe_unused(names, ()))) < 400
    assert braced(["name", "name", "author"]) == "{{name}}, {{author}}"
