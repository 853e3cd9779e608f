"""Shortened conversations: they fit exactly where they can, read as the template writes them, and keep their end."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pytest
from conftest import TINY_QWEN, example_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from loratune.data.encoding.encoder import IGNORED, Encoder, Example
from loratune.data.encoding.truncation import shorten
from loratune.data.formats.conversation import Conversation, Message
from loratune.recipe.sections import PromptSettings

WORDS = "How much is one and one? Say it in few words. "


def make_encoder(template: str = "chat", trl_template: str = "", **options: Any) -> Encoder:
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    if trl_template:
        tokenizer.chat_template = (files("trl") / "chat_templates" / f"{trl_template}.jinja").read_text("utf-8")
    return Encoder(tokenizer, PromptSettings(template=template, **options))  # type: ignore[arg-type]


ENCODERS = {"chat": make_encoder(), "alpaca": make_encoder("alpaca"), "plain": make_encoder("plain", system="Be kind.")}
ENCODER = ENCODERS["chat"]


def conversation(*texts: str, system: str | None = "Be brief.") -> Conversation:
    first: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    roles: Any = ("user", "assistant")
    spoken: list[Message] = [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]
    return Conversation((*first, *spoken))


def cut(
    row: Conversation, max_length: int, policy: str = "truncate_prompt", encoder: Encoder = ENCODER, **options: Any
) -> list[Example]:
    options = {"train_on": "all", "train_thinking": True} | options
    return shorten(encoder, row, max_length, policy, **options)


def length(row: Conversation, encoder: Encoder = ENCODER) -> int:
    return len(encoder.encode(row, "last")[0].input_ids)


def text_of(example: Example, encoder: Encoder = ENCODER) -> str:
    return str(encoder.tokenizer.decode(example.input_ids.tolist()))


def learnt(example: Example) -> list[int]:
    return [label for label in example.labels.tolist() if label != IGNORED]


# --- less of the prompt ---


@pytest.mark.parametrize("name", ENCODERS)
def test_the_beginning_of_the_only_question_is_cut_until_it_fits_exactly(name: str) -> None:
    encoder = ENCODERS[name]
    row = conversation(WORDS * 20, "Two.")
    shortest, whole = length(conversation("x", "Two."), encoder), length(row, encoder)
    for max_length in range(shortest, whole, 61):
        (example,) = cut(row, max_length, encoder=encoder)
        assert len(example.input_ids) == max_length
        assert learnt(example) == encoder.answer_ids("Two.")
        prompt = example.input_ids.tolist()[: -len(learnt(example))]
        assert any(
            prompt == encoder.prompt_ids(conversation((WORDS * 20)[-kept:], "Two.").messages[:-1])
            for kept in range(1, len(WORDS) * 20)
        )


def test_the_earliest_turns_go_first_and_the_system_message_never() -> None:
    row = conversation("first?", "one", "second?", "two", "third?", "three")
    kept = conversation("second?", "two", "third?", "three")
    (example,) = cut(row, length(kept), train_on="last")
    assert example == ENCODER.encode(kept, "last")[0]
    (example,) = cut(row, length(kept) - 1, train_on="last")
    assert example == ENCODER.encode(conversation("third?", "three"), "last")[0]


def test_the_last_question_is_cut_once_all_other_turns_are_gone() -> None:
    row = conversation("first?", "one", WORDS * 5, "two")
    (example,) = cut(row, length(conversation(WORDS, "two")), train_on="last")
    assert len(example.input_ids) == length(conversation(WORDS, "two"))
    assert text_of(example).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert "one" not in text_of(example).partition("user\n")[2].replace("one and one", "")
    assert "few words. <|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>" in text_of(example)


def test_results_of_tools_stay_with_their_question() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    calls = "(message.tool_calls | tojson if message.tool_calls else '') + "
    tokenizer.chat_template = tokenizer.chat_template.replace("message.content + ", f"message.content + {calls}")
    encoder = Encoder(tokenizer, PromptSettings())
    called = {"type": "function", "function": {"name": "add", "arguments": {}}}
    messages: Any = (
        {"role": "user", "content": "first?"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": WORDS * 9},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    )
    (example,) = cut(Conversation(messages), 130, encoder=encoder, train_on="last")
    text = text_of(example, encoder)
    assert len(example.input_ids) == 130
    assert "first?" not in text
    assert text.endswith("<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>")


def test_nothing_is_left_where_one_character_is_too_much() -> None:
    row = conversation(WORDS, "Two.")
    shortest = length(conversation(WORDS[-1], "Two."))
    assert len(cut(row, shortest)) == 1
    assert cut(row, shortest - 1) == []


def test_an_instruction_prefix_is_not_cut() -> None:
    encoder = make_encoder(instruction_prefix="Please: ")
    (example,) = cut(conversation(WORDS * 9, "Two."), 60, encoder=encoder)
    assert len(example.input_ids) == 60
    assert "<|im_start|>user\nPlease: " in text_of(example, encoder)


# --- less of the answer ---


def test_a_cut_answer_has_its_prompt_and_no_end() -> None:
    row = conversation("Tell me all.", WORDS * 9)
    prompt, answer = ENCODER.prompt_ids(row.messages[:-1]), ENCODER.answer_ids(WORDS * 9)
    for room in (1, 10, len(answer) - 1):
        (example,) = cut(row, len(prompt) + room, "truncate_answer")
        assert example == example_of(prompt + answer[:room], [IGNORED] * len(prompt) + answer[:room])
    assert cut(row, len(prompt), "truncate_answer") == []
    assert cut(row, len(prompt) - 5, "truncate_answer") == []


def test_an_answer_cut_within_reasoning_that_is_not_learnt_is_none() -> None:
    row = conversation("Why?", f"<think>\n{WORDS * 9}\n</think>\n\n{WORDS}")
    prompt, whole = len(ENCODER.prompt_ids(row.messages[:-1])), length(row)
    assert cut(row, prompt + 20, "truncate_answer", train_thinking=False) == []
    (example,) = cut(row, whole - 3, "truncate_answer", train_thinking=False)
    assert ENCODER.tokenizer.decode(learnt(example)) == ENCODER.tokenizer.decode(ENCODER.answer_ids(WORDS)[:-3])


# --- several turns ---


@pytest.mark.parametrize("policy", ["truncate_prompt", "truncate_answer"])
def test_what_fits_is_left_as_it_is(policy: str) -> None:
    row = conversation("a", "b", "c", "d")
    for encoder in (ENCODER, make_encoder(trl_template="qwen3")):
        assert cut(row, 10_000, policy, encoder) == encoder.encode(row)


def test_only_turns_that_are_too_long_are_cut() -> None:
    row = conversation("first?", "one", "second?", "two", WORDS * 9, "three", system=None)
    limit = length(conversation("first?", "one", "second?", "two", system=None))
    early, late = cut(row, limit)
    assert [early] == ENCODER.encode(conversation("first?", "one", "second?", "two", system=None))
    assert learnt(late) == ENCODER.answer_ids("three")
    assert len(late.input_ids) == limit
    early, late = cut(row, length(row) - 2, "truncate_answer")
    assert learnt(early) == ENCODER.answer_ids("one") + ENCODER.answer_ids("two")
    assert late.input_ids.tolist() == ENCODER.encode(row, "last")[0].input_ids.tolist()[:-2]
    assert learnt(late) == ENCODER.answer_ids("three")[:-2]


def test_answers_that_a_row_leaves_out_stay_out() -> None:
    row = conversation("first?", "one", "second?", "two", WORDS * 9, "three", system=None)
    row = Conversation(row.messages, untrained=frozenset({1, 5}))
    (example,) = cut(row, length(row) + 1)
    assert learnt(example) == ENCODER.answer_ids("two")
    (example,) = cut(row, len(ENCODER.encode(row)[0].input_ids) - 1)
    assert learnt(example) == ENCODER.answer_ids("two")
    assert "first?" not in text_of(example)


TEXTS = st.text(st.sampled_from("ab \n.é你😀"), min_size=1, max_size=30) | st.just("<|im_end|> x")


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4),
    system=st.none() | TEXTS,
    max_length=st.integers(1, 120),
    policy=st.sampled_from(["truncate_prompt", "truncate_answer"]),
    train_on=st.sampled_from(["all", "last"]),
    name=st.sampled_from([*ENCODERS]),
)
def test_any_conversation_is_cut_to_its_limit(
    texts: list[tuple[str, str]], system: str | None, max_length: int, policy: str, train_on: str, name: str
) -> None:
    encoder = ENCODERS[name]
    row = conversation(*[text for turn in texts for text in turn], system=system)
    answers = [encoder.answer_ids(text) for _, text in texts][-1 if train_on == "last" else 0 :]
    examples = cut(row, max_length, policy, encoder, train_on=train_on)
    for example in examples:
        assert len(example.labels) == len(example.input_ids) <= max_length
        assert all(
            label in (IGNORED, token)
            for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True)
        )
        assert learnt(example)
    if policy == "truncate_prompt":
        assert all(answer in answers for answer in _answers(examples, encoder.end_id))
    else:
        turns = [Conversation(row.messages[: place + 1]) for place in row.trained_answers(train_on)]
        ended = sum(learnt(example).count(encoder.end_id) for example in examples)
        assert ended == sum(length(turn, encoder) <= max_length for turn in turns)


def _answers(examples: list[Example], end_id: int) -> list[list[int]]:
    """What is learnt, answer by answer."""
    found: list[list[int]] = [[]]
    for example in examples:
        for token in learnt(example):
            found[-1].append(token)
            if token == end_id:
                found.append([])
    assert found.pop() == []
    return found
