"""Modelfiles: the Go template, run by an interpreter of what it uses, against the tokenizer's own chat template."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_QWEN

from loratune.data.templates import OWN_TEMPLATES
from loratune.delivery.ollama import write_modelfile
from loratune.errors import Exit, LoratuneError
from loratune.recipe.sections import PromptSettings

Messages = list[dict[str, str]]
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


def trl_template(name: str) -> str:
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text("utf-8")


# --- a reader of Modelfiles and an interpreter of Go templates, of as much as is written ---


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


def run_template(text: str, messages: Messages) -> str:
    """What Ollama sends to the model: `.System` is all system messages, turns of one role are one."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    pieces = re.findall(r'\{\{-? ?((?:"(?:\\.|[^"\\])*"|[^"}])*?) ?\}\}|((?:(?!\{\{).)+)', text, re.DOTALL)
    # Every line break of the text stands before an action that trims it.
    assert all(not plain.strip() for _, plain in pieces)
    assert len(re.findall(r"\n\{\{-", text)) == text.count("\n")
    actions = [action for action, plain in pieces if not plain]
    output, place = run_block(actions, 0, {"System": system, "Messages": messages}, active=True)
    assert place == len(actions)
    return output


def run_block(actions: list[str], place: int, scope: dict[str, Any], active: bool) -> tuple[str, int]:
    """Run actions up to the end or else that closes this block; return the output and where it stopped."""
    output = ""
    while place < len(actions) and not re.match(r"end|else", actions[place]):
        action = actions[place]
        place += 1
        if action.startswith("if "):
            text, place = run_if(actions, place, action.removeprefix("if "), scope, active)
            output += text
        elif action.startswith("range "):
            start = place
            _, place = run_block(actions, start, scope, active=False)
            for number, message in enumerate(scope["Messages"] if active else []):
                last = number == len(scope["Messages"]) - 1
                inner = {**scope, "Role": message["role"], "Content": message["content"], "last": last}
                output += run_block(actions, start, inner, active=True)[0]
            place += 1
        elif action.startswith('"'):
            output += json.loads(action) if active else ""
        elif action.startswith("."):
            output += scope[action[1:]] if active else ""
        else:
            assert action == "$last := eq (len (slice $.Messages $i)) 1"
    return output, place


def run_if(actions: list[str], place: int, condition: str, scope: dict[str, Any], active: bool) -> tuple[str, int]:
    role = re.fullmatch(r'eq \.Role "(\w+)"', condition)
    known = {".System": "System", "$last": "last", "not $last": "last"}
    holds = active and (
        scope["Role"] == role[1] if role else bool(scope[known[condition]]) != condition.startswith("not ")
    )
    output, place = run_block(actions, place, scope, holds)
    action = actions[place]
    if action == "end":
        return output, place + 1
    if action == "else":
        other, place = run_block(actions, place + 1, scope, active and not holds)
        assert actions[place] == "end"
        return output + other, place + 1
    other, place = run_if(actions, place + 1, action.removeprefix("else if "), scope, active and not holds)
    return output + other, place


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
    text = write_modelfile(model, "model.gguf", model, settings=PromptSettings(thinking=thinking))
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
    with pytest.raises(LoratuneError, match="cannot be written for Ollama") as caught:
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
