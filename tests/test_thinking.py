"""How prompts ask for reasoning, against transformers' own renderings of the templates that TRL ships."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_QWEN
from test_chat_template import CHATML, CLI, encoder_of, model_folder, shipped, tokenizer_of

from loratune.data.encoding.encoder import IGNORED, Encoder
from loratune.data.formats.chat_rows import read_message
from loratune.data.formats.conversation import Conversation, Message
from loratune.data.template import rendering
from loratune.data.template.chat_template import study_template
from loratune.delivery import template as delivered
from loratune.delivery.template import portable_template
from loratune.errors import Exit, LoratuneError
from loratune.recipe.sections import TEMPLATE_ARGUMENTS, PromptSettings, Recipe
from loratune.runs.card import write_card
from loratune.runs.record import RunRecord

KEEP: dict[str, Any] = {"enable_thinking": True, "preserve_thinking": True}
# In thinking mode.
READS = {
    "qwen2_5": set(),
    "qwen3": {"enable_thinking"},
    "qwen3_instruct_2507": set(),
    "qwen3_5_think": {"enable_thinking"},
    "qwen3_5_nothink": {"enable_thinking"},
    "qwen3_6": {"enable_thinking", "preserve_thinking"},
    "qwen3_8": {"enable_thinking", "preserve_thinking", "reasoning_effort"},
    "gptoss": {"reasoning_effort"},
    "gemma4_v5": {"enable_thinking", "preserve_thinking"},
    "glm4moe": {"enable_thinking"},
    "lfm2_2_5": {"preserve_thinking"},
    "cohere": set(),
    "deepseek_r1_distill": set(),
}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{name} {json.dumps(settings)}": (name, settings)
    for name, listed in {
        "qwen3": ({}, {"enable_thinking": True}),
        "qwen3_5_nothink": ({}, {"enable_thinking": True}),
        "qwen3_5_think": ({}, {"enable_thinking": True}),
        "qwen3_6": ({}, KEEP, {"preserve_thinking": True}, {"enable_thinking": True, "preserve_thinking": False}),
        "qwen3_8": ({}, KEEP, {"preserve_thinking": False}, {"enable_thinking": True, "reasoning_effort": "low"}),
    }.items()
    for settings in listed
}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}


def answer(text: str, reasoning: str = "", calls: Any = None) -> Message:
    """An answer as rows give it."""
    turn: dict[str, Any] = {"role": "assistant", "content": text}
    turn |= {"reasoning_content": reasoning} if reasoning else {}
    read = read_message(turn | ({"tool_calls": calls} if calls else {}))
    assert not isinstance(read, str), read
    return read


def question(text: str) -> Message:
    return {"role": "user", "content": text}


def call(arguments: Any) -> list[dict[str, Any]]:
    return [{"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}]


ROWS: dict[str, tuple[Message, ...]] = {
    "plain": (question("a"), answer("one"), question("b"), answer("two"), question("c"), answer("three")),
    "reasoned": (question("a"), answer("one", "x"), question("b"), answer("two", "y\n\nz")),
    "mixed": (question("a"), answer("one", "x"), question("b"), answer("two"), question("c"), answer("three", "y")),
    "tools": (
        question("1+2?"),
        answer("", "x", call({"a": 1, "b": 2})),
        {"role": "tool", "content": "3"},
        answer("three", "y"),
        question("b"),
        answer("two", "z"),
    ),
}


def as_clients_send(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """Messages with reasoning in a key of its own."""
    sent = []
    for message in messages:
        thought, closing, text = message["content"].partition("\n</think>\n\n")
        apart = {"content": text, "reasoning_content": thought.removeprefix("<think>\n")} if closing else {}
        sent.append({**message, **apart})
    return sent


def rendered(encoder: Encoder, messages: tuple[Message, ...], tools: Any = (), **options: Any) -> str:
    """What transformers makes of messages with the settings' arguments, without loratune."""
    given = {name: getattr(encoder.settings, name) for name in TEMPLATE_ARGUMENTS}
    arguments = {name: value for name, value in given.items() if value is not None}
    sent = as_clients_send(messages)
    return str(encoder.tokenizer.apply_chat_template(sent, list(tools) or None, tokenize=False, **arguments, **options))


def trained(encoder: Encoder, labels: Any) -> list[str]:
    """The text of each block of trained tokens."""
    blocks: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORED:
            blocks[-1].append(label)
        elif blocks[-1]:
            blocks.append([])
    return [encoder.tokenizer.decode(block) for block in blocks if block]


# --- what a template reads ---


@pytest.mark.parametrize("template", READS)
def test_the_arguments_that_change_prompts_are_found_by_rendering(template: str) -> None:
    encoder = encoder_of(shipped(template), enable_thinking=True)
    assert {name for name in TEMPLATE_ARGUMENTS if encoder.reads(name)} == READS[template]


def test_the_words_of_a_template_are_not_searched() -> None:
    mentioned = "{# reasoning_effort preserve_thinking enable_thinking reasoning_content #}" + CHATML
    encoder = encoder_of(mentioned)
    assert not any(encoder.reads(name) for name in TEMPLATE_ARGUMENTS)
    assert encoder.reasoning is None
    assert not encoder.reads_reasoning
    # What another name hides is found.
    hidden = "{% set mode = [enable_thinking] %}" + CHATML + "{{ 'Think!' if mode[0] and add_generation_prompt }}"
    assert encoder_of(hidden).reads("enable_thinking")


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    "template", [*(name for name in READS if name.startswith("qwen3")), "glm4moe", "deepseek_r1_distill", "qwen2_5"]
)
def test_the_thinking_mode_is_described_as_transformers_renders_it(template: str, thinking: bool) -> None:
    encoder = encoder_of(shipped(template), enable_thinking=thinking)
    said = encoder.reasoning
    assert (said is None) is (template in ("qwen2_5", "qwen3_instruct_2507"))
    if said is None:
        return
    ask = [{"role": "user", "content": "?"}]
    tokenizer, options = encoder.tokenizer, {"tokenize": False, "add_generation_prompt": True}
    usual, on, off = (
        tokenizer.apply_chat_template(ask, **options, **mode)
        for mode in ({}, {"enable_thinking": True}, {"enable_thinking": False})
    )
    assert said.is_enabled is thinking
    assert said.by_default == (None if on == off else usual == on)
    prompt = on if thinking else off
    assert prompt.endswith(said.prompt_end)
    assert prompt.count("<think>") == said.prompt_end.count("<think>")
    assert said.keeps_earlier is ("loratune" in rendered(encoder, (*ask, answer("one", "loratune"), *ask)))  # type: ignore[arg-type]
    assert bool(said.instruction) is (template == "qwen3_8" and thinking)


@pytest.mark.parametrize(
    ("template", "settings", "told"),
    [
        ("qwen2_5", {"preserve_thinking": True}, ["prompt.preserve_thinking is set, but the chat template (chat)"]),
        ("qwen3_5_think", {"preserve_thinking": False, "reasoning_effort": "low"},
         ["prompt.preserve_thinking is set", "prompt.reasoning_effort is set"]),
        ("qwen3_8", {"reasoning_effort": "low"}, ["does not read it while prompt.enable_thinking is false"]),
        ("qwen3_8", {"template": "plain", "reasoning_effort": "low"}, ["the chat template (plain) does not read it; "]),
        ("cohere", {"reasoning_effort": "low"}, ["prompt.reasoning_effort is set"]),
    ],
)  # fmt: skip
def test_a_setting_that_the_template_does_not_read_is_refused_by_name(
    template: str, settings: dict[str, Any], told: list[str]
) -> None:
    with pytest.raises(LoratuneError) as caught:
        Encoder(tokenizer_of(shipped(template)), PromptSettings(**settings))
    assert all(text in caught.value.message for text in told)
    assert caught.value.exit_code == Exit.USAGE


def test_an_effort_that_the_template_does_not_know_is_refused_with_its_words() -> None:
    with pytest.raises(LoratuneError, match=r"with prompt\.reasoning_effort 'huge': Unexpected reasoning effort huge"):
        encoder_of(shipped("qwen3_8"), enable_thinking=True, reasoning_effort="huge")
    encoder_of(shipped("qwen3_8"), enable_thinking=True, reasoning_effort="xhigh")  # the default, but read


# --- prompts and labels ---


@pytest.mark.parametrize(
    ("case", "row"),
    [  # rows with reasoning go with prompts that ask for it
        (case, row)
        for case, (_, settings) in SETTINGS.items()
        for row in ROWS
        if row == "plain" or settings.get("enable_thinking")
    ],
)
def test_every_answer_is_trained_after_the_prompt_that_transformers_renders(case: str, row: str) -> None:
    template, settings = SETTINGS[case]
    encoder = encoder_of(shipped(template), **settings)
    messages, tools = ROWS[row], (TOOL,) if row == "tools" else ()
    sequences = assert_as_rendered(encoder, messages, tools)
    keeps = settings.get("preserve_thinking", template == "qwen3_8")
    if keeps:
        assert sequences == 1
    elif row != "tools":  # an answer after the result of a tool belongs to the same question
        assert sequences == sum(message["role"] == "assistant" for message in messages)


def assert_as_rendered(encoder: Encoder, messages: tuple[Message, ...], tools: Any = ()) -> int:
    """Compare each trained answer and its prompt with transformers' renderings; returns the number of sequences."""
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    examples = encoder.encode(Conversation(messages, tools=tools))
    learnt = [text for example in examples for text in trained(encoder, example.labels.tolist())]
    for place, said in zip(places, learnt, strict=True):
        prompt = rendered(encoder, messages[:place], tools, add_generation_prompt=True)
        whole = rendered(encoder, messages[: place + 1], tools)
        assert prompt + said == whole.removesuffix("\n")  # up to the end token, the block closed once
        assert encoder.tokenizer.decode(encoder.prompt_ids(messages[:place], tools)) == prompt
    texts = [encoder.tokenizer.decode(example.input_ids.tolist()) for example in examples]
    assert texts[-1] == rendered(encoder, messages, tools).removesuffix("\n")
    return len(examples)


@pytest.mark.parametrize(
    ("fact", "row"), [("begun_reasoning", "reasoned"), ("answer_start", "plain")]
)  # the block opened twice, and never closed
def test_a_wrong_fact_about_the_block_is_caught(fact: str, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def study_wrongly(*arguments: Any) -> Any:
        return replace(study_template(*arguments), **{fact: ""})

    assert_as_rendered(encoder_of(shipped("qwen3_8"), **KEEP), ROWS[row])
    monkeypatch.setattr(rendering, "study_template", study_wrongly)
    encoder = encoder_of(shipped("qwen3_8"), **KEEP)
    with pytest.raises(AssertionError):
        assert_as_rendered(encoder, ROWS[row])
    assert encoder.leaves_reasoning_open is (fact == "answer_start")  # which refuses such rows


@pytest.mark.parametrize("template", ["qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8"])
@pytest.mark.parametrize("block", ["<think>\n\n</think>\n\n", "<think></think>", "\n<think>\n</think>\n"])
def test_an_empty_block_that_the_prompt_has_already_is_not_trained_again(template: str, block: str) -> None:
    encoder = encoder_of(shipped(template))
    messages = (question("a"), {"role": "assistant", "content": f"{block}one"})
    (example,) = encoder.encode(Conversation(messages))  # type: ignore[arg-type]
    text = encoder.tokenizer.decode(example.input_ids.tolist())
    assert text == rendered(encoder, (question("a"), answer("one"))).removesuffix("\n")
    assert text.count("<think>") == 1
    assert trained(encoder, example.labels.tolist()) == ["one<|im_end|>"]


@pytest.mark.parametrize("settings", [{"enable_thinking": True}, {"enable_thinking": True, "preserve_thinking": True}])
def test_reasoning_may_be_left_out_of_what_a_shared_sequence_trains(settings: dict[str, Any]) -> None:
    encoder = encoder_of(shipped("qwen3_6"), **settings)
    examples = encoder.encode(Conversation(ROWS["mixed"]), train_thinking=False)
    learnt = [text for example in examples for text in trained(encoder, example.labels.tolist())]
    assert learnt == ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"]
    whole = encoder.encode(Conversation(ROWS["mixed"]))
    assert [example.input_ids for example in examples] == [example.input_ids for example in whole]


@pytest.mark.parametrize("template", ["qwen3", "qwen3_5_think", "qwen3_8"])
def test_arguments_of_calls_may_be_the_text_of_an_object(template: str) -> None:
    encoder = encoder_of(shipped(template), enable_thinking=True)
    ids = [
        encoder.encode(Conversation((question("1+2?"), answer("", "x", call(arguments))), tools=(TOOL,)))
        for arguments in ({"a": 1, "b": 2}, '{"a": 1, "b": 2}')
    ]
    assert ids[0] == ids[1]


# --- findings ---


def check(cli: CLI, base: Path, rows: Path, *flags: str) -> dict[str, Any]:
    given = ["--model.base", base, "--data.train", rows, "--data.validation", "0"]
    report: dict[str, Any] = json.loads(cli("data", "check", *given, "--json", *flags).stdout)
    return report


def test_a_block_that_is_never_closed_refuses_its_rows(tmp_path: Path, cli: CLI) -> None:
    base = model_folder(tmp_path / "base", shipped("qwen3_5_think"))
    outputs = ["one", "<think>\nx\n</think>\n\ntwo", "<think>\nnever ended", "on <think> and its end"]
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": f"{place}?", "output": text} for place, text in enumerate(outputs)]))
    thinking = ("--prompt.enable_thinking",)
    for flags, count in [
        ((), 1),
        (thinking, 1),
        ((*thinking, "--prompt.generation_prompt", "template"), 3),  # which closes no block
        ((*thinking, "--data.remove", "open_reasoning"), 0),
    ]:
        report = check(cli, base, rows, *flags)
        refusing = {one["name"]: one["count"] for one in report["findings"] if one["level"] == "refuse"}
        assert refusing == ({"open_reasoning": count} if count else {}), flags
        assert report["refused"] is bool(count)


def test_the_check_says_how_prompts_ask_for_reasoning(tmp_path: Path, cli: CLI) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": "a?", "output": "one"}]))
    base = model_folder(tmp_path / "base", shipped("qwen3_5_nothink"))
    report = check(cli, base, rows, "--prompt.enable_thinking")
    assert report["reasoning"] == {
        "is_enabled": True,
        "by_default": False,
        "prompt_end": "<think>\n",
        "answer_start": "\n</think>\n\n",
        "keeps_earlier": False,
        "instruction": "",
    }
    assert check(cli, base, rows, "--prompt.enable_thinking") == report  # from the cache
    assert check(cli, TINY_QWEN, rows)["reasoning"] is None


def test_the_adapter_s_card_names_the_arguments_that_are_set(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"model": {"base": "x"}, "data": {"train": ["a.json"]}, "prompt": KEEP})
    write_card(tmp_path, RunRecord.of(recipe))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| chat, enable_thinking=True, preserve_thinking=True |" in card
    assert "reasoning_effort" not in card


# --- merged models ---


@pytest.mark.parametrize("case", [*SETTINGS, "lfm2_2_5"])
def test_a_merged_template_prompts_without_arguments_as_the_training_did(case: str) -> None:
    template, settings = SETTINGS.get(case, ("lfm2_2_5", {"preserve_thinking": True}))
    encoder = encoder_of(shipped(template), **settings)
    merged = tokenizer_of(portable_template(encoder) or shipped(template))
    for messages in (ROWS["plain"][:-1], ROWS["reasoned"][:-1], ROWS["mixed"][:-1]):
        prompt = merged.apply_chat_template(as_clients_send(messages), tokenize=False, add_generation_prompt=True)
        assert prompt == encoder.tokenizer.decode(encoder.prompt_ids(messages))
    asked = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": not encoder.settings.enable_thinking}
    if encoder.reads("enable_thinking") and not encoder.settings.reasoning_effort:  # whoever asks still gets it
        rest = {name: value for name, value in settings.items() if name != "enable_thinking"}
        expected = encoder.tokenizer.apply_chat_template([question("a")], **asked, **rest)
        assert merged.apply_chat_template([question("a")], **asked) == expected


@pytest.mark.parametrize(
    ("template", "settings"),
    [
        ("qwen3_5_think", {}),
        ("qwen3_6", KEEP),
        ("qwen3_8", {"preserve_thinking": False}),
        ("qwen3_8", {"enable_thinking": True, "reasoning_effort": "low"}),
        ("lfm2_2_5", {"preserve_thinking": True}),  # whose prompts differ by earlier reasoning alone
    ],
)
def test_a_merged_template_with_another_default_is_caught(
    template: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(shipped(template), **settings)
    assert portable_template(encoder)
    monkeypatch.setattr(delivered, "ARGUMENT", "{{# {name} {value} #}}")
    with pytest.raises(LoratuneError, match="cannot be put into the tokenizer's chat template"):
        portable_template(encoder)
