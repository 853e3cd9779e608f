"""ShareGPT, messages and pairs: the same conversation out of every format, or a message that names row and turn."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_QWEN
from transformers import AutoTokenizer
from typer.testing import Result

from loratune.data.encoding.encoder import IGNORED, Encoder
from loratune.data.formats.chat_rows import MESSAGES
from loratune.data.formats.columns import describe_unread_columns
from loratune.data.formats.conversation import Conversation
from loratune.data.formats.registry import ConversationReader, detect_format
from loratune.errors import LoratuneError
from loratune.model.tokenizer import load_tokenizer
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
    "conversational prompt and completion": {
        "prompt": [{"role": role, "content": text} for role, text in SAID[:-1]],
        "completion": [{"role": role, "content": text} for role, text in SAID[-1:]],
    },
    "query and response": {
        "system": "Be brief.", "history": [["Hi, {{name}}", "Hello."]], "query": "Bye", "response": "Ciao."
    },
}  # fmt: skip


def read(value: Any, columns: dict[str, str] | None = None) -> Conversation:
    """The conversation of a file's only row."""
    conversation = read_or_refuse(value, columns)
    assert isinstance(conversation, Conversation), conversation
    return conversation


def read_or_refuse(value: Any, columns: dict[str, str] | None = None) -> Conversation | str:
    return ConversationReader(detect_format([value], columns or {}), {"name": "Ada"}, columns or {}).read(value)


@pytest.mark.parametrize("kind", ROWS)
def test_every_format_gives_the_same_conversation(kind: str) -> None:
    conversation = read(ROWS[kind])
    assert detect_format([ROWS[kind]], {}).name == kind
    expected = [(role, text.replace("{{name}}", "Ada")) for role, text in SAID]
    assert [(message["role"], message["content"]) for message in conversation.messages] == expected


def nested(levels: int) -> Any:
    value: Any = "leaf"
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_calls_that_are_nested_too_deep_are_refused_by_name(as_text: bool) -> None:
    asked = ROWS["messages"]["messages"][:2]

    def row(tools: int, arguments: int) -> dict[str, Any]:
        offer: Any = [{"type": "function", "function": {"name": "f", "parameters": {"x": nested(tools)}}}]
        given: Any = {"x": nested(arguments)}
        if as_text:
            offer, given = json.dumps(offer), json.dumps(given)
        call = {"type": "function", "function": {"name": "f", "arguments": given}}
        return {"messages": [*asked, {"role": "assistant", "tool_calls": [call]}], "tools": offer}

    assert isinstance(read_or_refuse(row(90, 90)), Conversation)
    for levels in (110, 900):
        assert "'tools' are nested more than 100 levels deep" in str(read_or_refuse(row(levels, 1)))
        told = str(read_or_refuse(row(1, levels)))
        assert told.startswith("message 3: ")
        assert "nested more than 100 levels deep" in told


@pytest.mark.parametrize("key", ["images", "note"])
def test_a_row_that_is_nested_too_deep_anywhere_is_a_bad_row(key: str) -> None:
    assert isinstance(read_or_refuse(ROWS["messages"] | {key: []}), Conversation)
    told = read_or_refuse(ROWS["messages"] | {key: nested(5000)})
    assert told == "its values are nested too deep to be checked"


def test_a_pair_is_a_question_and_an_answer() -> None:
    conversation = read({"prompt": "2+2?", "completion": "4"})
    assert [message["content"] for message in conversation.messages] == ["2+2?", "4"]


def test_columns_of_any_name_are_mapped() -> None:
    columns = {"instruction": "question", "output": "answer", "system": "persona"}
    conversation = read({"question": "2+2?", "answer": "4", "persona": "A sage.", "id": 7}, columns=columns)
    assert [message["content"] for message in conversation.messages] == ["A sage.", "2+2?", "4"]
    assert "'output' is missing" in str(read_or_refuse({"question": "2+2?"}, columns))


def test_a_sharegpt_system_prompt_may_stand_beside_the_conversation() -> None:
    row = {"system": "Be brief.", "conversations": ROWS["sharegpt"]["conversations"][1:]}
    assert read(row) == read(ROWS["sharegpt"])


def test_text_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    conversation = read({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "4"}]})
    assert conversation.messages[0]["content"] == "2+2?"


def test_an_answer_of_weight_0_is_read_but_not_trained() -> None:
    row = json.loads(json.dumps(ROWS["messages"]))
    row["messages"][2]["weight"] = 0
    conversation = read(row)
    (example,) = Encoder(load_tokenizer(TINY_QWEN), PromptSettings()).encode(conversation)
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    trained = tokenizer.decode([label for label in example.labels.tolist() if label != IGNORED])
    assert trained == "Ciao.<|im_end|>"
    assert "Hello." in tokenizer.decode(example.input_ids.tolist())


MARKS = ("loss", "loss_scale", "train", "training", "weight")


def trained_text(conversation: Conversation) -> str:
    (example,) = Encoder(load_tokenizer(TINY_QWEN), PromptSettings()).encode(conversation)
    return str(AutoTokenizer.from_pretrained(TINY_QWEN).decode([n for n in example.labels.tolist() if n != IGNORED]))


@pytest.mark.parametrize("kind", ["messages", "sharegpt"])
@pytest.mark.parametrize("no", [False, 0, 0.0])
@pytest.mark.parametrize("mark", MARKS)
def test_an_answer_marked_as_not_to_be_trained_is_not(kind: str, mark: str, no: Any) -> None:
    row = json.loads(json.dumps(ROWS[kind]))
    said = row["messages" if kind == "messages" else "conversations"]
    for turn, value in zip(said, (None, None, no, False, True), strict=True):
        turn[mark] = value
    assert trained_text(read(row)) == "Ciao.<|im_end|>"


def test_a_system_prompt_beside_sharegpt_turns_does_not_move_the_marks() -> None:
    said = json.loads(json.dumps(ROWS["sharegpt"]["conversations"][1:]))
    said[1]["loss"] = False
    assert trained_text(read({"system": "Be brief.", "conversations": said})) == "Ciao.<|im_end|>"


@pytest.mark.parametrize("kind", ["messages", "sharegpt"])
@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (2, 0.5, "message 3: 'loss_scale' is neither 0 nor 1"),
        (2, "no", "message 3: 'loss_scale' is neither 0 nor 1"),
        (1, True, "message 2: 'loss_scale' asks to train it, and only answers are trained"),
    ],
)
def test_a_mark_that_cannot_be_honoured_is_named(kind: str, place: int, value: Any, words: str) -> None:
    row = json.loads(json.dumps(ROWS[kind]))
    row["messages" if kind == "messages" else "conversations"][place]["loss_scale"] = value
    assert words in str(read_or_refuse(row))


def test_unknown_keys_of_turns_are_named_as_ignored() -> None:
    row = json.loads(json.dumps(ROWS["messages"]))
    row["messages"][1] |= {"mood": "happy", "loss": None, "filled_by_arrow": None}
    reader = ConversationReader(detect_format([row], {}), {"name": "Ada"}, {})
    assert isinstance(reader.read(row), Conversation)
    assert reader.ignored == {"messages[].mood"}


def test_the_older_form_of_calls_is_read_as_calls() -> None:
    call = {"name": "add", "arguments": '{"a": 1, "b": null}'}
    row = {
        "functions": [{"name": "add", "parameters": {}}],
        "messages": [
            {"role": "user", "content": "1+2?"},
            {"role": "assistant", "content": None, "function_call": call},
            {"role": "function", "name": "add", "content": "3"},
            {"role": "assistant", "content": "3."},
        ],
    }
    newer = json.loads(json.dumps(row))
    newer["tools"] = [{"type": "function", "function": tool} for tool in newer.pop("functions")]
    newer["messages"][1] = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    newer["messages"][2]["role"] = "tool"
    assert read(row) == read(newer)
    # A null in a JSON text was written by somebody.
    assert read(row).messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": None}


def test_nulls_that_arrow_adds_are_absent_keys(tmp_path: Path) -> None:
    from datasets import Dataset

    def tool(name: str, properties: dict[str, Any]) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}

    def row(name: str, properties: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return {"messages": messages, "tools": [tool(name, properties)]}

    rows = [row("add", {"a": {"type": "int"}}, {"a": 1}), row("say", {"text": {"enum": ["x", "y"]}}, {"text": "x"})]
    file = tmp_path / "rows.parquet"
    Dataset.from_list(rows).to_parquet(file)
    filled = Dataset.from_parquet(str(file)).to_list()
    assert None in filled[0]["tools"][0]["function"]["parameters"]["properties"].values()
    assert [read(one) for one in filled] == [read(one) for one in rows]


@pytest.mark.parametrize(
    "roles",
    [
        ("user", "assistant", "system", "user", "assistant"),
        ("system", "system", "user", "assistant"),
        ("developer", "user", "assistant"),
        ("system", "assistant", "user", "assistant"),
        ("user", "user", "assistant"),
        ("user", "assistant", "assistant"),
        ("user", "tool", "assistant"),
        ("user", "assistant", "tool", "assistant"),
    ],
)
def test_any_order_that_the_template_renders_is_rendered_as_transformers_does(roles: tuple[str, ...]) -> None:
    said = [{"role": role, "content": f"text {place}"} for place, role in enumerate(roles)]
    (example,) = Encoder(load_tokenizer(TINY_QWEN), PromptSettings()).encode(read({"messages": said}))
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    plain = [{**turn, "role": turn["role"].replace("developer", "system")} for turn in said]
    expected = tokenizer.apply_chat_template(plain, tokenize=False)
    assert tokenizer.decode(example.input_ids.tolist()).strip() == expected.strip()
    trained = tokenizer.decode([label for label in example.labels.tolist() if label != IGNORED])
    answers = [turn["content"] for turn in said if turn["role"] == "assistant"]
    assert trained == "".join(f"{answer}<|im_end|>" for answer in answers)


def test_a_turn_that_the_template_drops_is_refused() -> None:
    tokenizer = load_tokenizer(TINY_QWEN)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'system' or loop.first %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = {"messages": [{"role": r, "content": f"{r} {n}"} for n, r in enumerate(("user", "system", "assistant"))]}
    with pytest.raises(LoratuneError, match="does not render a message of system"):
        Encoder(tokenizer, PromptSettings()).encode(read(row))


OTHER_KEYS = {"role": "from", "content": "value", "from": "role", "value": "content"}


def rewritten(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns with the keys of the other style, and the roles that both know."""
    known = {"human": "user", "gpt": "assistant"}
    return [{OTHER_KEYS.get(key, key): known.get(value, value) for key, value in turn.items()} for turn in turns]


@pytest.mark.parametrize(("kind", "key"), [("messages", "messages"), ("sharegpt", "conversations")])
def test_turns_are_read_by_their_own_keys_whatever_their_list_is_called(kind: str, key: str) -> None:
    row = json.loads(json.dumps(ROWS[kind]))
    row[key][2]["loss"] = False
    other = {key: rewritten(row[key])}
    assert read(other) == read(row)
    assert read(other).untrained == {2}
    encoder = Encoder(load_tokenizer(TINY_QWEN), PromptSettings())
    assert encoder.encode(read(other)) == encoder.encode(read(row))
    # As Arrow fills in what the turns of other rows have.
    assert read({key: [dict.fromkeys(turn, None) | one for turn, one in zip(row[key], other[key], strict=True)]}) == (
        read(row)
    )


def test_what_only_one_style_knows_works_under_either_name() -> None:
    called = {"messages": openai_row()["messages"], "tools": [ADD]}
    assert read({"conversations": called["messages"], "tools": [ADD]}) == CALLED
    assert read({"messages": sharegpt_row()["conversations"], "tools": [ADD]}) == CALLED
    asked, answered = ROWS["sharegpt"]["conversations"][1:3]
    for name in ("messages", "conversations"):
        conversation = read({"system": "Be brief.", name: [asked, answered]})
        assert conversation.messages[0] == {"role": "system", "content": "Be brief."}
    assert read({"system": "Be brief.", "messages": ROWS["messages"]["messages"][1:3]}).messages[0]["role"] == "user"


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize(
    ("turns", "words"),
    [
        (
            [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}],
            ("message 2 has 'from' where others have 'role'", "message 1 has 'role' where others have 'from'"),
        ),
        (
            [{"from": "human", "value": "a"}, {"role": "assistant", "content": "b", "from": None}],
            ("message 1 has 'from' where others have 'role'", "message 2 has 'role' where others have 'from'"),
        ),
        (
            [{"role": "user", "value": "a"}, {"role": "assistant", "content": "b"}],
            ("message 1 has its text under 'value'; with 'role' goes 'content'",) * 2,
        ),
        (
            [{"from": "human", "value": "a"}, {"from": "gpt", "content": "b"}],
            ("message 2 has its text under 'content'; with 'from' goes 'value'",) * 2,
        ),
    ],
)
def test_turns_of_one_row_that_are_written_in_two_ways_are_refused(
    key: str, turns: list[dict[str, Any]], words: tuple[str, str]
) -> None:
    assert words[key == "conversations"] in str(read_or_refuse({key: turns}))


def test_rows_of_both_styles_may_stand_in_one_file() -> None:
    reader = ConversationReader(detect_format([ROWS["messages"]], {}), {"name": "Ada"}, {})
    rows = [{"messages": turns} for turns in (ROWS["messages"]["messages"], ROWS["sharegpt"]["conversations"])]
    first, second = map(reader.read, rows)
    assert first == second
    assert isinstance(
        reader.read({"messages": [{"from": "human", "value": "a", "mood": 1}, *rows[1]["messages"]]}), (Conversation)
    )
    assert reader.ignored == {"messages[].mood"}


@pytest.mark.parametrize(("key", "what"), [("image", "a picture"), ("images", "pictures"), ("audios", "sound")])
@pytest.mark.parametrize("kind", ROWS)
def test_rows_about_pictures_are_refused_by_name(kind: str, key: str, what: str) -> None:
    assert f"{key!r} holds {what}" in str(read_or_refuse(ROWS[kind] | {key: ["a.png"]}))
    for nothing in ([], None, "", [None], [""], {}, {"bytes": None, "path": None}, [{"bytes": None, "path": None}]):
        assert isinstance(read_or_refuse(ROWS[kind] | {key: nothing}), Conversation)


MEDIA = [
    ("image_path", "a.png", "a picture"),
    ("img", "/data/photos/IMG 0001 (2).JPEG", "a picture"),
    ("picture_url", "https://example.org/p/1.webp?size=large#top", "a picture"),
    ("scan", "data:image/png;base64,iVBORw0KGgo=", "a picture"),
    ("photo", {"bytes": b"\x89PNG", "path": None}, "a file"),
    ("photo", {"bytes": b"\x89PNG", "path": "a.png"}, "a picture"),
    ("photo", [None, {"bytes": None, "path": "a.png"}], "a picture"),
    ("pixels", b"\x89PNG", "the bytes of a file"),
    ("files", [{"url": "a.mp4"}], "a video"),
    ("clip", "C:\\clips\\a.mov", "a video"),
    ("voice", ["a.wav"], "sound"),
]


def with_question(kind: str, question: str) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(json.dumps(ROWS[kind]).replace("Bye", question))
    return row


@pytest.mark.parametrize(("column", "value", "what"), MEDIA)
@pytest.mark.parametrize("kind", ROWS)
def test_a_placeholder_for_what_an_unread_column_holds_is_refused_by_name(
    kind: str, column: str, value: Any, what: str
) -> None:
    told = str(read_or_refuse(with_question(kind, "<image>What is it?") | {column: value}))
    assert f"{column!r} holds {what}, to which <image> in a text refers" in told
    # Such a column alone may be anything, and <image> alone may be XML.
    assert isinstance(read_or_refuse(ROWS[kind] | {column: value}), Conversation)
    assert isinstance(read_or_refuse(with_question(kind, "<image>What is it?") | {column: None}), Conversation)


@pytest.mark.parametrize("placeholder", ["<video>", "<audio>", "<|image|>", "<image_0>", "<|image_pad|>", "<IMAGE>"])
def test_other_placeholders_are_known(placeholder: str) -> None:
    assert f"to which {placeholder} in a text" in str(
        read_or_refuse(with_question("sharegpt", placeholder) | {"image_file": "a.png"})
    )


@pytest.mark.parametrize(
    "value",
    [
        *("", None, [], [None], {"bytes": None, "path": None}, 7, "png", "see a.png.\nThen", "notes.txt", "a.json"),
        *({"path": "src/main.py"}, ["en"], {"score": 0.5}, "https://example.org/page", "<img src='a.png'>", b""),
    ],
)
def test_columns_that_hold_no_media_are_ignored_as_ever(value: Any) -> None:
    assert isinstance(read_or_refuse(with_question("alpaca", "What does <image> mean?") | {"x": value}), Conversation)


def test_pictures_in_turns_are_seen() -> None:
    row = with_question("messages", "<image> What is it?")
    row["messages"][3]["attachments"] = ["a.png"]
    assert "'messages[].attachments' holds a picture, to which <image>" in str(read_or_refuse(row))
    del row["messages"][3]["attachments"]
    row["messages"][3]["images"] = ["a.png"]
    assert "'messages[].images' holds a picture, to which <image>" in str(read_or_refuse(row))


def test_rows_about_pictures_are_counted_and_can_be_left_out(cli: Callable[..., Result], tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    plain = [{"instruction": f"{n}+1?", "output": str(n + 1)} for n in range(3)]
    seen = [{"instruction": "<image>What?", "output": "A cat.", "img": "a.png"}] * 2
    file.write_text(json.dumps([plain[0], *seen, *plain[1:]]), encoding="utf-8")
    check = ["data", "check", "--model.base", "tiny-qwen", "--data.validation", "0", "--data.train", file]
    told = cli(*check)
    assert told.exit_code == 3
    message = " ".join(told.stderr.split())
    assert "2 of 5 rows cannot be trained on" in message
    assert "row 2: 'img' holds a picture" in message
    assert cli(*check, "--data.on_bad_row", "skip").exit_code == 0


@pytest.mark.parametrize(
    ("row", "flags"),
    [
        ({"question": "2+2?", "answer": "4"}, "--data.columns instruction=question --data.columns output=answer"),
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "instruction=prompt --data.columns output=chosen"),
        (
            {"instruction": "2+2?", "context": "Sums.", "response": "4"},
            "--data.columns output=response --data.columns input=context",
        ),
        (
            {"dialog": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], "id": 1},
            "to train on the conversations under 'dialog': --data.columns messages=dialog",
        ),
        (
            {"prompt": "2+2?"}
            | {k: [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": k}] for k in ("rejected", "chosen")},
            "DPO) is not offered; to train on the conversations under 'chosen': --data.columns conversations=chosen",
        ),
        (
            {"prompt": "2+2?", "answer": ["4", "5"], "response": "4"},
            "--data.columns instruction=prompt --data.columns output=response",
        ),
        (
            {"instuction": "2+2?", "input": "", "output": "4"},
            "perhaps misspelt: 'instuction' for 'instruction'; correct this in the file, or give "
            "--data.columns instruction=instuction",
        ),
        (
            {"instruction": "2+2?", "ouput": "4"},
            "'ouput' for 'output'; correct this in the file, or give",
        ),
        (
            {"prompt": "2+2?", "completon": "4"},
            "--data.columns instruction=prompt --data.columns output=completon",
        ),
        (
            {"question": "2+2?", "output": "4"},
            "to train on 'output' as the answer: --data.columns instruction=question",
        ),
        (
            {"mesages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
            "--data.columns messages=mesages",
        ),
        (
            {"Antwort": "4", "Frage": "2+2?", "Nr": 1, "Quelle": "Sums."},
            "to train on 'Antwort' as the answer: --data.columns instruction=Frage --data.columns output=Antwort",
        ),
        ({"问题": "2+2?", "答案": "4"}, "--data.columns 'instruction=问题' --data.columns 'output=答案'"),
        (
            {"id": "17", "title": "2+2?", "body": "4"},
            "if 'title' has questions and 'body' answers: --data.columns instruction=title --data.columns output=body",
        ),
        (
            {"title": "2+2?", "answer": "4"},
            "; if 'title' has questions and 'answer' answers: --data.columns instruction=title "
            "--data.columns output=answer",
        ),
    ],
)
def test_the_line_that_would_read_unknown_columns_is_given_and_works(
    cli: Callable[..., Result], tmp_path: Path, row: dict[str, Any], flags: str
) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row]), encoding="utf-8")
    preview = ["data", "preview", "--model.base", "tiny-qwen", "--data.validation", "0", "--data.train", file]
    told = cli(*preview)
    assert told.exit_code == 3
    message = " ".join(told.stderr.split())
    assert flags in message
    assert all(repr(name) in message for name in row)
    given = shlex.split(message[message.index("--data.columns") :])
    assert cli(*preview, *given).exit_code == 0


@pytest.mark.parametrize(
    ("row", "words", "absent"),
    [
        (
            {"text": "Once upon a time."},
            "'text' holds plain text, and training on plain text (pretraining) is not",
            "-",
        ),
        ({"text": "Once.", "label": "good"}, "pretraining) is not offered", "DPO"),
        ({"content": "Once."}, "'content' holds plain text", "instruction="),
        (
            {"chosen": "Human: 2+2? Assistant: 4", "rejected": "Human: 2+2? Assistant: 5"},
            "preference training (DPO) is not offered; to train on the chosen answers a column with their questions is "
            "needed: --data.columns instruction=QUESTIONS --data.columns output=chosen",
            "pretraining",
        ),
        (
            {"a": 1, "b": 2},
            "; name the columns of questions and answers: --data.columns instruction=QUESTIONS "
            "--data.columns output=ANSWERS",
            "pretraining",
        ),
        (
            {"a": "2+2?", "b": "4", "c": "easy"},
            "--data.columns instruction=QUESTIONS --data.columns output=ANSWERS",
            "if 'a'",
        ),
        ({"frage": "2+2?", "b": "4", "c": "easy"}, "instruction=frage --data.columns output=ANSWERS", "if 'b'"),
    ],
)
def test_files_for_other_kinds_of_training_are_told_what_they_are(row: dict[str, Any], words: str, absent: str) -> None:
    told = describe_unread_columns([row, row], detect_format([row], {}), {})
    assert words in told
    assert all(repr(name) in told for name in row)
    assert absent not in told


def test_columns_that_are_mapped_in_vain_are_named_and_those_of_the_file_are_shown() -> None:
    row = {"frage": "2+2?", "antwort": "4"}
    for columns in ({"instruction": "farge"}, {"instructin": "frage"}):
        told = describe_unread_columns([row], detect_format([row], columns), columns)
        ((name, column),) = columns.items()
        assert told.startswith("its columns are 'frage', 'antwort', in which no format is recognised, also not with ")
        assert f"data.columns {name}={column};" in told
        assert told.endswith(": --data.columns instruction=frage --data.columns output=antwort")
    columns = {"instruction": "farge", "output": "antwort"}
    told = describe_unread_columns([row], detect_format([row], columns), columns)
    assert "data.columns instruction=farge output=antwort; to train on 'antwort' as the answer" in told
    assert told.endswith(": --data.columns instruction=frage --data.columns output=antwort")


def test_columns_beside_known_ones_are_not_explained() -> None:
    for row in (
        *({"instruction": "a", "output": "b", "text": "a b"}, {"messages": [], "text": "x"}, {"output": "b"}),
        # Nothing is misspelt where what is known can be read.
        *({"instruction": "a", "output": "b", "ouput": "c"}, {"input": "a", "output": "b", "instructions": "c"}),
    ):
        assert describe_unread_columns([row], detect_format([row], {}), {}) == ""


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
        (turns("assistant"), "message 1 is an answer without a message before it"),
        (turns("user", "robot"), "message 2: the role 'robot' is none of system, developer, user, assistant, tool"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "message 1: the role ['user'] is none of"),
        ({"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}]}, "its text is null"),
        ({"messages": [{"role": "user", "content": "  "}, {"role": "assistant", "content": "x"}]}, "its text is empty"),
        ({"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "x"}]}, "UTF-16"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "it has a part of type 'image_url'"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 2}]},
            "message 2: 'weight' is neither 0 nor 1",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]},
            "every answer is left out of training by 'weight'",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]},
            "message 2: its text is null",
        ),
        ({"prompt": "x", "completion": 5}, "'completion' is a number, not a text"),
        ({"query": "x", "response": None}, "'response' is null"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(row: Any, words: str) -> None:
    told = read_or_refuse(row)
    assert isinstance(told, str)
    assert words in told


def test_a_row_in_another_format_than_its_file_is_refused() -> None:
    reader = ConversationReader(detect_format([ROWS["messages"]], {}), {"name": "Ada"}, {})
    assert isinstance(reader.read(ROWS["messages"]), Conversation)
    assert reader.read(ROWS["alpaca"]) == "'messages' is null, not a list of turns"


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer_is_read_and_left_to_the_inspection(answer: str) -> None:
    rows: list[Any] = [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]},
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": answer}]},
        {"instruction": "x", "output": answer},
        {"instruction": "x", "output": answer, "history": []},
        {"prompt": "x", "completion": answer},
    ]
    assert [read(row).messages[-1]["content"] for row in rows] == [answer] * len(rows)
    assert read({"instruction": "x", "output": "y", "history": [["z", answer]]}).messages[1]["content"] == answer


def test_reasoning_stands_before_the_answer() -> None:
    said = {"role": "assistant", "content": "4", "reasoning_content": "\ntwo and\ntwo\n"}
    row = {"messages": [{"role": "user", "content": "2+2?"}, said]}
    assert read(row).messages[-1] == {"role": "assistant", "content": "<think>\ntwo and\ntwo\n</think>\n\n4"}
    said["reasoning_content"] = ""
    assert read(row).messages[-1] == {"role": "assistant", "content": "4"}


# --- tools ---

ADD = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2.5, None, "你"]}}}]
ARGUMENTS = CALLS[0]["function"]["arguments"]  # type: ignore[index]
CALLED = Conversation(
    (
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "", "tool_calls": CALLS},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ),
    tools=({"type": "function", "function": ADD},),
)


def openai_row(call: Any = CALLS[0], **row: Any) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "assistant", "content": "It is 3.", "tool_calls": None},
    ]
    return {"messages": turns, "tools": [{"type": "function", "function": ADD}]} | row


def sharegpt_row(call: Any = None, **row: Any) -> dict[str, Any]:
    called = json.dumps({"name": "add", "arguments": ARGUMENTS}) if call is None else call
    turns = [
        {"from": "human", "value": "1+2?"},
        {"from": "function_call", "value": called},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "It is 3."},
    ]
    return {"conversations": turns, "tools": json.dumps([ADD])} | row


def test_results_stand_in_the_order_of_their_calls() -> None:
    def result(id_: str | None) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": id_, "content": f"result {id_}"}

    def order(*ids: str | None) -> list[str]:
        calls = [{"id": id_, **CALLS[0]} for id_ in ("a", "b", "c")]
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": calls}]
        row = {"messages": [*turns, *map(result, ids), {"role": "assistant", "content": "So."}]}
        return [message["content"] for message in MESSAGES.messages(row) if message["role"] == "tool"]

    assert order("c", "a", "b") == ["result a", "result b", "result c"]
    assert order("c", "a") == ["result a", "result c"]
    assert order("c", "x", "a") == ["result c", "result x", "result a"]  # nothing is known of x
    assert order("b", None) == ["result b", "result None"]


@pytest.mark.parametrize(
    "row",
    [
        openai_row(),
        openai_row({"id": "1", "type": "function", "function": {"name": "add", "arguments": json.dumps(ARGUMENTS)}}),
        openai_row({"name": "add", "arguments": ARGUMENTS}),
        openai_row(tools=[ADD]),
        openai_row(tools=json.dumps([ADD], ensure_ascii=False)),
        sharegpt_row(),
        sharegpt_row(json.dumps([{"name": "add", "arguments": json.dumps(ARGUMENTS)}])),
        sharegpt_row({"name": "add", "arguments": ARGUMENTS}),
        sharegpt_row(tools=[ADD]),
    ],
)
def test_a_call_of_a_tool_is_the_same_in_whatever_way_it_is_written(row: dict[str, Any]) -> None:
    assert read(row) == CALLED


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools_are_none(tools: Any) -> None:
    row: dict[str, Any] = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}
    assert read(row | {"tools": tools}).tools == ()
    assert read(openai_row(tools=tools)).tools == ()


def test_results_of_tools_may_be_several_empty_and_named() -> None:
    row = openai_row()
    row["messages"][2:3] = [{"role": "tool", "content": "", "name": "add"}, {"role": "tool", "content": "3"}]
    assert read(row).messages[2:4] == ({"role": "tool", "content": "", "name": "add"}, {"role": "tool", "content": "3"})


def test_a_call_may_end_a_conversation_and_follow_another() -> None:
    row = openai_row()
    row["messages"][3] = {"role": "assistant", "content": "Once more.", "tool_calls": CALLS}
    assert read(row).messages[3] == {"role": "assistant", "content": "Once more.", "tool_calls": CALLS}


def without(row: dict[str, Any], place: int) -> dict[str, Any]:
    return row | {"messages": [turn for number, turn in enumerate(row["messages"]) if number != place]}


def with_turn(turn: dict[str, Any]) -> dict[str, Any]:
    row = openai_row()
    return row | {"messages": [*row["messages"], turn, {"role": "assistant", "content": "x"}]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (without(openai_row(), 3), "does not end with an answer"),
        (
            with_turn({"role": "user", "content": "3", "tool_calls": CALLS}),
            "message 5: a message of user has tool calls",
        ),
        (
            with_turn({"role": "user", "content": "3", "reasoning_content": "x"}),
            "message 5: a message of user has reasoning",
        ),
        (with_turn({"role": "user", "content": "3", "tool_calls": "add"}), "message 5: its tool calls are a text"),
        (openai_row(1), "message 2: call 1 is no object with the 'name' of a tool"),
        (openai_row({"function": {"arguments": {}}}), "message 2: call 1 is no object with the 'name' of a tool"),
        (openai_row({"name": "add"}), "message 2: call 1 (add): 'arguments' are neither an object nor the JSON text"),
        (openai_row({"name": "add", "arguments": "{"}), "call 1 (add): 'arguments' are neither an object nor"),
        (
            openai_row({"name": "add", "arguments": "[" * 100_000}),
            "call 1 (add): 'arguments' are neither an object nor",
        ),
        (openai_row({"name": "add", "arguments": '{"a": "\\ud800"}'}), "message 2: holds an unpaired UTF-16 surrogate"),
        (openai_row(tools="add"), "'tools' is neither a list nor the JSON text of one"),
        (openai_row(tools={"name": "add"}), "'tools' is neither a list nor the JSON text of one"),
        (openai_row(tools=["add"]), "entry 1 of 'tools' is no object with a 'name'"),
        (openai_row(tools=[ADD, {"type": "function"}]), "entry 2 of 'tools' is no object with a 'name'"),
        (openai_row(tools=[ADD | {"description": "\ud800"}]), "'tools' holds an unpaired UTF-16 surrogate"),
        (sharegpt_row("add(1)"), "message 2: its call is neither a JSON object nor a list of some"),
        (sharegpt_row("[]"), "message 2: its call is neither a JSON object nor a list of some"),
        (sharegpt_row('{"tool": "add"}'), "message 2: call 1 is no object with the 'name' of a tool"),
        (sharegpt_row("3"), "message 2: its tool calls are a number, not a list"),
    ],
)
def test_a_row_of_tools_that_cannot_be_trained_on_is_named(row: Any, words: str) -> None:
    told = read_or_refuse(row)
    assert isinstance(told, str)
    assert words in told


def test_training_says_which_format_a_file_is_in(cli: Callable[..., Result], random_qwen: Path, tmp_path: Path) -> None:
    chats, pairs = tmp_path / "chats.jsonl", tmp_path / "pairs.json"
    chats.write_text("".join(json.dumps(ROWS["sharegpt"]) + "\n" for _ in range(6)), encoding="utf-8")
    pairs.write_text(json.dumps([{"q": f"{n}+1?", "a": str(n + 1)} for n in range(6)]), encoding="utf-8")
    done = cli(
        "sft", "--model.base", random_qwen, "--data.train", chats, "--data.train", pairs,
        "--data.columns", "instruction=q", "--data.columns", "output=a", "--data.placeholders", "name=Ada",
        "--training.max_steps", "1", "--output", tmp_path / "run",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "chats.jsonl (6 sharegpt), pairs.json (6 alpaca)" in " ".join(done.stderr.split())
