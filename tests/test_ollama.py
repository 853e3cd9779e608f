"""Modelfiles: the Go template, run by an interpreter of what it uses, against the tokenizer's own chat template."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import go_templates
import pytest
from conftest import TINY_QWEN

from loratune.data.template.own import OWN_TEMPLATES
from loratune.delivery.export.ollama.modelfile import write_modelfile as write
from loratune.errors import Exit, LoratuneError
from loratune.recipe.sections import PromptSettings

Messages = list[dict[str, Any]]
MakeModel = Callable[..., Path]


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """Folder of the practice model's tokenizer with another template and, if asked, a beginning token."""

    def make(template: str | None = None, bos_token: str | None = None, **generation: Any) -> Path:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(TINY_QWEN, folder, ignore=shutil.ignore_patterns("*.safetensors", "generation_config.json"))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        if bos_token is not None:
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            config["bos_token"] = bos_token
            (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        if generation:
            (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
        return folder

    return make


def write_modelfile(*arguments: Any, **options: Any) -> str:
    return write(*arguments, **options).text


def trl_template(name: str) -> str:
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text("utf-8")


# --- a reader of Modelfiles ---


def read_modelfile(text: str) -> dict[str, list[str]]:
    """Command → its values, unquoted as Ollama unquotes them."""
    commands: dict[str, list[str]] = {}
    for name, value in re.findall(r'^([A-Z]+) ("""[\s\S]*?"""$|.*$)', text, re.MULTILINE):
        commands.setdefault(name, []).append(value)
    return {name: [unquote(value) for value in values] for name, values in commands.items()}


def unquote(value: str) -> str:
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            assert value.endswith(quotes)
            assert len(value) >= 2 * len(quotes)
            return value[len(quotes) : -len(quotes)]
    return value


def run_template(text: str, messages: Messages, tools: list[dict[str, Any]] | None = None) -> str:
    """What Ollama sends to the model."""
    return go_templates.run_template(text, go_templates.ollama_values(messages, tools))


# --- templates ---


def dialogue(*texts: str, system: str | None = None) -> Messages:
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": "assistant" if place % 2 else "user", "content": t} for place, t in enumerate(texts)]


DIALOGUES = [
    dialogue("Who are you?"),
    dialogue("Who are you?", system='Say "so".\n\nBriefly.'),
    dialogue("你好", "{{ .Content }} `x`", "c\n\nd"),
    dialogue("a", "b", "c", 'd"', "e", system="S"),
]
TEMPLATES = {
    "qwen2_5": trl_template("qwen2_5"),
    "qwen3": trl_template("qwen3"),
    "qwen3_instruct_2507": trl_template("qwen3_instruct_2507"),
    "llama3": trl_template("llama3"),
    "llama3_2": trl_template("llama3_2"),
    "own": (TINY_QWEN / "chat_template.jinja").read_text("utf-8"),
    **OWN_TEMPLATES,
    # What would be Go's or the Modelfile's own signs, and spaces at every edge.
    "signs": """{% for m in messages %}{{ ' \\n{{ "' + m.role + '" -}} `\\\\n\\t' + m.content + ' }}\\r\\n\\n ' }}
{%- endfor %}{{ ' {{- "\\'A\\'" ' }}""",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("thinking", [False, True])
def test_the_go_template_gives_what_the_chat_template_gives(make_model: MakeModel, name: str, thinking: bool) -> None:
    from transformers import AutoTokenizer

    bos_token = "<|endoftext|>" if name.startswith("llama") else None
    model = make_model(TEMPLATES[name], bos_token)
    text = write_modelfile(model, "model.gguf", model, settings=PromptSettings(enable_thinking=thinking))
    assert (model / "Modelfile").read_text(encoding="utf-8") == text
    modelfile = read_modelfile(text)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for messages in DIALOGUES:
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        if bos_token:
            assert rendered.startswith(bos_token)  # Ollama sets it by itself
            rendered = rendered.removeprefix(bos_token)
        assert run_template(modelfile["TEMPLATE"][0], messages) == rendered
        system = dialogue("", system=modelfile.get("SYSTEM", [""])[0])[:-1]
        if messages[0]["role"] != "system":  # Ollama then sets the Modelfile's
            assert run_template(modelfile["TEMPLATE"][0], system + messages) == rendered


def test_an_answer_at_the_end_is_left_open(make_model: MakeModel) -> None:
    model = make_model(TEMPLATES["qwen3"])
    template = read_modelfile(write_modelfile(model, "model.gguf", model))["TEMPLATE"][0]
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert run_template(template, dialogue("a", "It is")) == text + "It is"
    assert run_template(template, dialogue("a")) == text + "<think>\n\n</think>\n\n"


def test_settings_of_the_training_are_part_of_the_template(make_model: MakeModel) -> None:
    model = make_model()
    settings = PromptSettings(template="plain", system="Be brief.", instruction_prefix="Q: ")
    modelfile = read_modelfile(write_modelfile(model, "model.gguf", model, settings=settings))
    assert run_template(modelfile["TEMPLATE"][0], dialogue("a")) == "Be brief.\n\nHuman: Q: a\n\nAssistant: "


def test_the_systems_prompt_of_the_template_is_named(make_model: MakeModel) -> None:
    model = make_model(TEMPLATES["qwen2_5"])
    modelfile = read_modelfile(write_modelfile(model, "model.gguf", model))
    assert modelfile["SYSTEM"] == ["You are Qwen, created by Alibaba Cloud. You are a helpful assistant."]
    model = make_model(TEMPLATES["qwen3"])
    assert "SYSTEM" not in read_modelfile(write_modelfile(model, "model.gguf", model))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ loop.index }}. {{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[-1].content }}",
        "{% for m in messages %}{{ m.content }}{{ '!' if messages | length > 5 }}{% endfor %}",
    ],
)
def test_a_template_of_another_kind_is_refused(make_model: MakeModel, template: str) -> None:
    model = make_model(template)
    with pytest.raises(
        LoratuneError, match=r"cannot be written for Ollama|does not write an answer as it is"
    ) as caught:
        write_modelfile(model, "model.gguf", model)
    assert caught.value.exit_code == Exit.MODEL
    assert not (model / "Modelfile").exists()


# --- the rest of the file ---


def test_end_tokens_and_sampling_are_stated(make_model: MakeModel) -> None:
    model = make_model(
        eos_token_id=[3002, 3000], do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05
    )
    text = write_modelfile(model, "model q8.gguf", model, num_ctx=4096)
    assert text.startswith("FROM ./model q8.gguf\n")
    assert read_modelfile(text)["PARAMETER"] == [
        'stop "<|im_end|>"',
        'stop "<|endoftext|>"',
        "temperature 0.7",
        "top_p 0.8",
        "top_k 20",
        "repeat_penalty 1.05",
        "num_ctx 4096",
    ]


def test_greedy_decoding_stays_greedy(make_model: MakeModel) -> None:
    model = make_model(do_sample=False, eos_token_id=3002)
    assert read_modelfile(write_modelfile(model, "m.gguf", model))["PARAMETER"] == [
        'stop "<|im_end|>"',
        "temperature 0",
        "repeat_penalty 1",
    ]


def test_a_folder_without_sampling_gets_no_penalty(make_model: MakeModel) -> None:
    model = make_model()
    parameters = read_modelfile(write_modelfile(model, "m.gguf", model))["PARAMETER"]
    assert parameters == ['stop "<|im_end|>"', "repeat_penalty 1"]


def test_three_quotes_are_refused(make_model: MakeModel) -> None:
    model = make_model()
    with pytest.raises(LoratuneError, match='cannot hold a text with """'):
        write_modelfile(model, "m.gguf", model, settings=PromptSettings(system='Write """docs""".'))


@pytest.mark.parametrize("name", ["../m.gguf", 'm".gguf', "m\n.gguf", ""])
def test_a_strange_file_name_is_refused(make_model: MakeModel, name: str) -> None:
    model = make_model()
    with pytest.raises(LoratuneError, match="no file name"):
        write_modelfile(model, name, model)


# --- tools ---

WEATHER = {
    "type": "function",
    "function": {
        "name": "look_up_weather",
        "description": 'Weather of a city, "now".',
        "parameters": {
            "type": "object",
            "required": ["city"],
            "properties": {
                "city": {"type": "string", "description": "市"},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def asked(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answered(text: str, *calls: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    listed = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return {"role": "assistant", "content": text, **({"tool_calls": listed} if calls else {})}


def given(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


ROME = ("look_up_weather", {"city": "Rome", "unit": "C"})
TOOL_DIALOGUES = {
    "a question": [asked("Hot?")],
    "earlier turns": [asked("Hot?"), answered("No."), asked("Cold?")],
    "a result": [asked("Hot?"), answered("", ROME), given('{"t": 31}')],
    "words before a call": [asked("Hot?"), answered("I look.", ROME), given("31")],
    "two calls": [asked("Hot?"), answered("", ROME, ("clock", {})), given("31"), given("12:00")],
    "an answer to a result": [asked("Hot?"), answered("", ROME), given("31"), answered("Yes."), asked("And now?")],
    "one call after another": [asked("Hot?"), answered("", ROME), given("31"), answered("", ("clock", {})), given("1")],
    "a question to a result": [asked("Hot?"), answered("", ROME), given("31"), asked("Well?")],
}
HERMES = ("qwen2_5", "qwen3", "qwen3_instruct_2507")


def as_go_writes(text: str, *schemas: dict[str, Any]) -> str:
    """A rendering whose schemas are written by Go: without blanks, which is all that may differ."""
    for schema in schemas:
        text = text.replace(
            json.dumps(schema, ensure_ascii=False), go_templates.go_json(go_templates.go_schema(schema))
        )
    return text


@pytest.mark.parametrize("shape", TOOL_DIALOGUES)
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", HERMES)
def test_tools_calls_and_results_are_rendered_as_the_chat_template_does(
    make_model: MakeModel, name: str, thinking: bool, shape: str
) -> None:
    from transformers import AutoTokenizer

    model = make_model(trl_template(name))
    made = write(model, "m.gguf", model, settings=PromptSettings(enable_thinking=thinking))
    assert made.lost_tools == ""
    modelfile, tokenizer = read_modelfile(made.text), AutoTokenizer.from_pretrained(model)
    default = dialogue("", system=modelfile.get("SYSTEM", [""])[0])[:-1]
    for first in ([], dialogue("", system="Be brief.")[:1]):
        for tools in ([WEATHER], [CLOCK, WEATHER], []):
            messages = [*first, *TOOL_DIALOGUES[shape]]
            rendered = tokenizer.apply_chat_template(
                messages, tools or None, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
            expected = as_go_writes(rendered, *(tool["function"]["parameters"] for tool in tools))
            assert run_template(modelfile["TEMPLATE"][0], [*([] if first else default), *messages], tools) == expected


def test_arguments_keep_their_blanks_and_go_s_order(make_model: MakeModel) -> None:
    model = make_model(trl_template("qwen3"))
    template = read_modelfile(write_modelfile(model, "m.gguf", model))["TEMPLATE"][0]
    call = ("f", {"b": [1, 2], "a": "<三>"})
    text = run_template(template, [asked("?"), answered("", call), given("1")], [CLOCK])
    assert '{"name": "f", "arguments": {"a": "\\u003c三\\u003e", "b": [1,2]}}' in text


def test_ollama_finds_the_sign_of_a_call_in_the_template_s_plain_text(make_model: MakeModel) -> None:
    """It takes the first text outside of actions behind `.ToolCalls`, without blanks."""
    model = make_model(trl_template("qwen2_5"))
    template = read_modelfile(write_modelfile(model, "m.gguf", model))["TEMPLATE"][0]
    behind = template.partition("{{ if .ToolCalls }}")[2]
    assert re.match(r"\{\{ range \$j, \$_ := \.ToolCalls \}\}\{\{ if \$j \}\}\s*<tool_call>\s*\{\{", behind)
    assert go_templates.plain_texts(behind)[0].strip() == "<tool_call>"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (('{{- "\\n</tools>', '{{- (tools | length) ~ "\\n</tools>'), "in a way of its own"),
        (("tool | tojson", "tool.function.name | tojson"), "leaves out or changes"),
        (("\\n<tool_response>\\n' }}", "\\n<tool_response>\\n' ~ (messages | length) }}"), "in a way of its own"),
        (("tool_call.arguments | tojson", "tool_call.arguments | tojson | upper"), "does not support tool calls"),
    ],
)
def test_tools_in_a_form_of_another_kind_are_lost_with_the_reason(
    make_model: MakeModel, change: tuple[str, str], reason: str
) -> None:
    whole = trl_template("qwen2_5")
    assert change[0] in whole
    model = make_model(whole.replace(*change))
    made = write(model, "m.gguf", model)
    assert "offers tools in a form that the Modelfile's TEMPLATE does not" in made.lost_tools
    assert reason in made.lost_tools
    assert ".Tools" not in made.text
    assert run_template(read_modelfile(made.text)["TEMPLATE"][0], dialogue("a")).endswith("assistant\n")


def test_a_model_that_knows_no_tools_loses_none(make_model: MakeModel) -> None:
    model = make_model()
    made = write(model, "m.gguf", model)
    assert (made.lost_tools, ".Tools" in made.text) == ("", False)
