"""What is found out about chat templates by rendering them, against transformers' own renderings and the calendar."""

from __future__ import annotations

import copy
import datetime
import json
import shutil
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_QWEN
from transformers import AddedToken, AutoTokenizer
from typer.testing import Result

from loratune.data.encoding.encoder import IGNORED, Encoder
from loratune.data.formats.conversation import Conversation, Message
from loratune.data.template.chat_template import DIRECTIVES, MOMENTS, fixed_moment
from loratune.delivery.export.gguf.vocabulary import describe_vocabulary
from loratune.delivery.template import write_portable_template
from loratune.errors import Exit, LoratuneError
from loratune.model.tokenizer import load_tokenizer
from loratune.recipe.sections import PromptSettings
from loratune.runs.tokenizer_files import copy_tokenizer_files, tokenizer_sha256

CLI = Callable[..., Result]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WITHOUT_PROMPT = CHATML.partition("{% if")[0]
WITH_TOOLS = "{{ 'TOOLS' }}{% for tool in tools %}{{ tool.function.name }}{% endfor %}{{ '\\n' }}" + CHATML
DATED = "{{ '<|im_start|>system\\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}" + CHATML
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
QUESTION: list[Message] = [{"role": "user", "content": "Who are you?"}]
SPOKEN: list[Message] = [*QUESTION, {"role": "assistant", "content": "One."}, {"role": "user", "content": "And now?"}]


def tokenizer_of(template: Any, **tokens: Any) -> Any:
    """The practice model's tokenizer with Qwen3's reasoning tokens and a template of one text or of several."""
    tokenizer = copy.copy(_tokenizer(**tokens))
    tokenizer.chat_template = template
    return tokenizer


@cache
def _tokenizer(**tokens: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN, **tokens)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    return tokenizer


def encoder_of(template: Any, **settings: Any) -> Encoder:
    return Encoder(tokenizer_of(template), PromptSettings(**settings))


def shipped(name: str) -> str:
    """A template that TRL ships."""
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text("utf-8")


def prompt_text(encoder: Encoder, messages: list[Message], tools: Any = ()) -> str:
    return str(encoder.tokenizer.decode(encoder.prompt_ids(messages, tools)))


def row(*texts: str, tools: Any = ()) -> Conversation:
    turns = ({"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(texts))
    return Conversation(tuple(turns), tools=tools)  # type: ignore[arg-type]


def learnt(encoder: Encoder, conversation: Conversation, **options: Any) -> str:
    (example,) = encoder.encode(conversation, **options)
    return str(encoder.tokenizer.decode([label for label in example.labels if label != IGNORED]))


def model_folder(folder: Path, template: Any, source: Path = TINY_QWEN, named: dict[str, str] | None = None) -> Path:
    """A model with one template, with several in the tokenizer's config, or with others in files of their own."""
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").unlink()
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        path = folder / "tokenizer_config.json"
        listed = [{"name": name, "template": text} for name, text in template.items()]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": listed}))
    for name, text in (named or {}).items():
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text, encoding="utf-8")
    return folder


# --- named templates ---


@pytest.mark.parametrize("tools", [[], [TOOL]])
@pytest.mark.parametrize("is_listed", [True, False])
def test_of_several_templates_the_one_that_transformers_takes_renders(
    tmp_path: Path, is_listed: bool, tools: list[dict[str, Any]]
) -> None:
    named = {"tool_use": WITH_TOOLS, "rag": "{{ 'RAG' }}"}
    folder = (
        model_folder(tmp_path / "base", {"default": CHATML, **named})
        if is_listed
        else model_folder(tmp_path / "base", CHATML, named=named)
    )
    encoder = Encoder(load_tokenizer(folder), PromptSettings())
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        SPOKEN, tools=tools or None, add_generation_prompt=True, return_dict=False
    )
    assert encoder.prompt_ids(SPOKEN, tools) == expected
    (example,) = encoder.encode(row("a", "one", tools=tuple(tools)))
    assert encoder.tokenizer.decode(example.input_ids.tolist()).startswith("TOOLS") is bool(tools)


def test_several_templates_without_a_default_are_refused_with_their_names() -> None:
    with pytest.raises(LoratuneError, match=r"several chat templates \(rag, tool_use\)") as caught:
        encoder_of({"tool_use": WITH_TOOLS, "rag": CHATML})
    assert caught.value.exit_code == Exit.MODEL
    Encoder(tokenizer_of({"tool_use": WITH_TOOLS}), PromptSettings(template="plain"))


def test_the_hash_covers_the_templates_that_are_used_and_no_other() -> None:
    known = encoder_of({"default": CHATML, "tool_use": WITH_TOOLS, "rag": "a"}).template_sha256
    assert encoder_of({"default": CHATML, "tool_use": WITH_TOOLS}).template_sha256 == known
    assert encoder_of({"default": CHATML, "tool_use": WITH_TOOLS + "x"}).template_sha256 != known
    assert encoder_of({"default": CHATML, "tool_use": CHATML}).template_sha256 == encoder_of(CHATML).template_sha256


def test_a_template_for_tools_that_ends_answers_otherwise_is_refused_for_rows_with_tools_alone() -> None:
    encoder = encoder_of({"default": CHATML, "tool_use": WITH_TOOLS.replace("<|im_end|>", "<|endoftext|>")})
    encoder.encode(row("a", "one"))
    with pytest.raises(LoratuneError, match="ends answers with another token") as caught:
        encoder.encode(row("a", "one", tools=(TOOL,)))
    assert caught.value.exit_code == Exit.DATA


@pytest.mark.parametrize("is_listed", [True, False])
@pytest.mark.parametrize("settings", [{}, {"system": "Be brief."}])
@pytest.mark.parametrize("ending", ["", "\n", "\n\n", "{%- if false %}{% endif %}\n", " \n  "])
def test_a_merged_folder_renders_named_templates_as_the_training_did(
    tmp_path: Path, is_listed: bool, settings: dict[str, Any], ending: str
) -> None:
    texts = {"default": CHATML + ending, "tool_use": "\n" + WITH_TOOLS + ending}
    base = (
        model_folder(tmp_path / "base", texts)
        if is_listed
        else model_folder(tmp_path / "base", texts["default"], named={"tool_use": texts["tool_use"]})
    )
    encoder, merged = Encoder(load_tokenizer(base), PromptSettings(**settings)), tmp_path / "merged"
    merged.mkdir()
    copy_tokenizer_files(base, merged)
    assert tokenizer_sha256(merged) == tokenizer_sha256(base)
    assert write_portable_template(encoder, merged) is bool(settings)
    plain = AutoTokenizer.from_pretrained(merged)
    for messages in (QUESTION, SPOKEN, [{"role": "system", "content": "s"}, *SPOKEN]):
        for tools in ([], [TOOL]):
            options: dict[str, Any] = {"tools": tools or None, "add_generation_prompt": True, "return_dict": False}
            assert plain.apply_chat_template(messages, **options) == encoder.prompt_ids(messages, tools)


def test_another_named_template_is_another_tokenizer(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", CHATML, named={"tool_use": WITH_TOOLS})
    before = tokenizer_sha256(base)
    (base / "additional_chat_templates" / "tool_use.jinja").write_text(WITH_TOOLS + "x")
    assert tokenizer_sha256(base) != before


def test_a_gguf_file_names_the_template_for_tools(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", {"default": CHATML, "tool_use": WITH_TOOLS, "rag": "a"})
    keys = describe_vocabulary(base, json.loads((base / "config.json").read_text())["vocab_size"])
    assert keys["tokenizer.chat_template"] == CHATML
    assert keys["tokenizer.chat_template.tool_use"] == WITH_TOOLS
    assert keys["tokenizer.chat_templates"] == ["tool_use"]


# --- generation prompts ---


@pytest.mark.parametrize("ending", ["", "\n", "\n\n"])
def test_a_template_that_ignores_the_generation_prompt_is_completed_with_its_own_header(ending: str) -> None:
    plain, encoder = tokenizer_of(WITHOUT_PROMPT + ending), encoder_of(WITHOUT_PROMPT + ending)
    for count in (1, 3):
        whole = plain.apply_chat_template([*SPOKEN[:count], {"role": "assistant", "content": "ANSWER"}], tokenize=False)
        assert prompt_text(encoder, SPOKEN[:count]) == whole.partition("ANSWER")[0]
    assert learnt(encoder, row("a", "one")) == "one<|im_end|>"
    assert "ignores add_generation_prompt: prompts are completed" in encoder.remarks[0]
    as_it_is = Encoder(plain, PromptSettings(generation_prompt="template"))
    assert prompt_text(as_it_is, QUESTION) == plain.apply_chat_template(QUESTION, tokenize=False)
    assert as_it_is.remarks == []


@pytest.mark.parametrize(
    ("template", "completion", "start"),
    [
        (CHATML, "", ""),
        # Of the kind of [INST] … [/INST]: the question's end asks, and a blank stands before each answer.
        ("{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else ' ' + m.content + eos_token }}"
         "{% endfor %}", "", " "),
        # The prompt asks without the blank that the template writes before its answers.
        ("{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}", "", " "),
        # It asks with more than it writes.
        ("{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}", "", ""),
        # The same without a prompt of its own: the blank belongs to the answer.
        ("{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}", "assistant:", " "),
        # A prompt that always stands there.
        (WITHOUT_PROMPT + "{{ '<|im_start|>assistant\\n' }}", "", ""),
        # The header comes with an empty block, which prompts without thinking hold.
        ("{% for m in messages %}{{ m.role + ':' + ('<think></think>' if m.role == 'assistant' else '') + m.content "
         "+ eos_token }}{% endfor %}", "assistant:<think></think>", ""),
    ],
)  # fmt: skip
def test_answers_go_on_where_prompts_end(template: str, completion: str, start: str) -> None:
    encoder = encoder_of(template)
    assert (encoder.record["completion"], encoder.answer_start) == (completion, start)
    assert learnt(encoder, row("a", "one")) == f"{start}one{encoder.tokenizer.decode([encoder.end_id])}"
    assert encoder.encode(row("a", "one"))[0].input_ids.tolist() == encoder.prompt_ids(
        [{"role": "user", "content": "a"}]
    ) + encoder.answer_ids("one")


def test_a_header_is_completed_before_reasoning() -> None:
    template = (
        "{% for m in messages %}{{ m.role + ':' + ('<think></think>' if m.role == 'assistant' else '') + m.content "
        "+ eos_token }}{% endfor %}"
    )
    encoder = encoder_of(template, enable_thinking=True)
    assert encoder.record["completion"] == "assistant:"
    assert encoder.answer_start == "<think></think>"


def test_a_template_that_ends_the_text_after_a_question_is_refused() -> None:
    template = "{% for m in messages %}{{ m.role + ':' + m.content + '\\n' }}{% endfor %}{{ eos_token }}"
    with pytest.raises(LoratuneError, match="ignores add_generation_prompt, and cannot be completed") as caught:
        encoder_of(template)
    assert caught.value.exit_code == Exit.MODEL
    encoder_of(template, generation_prompt="template")


def test_a_prompt_in_other_words_than_earlier_answers_is_told() -> None:
    template = CHATML.replace("{{ '<|im_start|>assistant\\n' }}", "{{ 'Answer:' }}")
    (remark,) = encoder_of(template).remarks
    assert "asks for an answer with '<|im_end|>\\nAnswer:'" in remark
    assert "writes earlier answers after '<|im_end|>\\n<|im_start|>assistant\\n'" in remark


def test_control_tokens_before_an_answer_are_learnt_as_such_and_read_past() -> None:
    from loratune.engine.text import TextStream

    # Of the kind that gpt-oss has: a channel stands between the prompt and the answer.
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ('<|endoftext|>final:' if m.role == 'assistant' else '') "
        "+ m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    encoder = encoder_of(template)
    (example,) = encoder.encode(row("a", "one <|endoftext|>"))
    whole = encoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"}], return_dict=False
    )
    assert encoder.encode(row("a", "one"))[0].input_ids.tolist() == whole
    channel = encoder.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert example.input_ids.tolist().count(channel) == 1  # what a row says stays text
    assert [read(encoder, text) for text in ("one", "final: one", "fin")] == ["one", "final: one", "fin"]
    stream = TextStream(encoder.tokenizer, beginning=encoder.answer_start)
    said = "".join(stream.push(token).text for token in encoder.tokenizer("final").input_ids) + stream.finish().text
    assert said == "final"


def read(encoder: Encoder, answer: str) -> str:
    """What is told of a trained answer."""
    from loratune.engine.text import TextStream

    stream = TextStream(encoder.tokenizer, beginning=encoder.answer_start)
    ids = encoder.answer_ids(answer)[:-1]
    return "".join(stream.push(token).text for token in ids) + stream.finish().text


@pytest.mark.parametrize("answer", ["one", " one", "  ", "o"])
def test_a_blank_that_the_template_writes_is_no_part_of_an_answer(answer: str) -> None:
    encoder = encoder_of(
        "{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else ' ' + m.content + eos_token }}"
        "{% endfor %}"
    )
    assert encoder.answer_start == " "
    assert read(encoder, answer) == answer


@pytest.mark.parametrize("settings", [{}, {"system": "Be brief."}, {"instruction_prefix": "Q: "}])
def test_a_completed_prompt_goes_into_the_merged_folder(tmp_path: Path, settings: dict[str, Any]) -> None:
    base, merged = model_folder(tmp_path / "base", WITHOUT_PROMPT), tmp_path / "merged"
    encoder = Encoder(load_tokenizer(base), PromptSettings(**settings))
    merged.mkdir()
    copy_tokenizer_files(base, merged)
    assert write_portable_template(encoder, merged)
    plain = AutoTokenizer.from_pretrained(merged)
    assert plain.apply_chat_template(SPOKEN, add_generation_prompt=True, return_dict=False) == encoder.prompt_ids(
        SPOKEN
    )
    again = Encoder(load_tokenizer(merged), PromptSettings())
    assert again.prompt_ids(SPOKEN) == encoder.prompt_ids(SPOKEN)
    assert again.remarks == []
    keys = describe_vocabulary(base, json.loads((base / "config.json").read_text())["vocab_size"])
    ids = plain.apply_chat_template(QUESTION, chat_template=keys["tokenizer.chat_template"], add_generation_prompt=True)
    assert ids["input_ids"] == Encoder(load_tokenizer(base), PromptSettings()).prompt_ids(QUESTION)


@pytest.mark.parametrize(
    "text", ["{{ 'a' + 1 }}", "{{ 1 / 0 }}", "{{ range(10**6) }}", "{{ messages[9].content }}", "{% x %}"]
)
def test_a_template_that_fails_is_refused_with_the_reason(text: str) -> None:
    with pytest.raises(LoratuneError, match="refuses the messages user") as caught:
        encoder_of(text + CHATML)
    assert caught.value.exit_code == Exit.MODEL


# --- reasoning ---

THINKERS = ["qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8", "deepseek_r1_distill", "nemotron_3_nano"]


@pytest.mark.parametrize("template", THINKERS)
def test_an_answer_without_reasoning_closes_the_block_that_its_prompt_opens(template: str) -> None:
    from loratune.engine.text import TextStream

    encoder = encoder_of(shipped(template), enable_thinking=True)
    (example,) = encoder.encode(row("a", "one"))
    prompt = encoder.prompt_ids([{"role": "user", "content": "a"}])
    text = encoder.tokenizer.decode(example.input_ids.tolist())
    assert example.input_ids.tolist()[: len(prompt)] == prompt
    asked, _, rest = text.rpartition("<think>")
    assert rest.replace("</think>", "").strip() == f"one{encoder.tokenizer.decode([encoder.end_id])}"
    assert asked.count("<think>") == 0
    if template.startswith("qwen3"):  # whose templates show how they write such an answer
        spoken = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"}]
        whole = encoder.tokenizer.apply_chat_template(spoken, tokenize=False, enable_thinking=True)
        assert text == whole.removesuffix("\n")
    is_open = "<think>" in encoder.tokenizer.decode(prompt[-4:])
    stream = TextStream(encoder.tokenizer, in_reasoning=is_open, beginning=encoder.answer_start)
    parts = [stream.push(token) for token in example.input_ids.tolist()[len(prompt) : -1]] + [stream.finish()]
    assert ["".join(texts) for texts in zip(*parts, strict=True)] == ["one", ""]


@pytest.mark.parametrize("template", [*THINKERS, "glm4moe"])
@pytest.mark.parametrize("thinking", [True, False])
def test_reasoning_of_a_row_takes_the_place_of_the_empty_block(template: str, thinking: bool) -> None:
    encoder = encoder_of(shipped(template), enable_thinking=thinking)
    answer = "<think>\nx\n</think>\n\none"
    (example,) = encoder.encode(row("a", answer))
    prompt = encoder.tokenizer.decode(encoder.prompt_ids([{"role": "user", "content": "a"}]))
    whole = encoder.tokenizer.decode(example.input_ids.tolist())
    said = whole.removeprefix(prompt)
    assert "x\n</think>\n\none" in said
    assert said.count("</think>") == 1
    assert whole.count("<think>") == prompt.count("<think></think>") + prompt.count("<think>\n\n</think>") + 1


@pytest.mark.parametrize("answer", ["<think>x</think>one", " <think>\nx</think>one", "x</think>one"])
def test_a_block_that_the_prompt_opens_is_opened_once_however_a_row_writes_it(answer: str) -> None:
    encoder = encoder_of(shipped("qwen3_5_think"), enable_thinking=True)
    assert learnt(encoder, row("a", answer)).strip() == "x</think>one<|im_end|>"


def test_rows_without_reasoning_are_counted_where_it_is_asked_for(tmp_path: Path, cli: CLI) -> None:
    base = model_folder(tmp_path / "base", shipped("qwen3"))
    rows = [{"instruction": "a?", "output": "one"}, {"instruction": "b?", "output": "<think>\nx\n</think>\n\ntwo"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = ["data", "check", "--model.base", base, "--data.train", tmp_path / "rows.json", "--data.validation", "0"]
    found = {
        thinking: [
            (one["name"], one["count"])
            for one in json.loads(cli(*flags, "--json", *thinking).stdout)["findings"]
            if one["name"] in ("thinking", "no_reasoning")
        ]
        for thinking in [("--prompt.enable_thinking",), ("--no-prompt.enable_thinking",)]
    }
    assert list(found.values()) == [[("no_reasoning", 1)], [("thinking", 1)]]
    cleaned = cli(*flags, "--json", "--prompt.enable_thinking", "--data.remove", "no_reasoning")
    assert json.loads(cleaned.stdout)["rows"]["training"]["rows"] == 1


def test_an_empty_block_is_left_out_of_what_is_learnt_with_all_other_reasoning() -> None:
    encoder = encoder_of(shipped("qwen3"), enable_thinking=True)
    assert learnt(encoder, row("a", "one"), train_thinking=False) == "one<|im_end|>"


# --- dates ---


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    "pattern", [*(f"%{letter}" for letter in DIRECTIVES), "%d %b %Y", "%%d %-d.%-m.%y, 100%% at %-I", "%A"]
)
def test_a_fixed_moment_is_written_as_strftime_writes_it(moment: datetime.datetime, pattern: str) -> None:
    text = "\n{% if strftime_now is defined %}\n  {{ strftime_now(format) }}\n{% endif %}\n".replace(
        "format", json.dumps(pattern)
    )
    rendered = tokenizer_of("x").apply_chat_template(QUESTION, chat_template=fixed_moment(text, moment), tokenize=False)
    assert rendered == f"\n  {moment.strftime(pattern)}\n"


@pytest.mark.parametrize(
    ("template", "is_dated"),
    [
        (CHATML, False),
        (DATED, True),
        (CHATML + "{# strftime_now #}{{ '' if 'strftime_now' else '' }}", False),
        ("{% if messages[0].role == 'system' %}{{ strftime_now('%Y') }}{% endif %}" + CHATML, True),
        ("{% if tools %}{{ strftime_now('%H:%M:%S') }}{% endif %}" + CHATML, True),
        (shipped("llama3_2"), True),
        (shipped("gptoss"), True),
        (shipped("qwen3"), False),
    ],
)
def test_a_date_is_found_by_rendering_on_two_days(template: str, is_dated: bool) -> None:
    encoder = Encoder(tokenizer_of(template, bos_token="<|endoftext|>"), PromptSettings())
    assert encoder.is_dated is is_dated


def test_the_day_of_the_settings_is_that_of_prompts_and_its_absence_is_today() -> None:
    settled = encoder_of(DATED, date="2024-02-29")
    assert prompt_text(settled, QUESTION).startswith("<|im_start|>system\nToday is 29 Feb 2024<|im_end|>\n")
    days = {datetime.date.today().strftime("%d %b %Y")}
    text = prompt_text(encoder_of(DATED), QUESTION)
    days.add(datetime.date.today().strftime("%d %b %Y"))  # should midnight come in between
    assert any(f"Today is {day}<" in text for day in days)
    undated = encoder_of(CHATML, date="2024-02-29")
    assert undated.prompt_ids(QUESTION) == encoder_of(CHATML).prompt_ids(QUESTION)


@pytest.mark.parametrize("text", ["{{ range(99999) | random }}", "{{ lipsum(1, false) }}"])
def test_a_template_that_draws_on_chance_is_refused(text: str) -> None:
    with pytest.raises(LoratuneError, match="in another way each time") as caught:
        encoder_of(text + CHATML)
    assert caught.value.exit_code == Exit.MODEL


@pytest.mark.parametrize("settings", [{}, {"date": "2024-02-29"}, {"date": "2024-02-29", "system": "Be brief."}])
def test_a_merged_folder_writes_the_current_date_and_else_the_prompts_of_the_training(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    base, merged = model_folder(tmp_path / "base", DATED), tmp_path / "merged"
    encoder = Encoder(load_tokenizer(base), PromptSettings(**settings))
    merged.mkdir()
    copy_tokenizer_files(base, merged)
    assert write_portable_template(encoder, merged) is ("system" in settings)
    plain = AutoTokenizer.from_pretrained(merged)
    rendered = plain.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert rendered[: len("<|im_start|>system\nToday is ")] == "<|im_start|>system\nToday is "
    on_the_day = encoder.at_a_day().settings.date
    fixed = fixed_moment(plain.chat_template, datetime.datetime.fromisoformat(str(on_the_day)))
    ids = plain.apply_chat_template(QUESTION, chat_template=fixed, add_generation_prompt=True, return_dict=False)
    assert ids == encoder.at_a_day().prompt_ids(QUESTION)
    assert datetime.date.fromisoformat(str(on_the_day)).strftime("%d %b %Y") in plain.decode(ids)
