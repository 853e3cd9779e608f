"""ShareGPT, messages and pairs: the same conversation out of every format, or a message that names row and turn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_QWEN
from transformers import AutoTokenizer
from typer.testing import Result

from loratune.data.conversation import Conversation
from loratune.data.encoding import IGNORED, Encoder
from loratune.data.formats import detect_format, read_conversations
from loratune.data.sources import Row
from loratune.errors import Exit, LoratuneError
from loratune.model.base import load_tokenizer
from loratune.recipe.sections import PromptSettings

SAID = [
    ("system", "Be brief."),
    ("user", "Hi, {{name}}"),
    ("assistant", "Hello."),
    ("user", "Bye"),
    ("assistant", "Ciao."),
]
ROWS: dict[str, Any] = {
    "alpaca": {"system": "Be brief.", "history": [["Hi, {{name}}", "Hello."]], "instruction": "Bye", "output": "Ciao."},
    "messages": {"messages": [{"role": role, "content": text} for role, text in SAID]},
    "sharegpt": {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text} for role, text in SAID
        ]
    },
    "query and response": {
        "system": "Be brief.", "history": [["Hi, {{name}}", "Hello."]], "query": "Bye", "response": "Ciao."
    },
}  # fmt: skip


def read(*values: Any, columns: dict[str, str] | None = None) -> list[Conversation]:
    rows = [Row(value, f"rows.json row {number}") for number, value in enumerate(values, start=1)]
    return read_conversations(rows, {"name": "Ada"}, columns)


def refused(*values: Any, columns: dict[str, str] | None = None) -> str:
    with pytest.raises(LoratuneError) as raised:
        read(*values, columns=columns)
    assert raised.value.exit_code == Exit.DATA
    return str(raised.value)


@pytest.mark.parametrize("kind", ROWS)
def test_every_format_gives_the_same_conversation(kind: str) -> None:
    (conversation,) = read(ROWS[kind])
    assert detect_format([Row(ROWS[kind], "")]).name == kind
    expected = [(role, text.replace("{{name}}", "Ada")) for role, text in SAID]
    assert [(message["role"], message["content"]) for message in conversation.messages] == expected


def test_a_pair_is_a_question_and_an_answer() -> None:
    (conversation,) = read({"prompt": "2+2?", "completion": "4"})
    assert [message["content"] for message in conversation.messages] == ["2+2?", "4"]


def test_columns_of_any_name_are_mapped() -> None:
    columns = {"instruction": "question", "output": "answer", "system": "persona"}
    (conversation,) = read({"question": "2+2?", "answer": "4", "persona": "A sage.", "id": 7}, columns=columns)
    assert [message["content"] for message in conversation.messages] == ["A sage.", "2+2?", "4"]
    assert "'output' is missing" in refused({"question": "2+2?"}, columns=columns)


def test_a_sharegpt_system_prompt_may_stand_beside_the_conversation() -> None:
    row = {"system": "Be brief.", "conversations": ROWS["sharegpt"]["conversations"][1:]}
    assert read(row) == read(ROWS["sharegpt"])


def test_text_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    (conversation,) = read({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "4"}]})
    assert conversation.messages[0]["content"] == "2+2?"


def test_an_answer_of_weight_0_is_read_but_not_trained() -> None:
    row = json.loads(json.dumps(ROWS["messages"]))
    row["messages"][2]["weight"] = 0
    (conversation,) = read(row)
    (example,) = Encoder(load_tokenizer(TINY_QWEN), PromptSettings()).encode(conversation)
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    trained = tokenizer.decode([label for label in example.labels if label != IGNORED])
    assert trained == "Ciao.<|im_end|>"
    assert "Hello." in tokenizer.decode(example.input_ids)


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "text"} for role in roles]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, "'messages' is an empty list"),
        ({"messages": "hello"}, "'messages' is a text"),
        ({"messages": ["hello"]}, "message 1 is not an object with 'role'"),
        ({"conversations": [{"value": "hello"}]}, "message 1 is not an object with 'from'"),
        (turns("user"), "does not end with an answer"),
        (turns("system"), "does not end with an answer"),
        (turns("user", "assistant", "user"), "does not end with an answer"),
        (turns("assistant"), "message 1 is of assistant where user is expected"),
        (turns("user", "user", "assistant"), "message 2 is of user where assistant is expected"),
        (turns("user", "system", "assistant"), "message 2 is of system where assistant is expected"),
        (turns("system", "system", "user", "assistant"), "message 2 is of system where user is expected"),
        (turns("user", "assistant", "tool", "assistant"), "message 3: turns of tools (tool)"),
        (turns("user", "robot"), "message 2: the role 'robot' is none of system, user, assistant"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "message 1: the role ['user'] is none of"),
        ({"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}]}, "its text is null"),
        ({"messages": [{"role": "user", "content": "  "}, {"role": "assistant", "content": "x"}]}, "its text is empty"),
        ({"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "x"}]}, "UTF-16"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "its text is a list"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 2}]},
            "message 2: 'weight' is neither 0 nor 1",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]},
            "every answer has weight 0",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": [1]}]},
            "calls of tools are not trained yet",
        ),
        ({"prompt": "x", "completion": 5}, "'completion' is a number, not a text"),
        ({"query": "x", "response": None}, "'response' is null"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(row: Any, words: str) -> None:
    told = refused(row)
    assert words in told
    assert "rows.json row 1" in told


def test_a_row_in_another_format_than_its_file_is_named() -> None:
    told = refused(ROWS["messages"], ROWS["alpaca"])
    assert "rows.json row 2: 'messages' is null, not a list of turns" in told
    assert "each row needs 'messages'" in told


def test_training_says_which_format_a_file_is_in(cli: Callable[..., Result], random_qwen: Path, tmp_path: Path) -> None:
    chats, pairs = tmp_path / "chats.jsonl", tmp_path / "pairs.json"
    chats.write_text("".join(json.dumps(ROWS["sharegpt"]) + "\n" for _ in range(6)), encoding="utf-8")
    pairs.write_text(json.dumps([{"q": f"{n}+1?", "a": str(n + 1)} for n in range(6)]), encoding="utf-8")
    done = cli(
        "sft", "--model.base", random_qwen, "--data.train", chats, "--data.train", pairs,
        "--data.columns", "instruction=q", "--data.columns", "output=a", "--data.placeholders", "name=Ada",
        "--training.steps", "1", "--output", tmp_path / "run",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "chats.jsonl (6 sharegpt), pairs.json (6 alpaca)" in " ".join(done.stderr.split())
