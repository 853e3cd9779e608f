"""Conversational prompts and completions: the ids and the trained positions are those of TRL's own tokenization."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tool_templates import WEATHER, call_of, tool_encoder
from typer.testing import Result

from loratune.data.encoding.encoder import IGNORED, Encoder
from loratune.data.formats.conversation import Conversation
from loratune.data.formats.registry import ConversationReader, detect_format
from loratune.errors import Exit
from loratune.generation.batch.questions import read_questions

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "Who are you?"}
SAID = {"role": "assistant", "content": "A model."}
AGAIN = {"role": "user", "content": "Whose?"}
ANSWERED = {"role": "assistant", "content": "Yours."}
CALLED = {"role": "assistant", "content": "", "tool_calls": [call_of(city="Rome")]}
RESULT = {"role": "tool", "name": "get_weather", "content": "21 degrees"}
ROWS: dict[str, dict[str, Any]] = {
    "one turn": {"prompt": [ASKED], "completion": [ANSWERED]},
    "system": {"prompt": [SYSTEM, ASKED], "completion": [ANSWERED]},
    "several turns": {"prompt": [SYSTEM, ASKED, SAID, AGAIN], "completion": [ANSWERED]},
    "a call": {"prompt": [ASKED], "completion": [CALLED], "tools": [WEATHER]},
    "tools as text": {"prompt": [ASKED], "completion": [CALLED], "tools": json.dumps([WEATHER])},
    "result in the prompt": {"prompt": [ASKED, CALLED, RESULT], "completion": [ANSWERED], "tools": [WEATHER]},
}


def read(row: Any) -> Conversation | str:
    return ConversationReader(detect_format([row], {}), {}, {}).read(row)


def conversation_of(row: Any) -> Conversation:
    conversation = read(row)
    assert isinstance(conversation, Conversation), conversation
    return conversation


def trl_tokens(encoder: Encoder, row: dict[str, Any]) -> tuple[list[int], list[bool]]:
    """Ids and completion mask as TRL makes them, up to the last end token."""
    tools = row.get("tools")
    options: dict[str, Any] = {"tools": json.loads(tools) if isinstance(tools, str) else tools, "return_dict": False}
    apply = encoder.tokenizer.apply_chat_template
    prompt = apply(row["prompt"], add_generation_prompt=True, **options)
    whole = apply(row["prompt"] + row["completion"], **options)
    assert whole[: len(prompt)] == prompt
    whole = whole[: len(whole) - whole[::-1].index(encoder.end_id)]
    return whole, [place >= len(prompt) for place in range(len(whole))]


@pytest.mark.parametrize("kind", ROWS)
def test_ids_and_trained_positions_are_those_of_trl(kind: str) -> None:
    encoder = tool_encoder("hermes")
    (example,) = encoder.encode(conversation_of(ROWS[kind]))
    assert (example.input_ids.tolist(), [label != IGNORED for label in example.labels]) == trl_tokens(
        encoder, ROWS[kind]
    )


def test_every_answer_of_a_completion_is_trained_and_what_stands_between_is_not() -> None:
    row = {"prompt": [ASKED, SAID, AGAIN], "completion": [CALLED, RESULT, ANSWERED], "tools": [WEATHER]}
    encoder, conversation = tool_encoder("hermes"), conversation_of(row)
    assert conversation.trained_answers("all") == [3, 5]
    (example,) = encoder.encode(conversation)
    trained = encoder.tokenizer.decode([label for label in example.labels.tolist() if label != IGNORED])
    assert "get_weather" in trained
    assert trained.endswith("Yours.<|im_end|>")
    assert "21 degrees" not in trained
    assert "A model." not in trained


def test_turns_may_be_sharegpt_s_and_a_completion_may_leave_an_answer_out() -> None:
    row = {
        "prompt": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}],
        "completion": [{"from": "gpt", "value": "d"}],
        "system": "S",
    }
    conversation = conversation_of(row)
    assert [message["content"] for message in conversation.messages] == ["S", "a", "b", "c", "d"]
    assert conversation.trained_answers("all") == [4]
    weighted = {"prompt": [ASKED], "completion": [{**SAID, "weight": 0}, AGAIN, ANSWERED]}
    assert conversation_of(weighted).trained_answers("all") == [3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": []}, "'prompt' is an empty list, not a list of turns"),
        ({"completion": "text"}, "'completion' is a text, not a list of turns"),
        ({"completion": None}, "'completion' is null, not a list of turns"),
        ({"completion": [ASKED, ANSWERED]}, "message 1 of 'completion' is no answer, with which a completion begins"),
        ({"completion": [ANSWERED, ASKED]}, "it does not end with an answer"),
        ({"completion": [{"role": "robot", "content": ""}]}, "message 1 of 'completion': the role 'robot' is none of"),
        ({"prompt": [SYSTEM, {"role": "user", "content": 3}]}, "message 2 of 'prompt': its text is a number"),
        ({"prompt": ["Hi"]}, "message 1 of 'prompt' is not an object with 'role'"),
        ({"completion": [{**SAID, "weight": 0}]}, "every answer is left out of training by 'weight'"),
        ({"completion": [{**SAID, "weight": 0.5}]}, "message 1 of 'completion': 'weight' is neither 0 nor 1"),
        ({"tools": 3}, "'tools' is neither a list nor the JSON text of one"),
        ({"prompt": [SAID]}, "message 1 of 'prompt' is an answer without a message before it"),
    ],
)
def test_a_row_that_does_not_fit_is_told_with_the_place_of_the_turn(change: dict[str, Any], words: str) -> None:
    row = copy.deepcopy({"prompt": [ASKED], "completion": [ANSWERED]} | change)
    given = copy.deepcopy(row)
    assert words in str(read(row))
    assert row == given


def test_the_row_is_not_changed_where_its_answers_are_marked() -> None:
    row = copy.deepcopy(ROWS["several turns"])
    conversation_of(row)
    assert row == ROWS["several turns"]


def test_a_file_s_first_row_tells_texts_from_turns() -> None:
    assert detect_format([{"prompt": "a", "completion": "b"}], {}).name == "prompt and completion"
    assert detect_format([ROWS["one turn"]], {}).name == "conversational prompt and completion"
    mapped = ConversationReader(
        detect_format([{"q": [ASKED], "a": [ANSWERED]}], columns := {"prompt": "q", "completion": "a"}), {}, columns
    ).read({"q": [ASKED], "a": [ANSWERED]})
    assert mapped == conversation_of(ROWS["one turn"])


def test_the_check_reads_such_a_file_and_names_what_it_ignores(cli: Callable[..., Result], tmp_path: Path) -> None:
    rows = [
        {"prompt": [{**ASKED, "content": f"Who is {n}?", "mood": "glad"}], "completion": [{**ANSWERED, "tone": "low"}]}
        | {"chat_template_kwargs": {"enable_thinking": False}}
        for n in range(4)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = ("--model.base", "tiny-qwen", "--data.train", tmp_path / "rows.json", "--data.validation", "0")
    done = cli("data", "check", *flags, "--json")
    assert done.exit_code == Exit.OK, done.stderr
    (file,) = json.loads(done.stdout)["files"]
    assert file["format"] == "conversational prompt and completion"
    assert file["ignored"] == ["chat_template_kwargs", "completion[].tone", "prompt[].mood"]


def test_prompts_are_asked_with_or_without_a_completion(tmp_path: Path) -> None:
    rows = [
        {"prompt": [SYSTEM, ASKED]},
        {"prompt": [ASKED], "completion": None},
        {"prompt": [ASKED], "completion": []},
        {"prompt": [ASKED, SAID, AGAIN], "completion": [{**ANSWERED, "loss": False}]},
        {"prompt": [ASKED], "completion": [CALLED, RESULT, ANSWERED], "tools": [WEATHER]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_questions(str(tmp_path / "rows.jsonl"), {}, {})
    assert [([message["content"] for message in row.messages], row.reference) for row in read.rows] == [
        (["Be brief.", "Who are you?"], None),
        (["Who are you?"], None),
        (["Who are you?"], None),
        (["Who are you?", "A model.", "Whose?"], "Yours."),
        (["Who are you?", "", "21 degrees"], "Yours."),
    ]
    assert read.rows[4].tools == (WEATHER,)
