"""A merged model's folder prompts by itself as the training did, and is the base's byte for byte otherwise."""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_QWEN
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from loratune.data.encoding.encoder import Encoder
from loratune.data.formats.conversation import Message
from loratune.delivery.merge.merged_weights import MergedTensor, MergePlan
from loratune.delivery.merge.model_folder import write_model_files
from loratune.delivery.template import write_portable_template
from loratune.errors import Exit, LoratuneError
from loratune.model.tokenizer import load_tokenizer
from loratune.model.weights.tensor_files import TensorInfo
from loratune.recipe.sections import PromptSettings
from loratune.runs.opening import AdapterSource
from loratune.runs.tokenizer_files import TOKENIZER_FILES, copy_tokenizer_files

EMBEDDING = "model.embed_tokens.weight"
RARE_TEXTS = {
    "quotes": """ "double" 'single' \\ \\n \\" """,
    "newlines": "one\n\ntwo\r\n\tthree\n",
    "braces": "{{ messages }} {% raw %} {# no #} {%- endif -%} %} }} #}",
    "emoji": "👍🏽 🇨🇳 \U0001f600",
    "Chinese": "你是一个乐于助人的助手。“引号”",
    "control characters": "\x00\x07\x08\x1b[31m\x7f\x85\u2028\u2029\ufeff",
}
DIALOGUES: dict[str, list[Message]] = {
    "one turn": [{"role": "user", "content": "Who are you?"}],
    "two turns": [
        {"role": "user", "content": " hi\n"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "你好"},
    ],
    "a system prompt of its own": [
        {"role": "system", "content": "Be quick."},
        {"role": "user", "content": "Who are you?"},
    ],
}


def make_base(folder: Path, template: str | None = None, has_bos: bool = False) -> Path:
    """A folder with the practice model's tokenizer, another template, or a start token before every text."""
    folder.mkdir()
    copy_tokenizer_files(TINY_QWEN, folder)
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(TINY_QWEN / name, folder / name)
    if template:
        text = (files("trl") / "chat_templates" / f"{template}.jinja").read_text("utf-8")
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    if has_bos:
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        token = tokenizer["added_tokens"][0]
        start = {"SpecialToken": {"id": token["content"], "type_id": 0}}
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                token["content"]: {"id": token["content"], "ids": [token["id"]], "tokens": [token["content"]]}
            },
        }
        path.write_text(json.dumps(tokenizer), encoding="utf-8")
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": token["content"]}))
    return folder


def deliver(base: Path, folder: Path, **prompt: Any) -> tuple[Encoder, bool]:
    """Copy a tokenizer and make its template portable; returns the training's encoder, and whether anything changed."""
    encoder = Encoder(load_tokenizer(base), PromptSettings(**prompt))
    folder.mkdir()
    copy_tokenizer_files(base, folder)
    return encoder, write_portable_template(encoder, folder)


def assert_prompts_alike(encoder: Encoder, folder: Path) -> None:
    plain = AutoTokenizer.from_pretrained(folder)
    for messages in DIALOGUES.values():
        found = plain.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert found == encoder.prompt_ids(messages)


def assert_just_the_template_differs(base: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if name != "chat_template.jinja" and (base / name).is_file():
            assert (folder / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("template", [None, "qwen2_5", "qwen3"])
@pytest.mark.parametrize("setting", ["system", "instruction_prefix"])
@pytest.mark.parametrize("text", RARE_TEXTS)
def test_any_program_renders_the_training_s_prompts(
    tmp_path: Path, template: str | None, setting: str, text: str
) -> None:
    base = make_base(tmp_path / "base", template)
    encoder, is_changed = deliver(base, tmp_path / "merged", **{setting: RARE_TEXTS[text]})
    assert is_changed
    assert_prompts_alike(encoder, tmp_path / "merged")
    assert_just_the_template_differs(base, tmp_path / "merged")
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (base, tmp_path / "merged"))
    options = {"add_generation_prompt": True, "tokenize": False}
    prompts = [tokenizer.apply_chat_template(DIALOGUES["one turn"], **options) for tokenizer in (before, after)]
    assert prompts[0] != prompts[1]


@pytest.mark.parametrize("thinking", [False, True])
def test_the_thinking_mode_of_the_training_is_the_template_s_own(tmp_path: Path, thinking: bool) -> None:
    base = make_base(tmp_path / "base", "qwen3")
    encoder, is_changed = deliver(base, tmp_path / "merged", enable_thinking=thinking)
    assert is_changed is not thinking  # Qwen3 thinks unless told otherwise
    assert_prompts_alike(encoder, tmp_path / "merged")
    plain = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for wanted in (False, True):  # whoever asks for a mode still gets it
        found = plain.apply_chat_template(
            DIALOGUES["one turn"], add_generation_prompt=True, enable_thinking=wanted, return_dict=False
        )
        assert found == Encoder(load_tokenizer(base), PromptSettings(enable_thinking=wanted)).prompt_ids(
            DIALOGUES["one turn"]
        )


@pytest.mark.parametrize("has_bos", [False, True])
@pytest.mark.parametrize("template", ["plain", "alpaca"])
@pytest.mark.parametrize("system", [None, "Be {{ brief }}."])
def test_our_own_templates_go_along(tmp_path: Path, template: str, has_bos: bool, system: str | None) -> None:
    base = make_base(tmp_path / "base", has_bos=has_bos)
    encoder, is_changed = deliver(base, tmp_path / "merged", template=template, system=system)
    assert is_changed
    assert encoder.adds_bos is has_bos
    assert (encoder.prompt_ids(DIALOGUES["one turn"])[0] == encoder.tokenizer.bos_token_id) is has_bos
    assert_prompts_alike(encoder, tmp_path / "merged")
    assert_just_the_template_differs(base, tmp_path / "merged")


def test_everything_together(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen3")
    every = "\n".join(RARE_TEXTS.values())
    encoder, _ = deliver(base, tmp_path / "merged", system=every, instruction_prefix=every, enable_thinking=False)
    assert_prompts_alike(encoder, tmp_path / "merged")


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_any_system_prompt_survives(text: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        encoder, _ = deliver(TINY_QWEN, Path(name) / "merged", system=text)
        assert_prompts_alike(encoder, Path(name) / "merged")


def test_a_config_with_the_template_in_it_gets_the_new_one_too(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    path = base / "tokenizer_config.json"
    template = (base / "chat_template.jinja").read_text(encoding="utf-8")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    (base / "chat_template.jinja").unlink()
    encoder, is_changed = deliver(base, tmp_path / "merged", system="Be brief.")
    assert is_changed
    assert_prompts_alike(encoder, tmp_path / "merged")
    (tmp_path / "merged" / "chat_template.jinja").unlink()
    assert_prompts_alike(encoder, tmp_path / "merged")
    other = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert {key: value for key, value in other.items() if key != "chat_template"} == {
        key: value for key, value in json.loads(path.read_text()).items() if key != "chat_template"
    }


def test_a_system_prompt_that_only_training_keeps_from_being_control_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoratuneError, match="cannot be put into the tokenizer's chat template") as raised:
        deliver(make_base(tmp_path / "base"), tmp_path / "merged", system="<|im_end|>")
    assert raised.value.exit_code == Exit.MODEL


def write_beside(merged: Path, base: Path, dtype: torch.dtype | None = None, is_tied: bool = True) -> list[str]:
    """The files beside the weights of a plain adapter's merged model, whose embedding has the base's shape."""
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    embedding = MergedTensor(TensorInfo(EMBEDDING, torch.float32, (rows, 8)), EMBEDDING, None)
    plan = MergePlan({EMBEDDING: embedding}, {}, is_tied)
    encoder = Encoder(load_tokenizer(base), PromptSettings())
    return write_model_files(AdapterSource(base, None, None, None), encoder, base, merged, dtype, plan)


@pytest.mark.parametrize("template", [None, "qwen2_5", "qwen3_instruct_2507"])
def test_where_nothing_was_set_every_file_is_the_base_s_byte_for_byte(tmp_path: Path, template: str | None) -> None:
    base = make_base(tmp_path / "base", template)
    (tmp_path / "merged").mkdir()
    encoder = Encoder(load_tokenizer(base), PromptSettings())
    generation = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [1, encoder.end_id]}))
    changes = write_beside(tmp_path / "merged", base)
    assert changes == []
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {path.name for path in base.iterdir()}
    for path in base.iterdir():
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()


# --- generation config and config ---


@pytest.mark.parametrize(
    ("known", "expected"),
    [("end", None), (["other", "end"], None), ("other", ["end", "other"]), (["other"], ["end", "other"]),
     (None, ["end"])],
)  # fmt: skip
def test_an_end_token_is_added_where_it_is_missing(tmp_path: Path, known: Any, expected: Any) -> None:
    base = make_base(tmp_path / "base")
    encoder = Encoder(load_tokenizer(base), PromptSettings())
    ids = {"end": encoder.end_id, "other": encoder.end_id + 1}
    listed = [ids[name] for name in known] if isinstance(known, list) else ids.get(known)
    text = json.dumps({"do_sample": True, "temperature": 0.7, "eos_token_id": listed})
    (base / "generation_config.json").write_text(text)
    (tmp_path / "merged").mkdir()
    changes = write_beside(tmp_path / "merged", base)
    found = (tmp_path / "merged" / "generation_config.json").read_text()
    if expected is None:
        assert found == text
        assert changes == []
    else:
        assert json.loads(found) == json.loads(text) | {"eos_token_id": [ids[name] for name in expected]}
        assert "generation_config.json" in changes[0]
    assert encoder.end_id in torch.tensor(GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id)


def test_a_base_without_a_generation_config_gets_one_only_if_its_config_has_another_end(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    (base / "generation_config.json").unlink()
    encoder = Encoder(load_tokenizer(base), PromptSettings())
    config = json.loads((base / "config.json").read_text())
    for end, expected in ((encoder.end_id, None), (encoder.end_id + 1, [encoder.end_id, encoder.end_id + 1])):
        (base / "config.json").write_text(json.dumps(config | {"eos_token_id": end}))
        folder = tmp_path / str(end)
        folder.mkdir()
        write_beside(folder, base)
        path = folder / "generation_config.json"
        assert (json.loads(path.read_text())["eos_token_id"] if path.exists() else None) == expected


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_says_what_has_changed_and_nothing_else(random_qwen: Path, tmp_path: Path, key: str) -> None:
    base = shutil.copytree(random_qwen, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config[key] = config.pop("dtype")
    (base / "config.json").write_text(json.dumps(config))
    (tmp_path / "merged").mkdir()
    write_beside(tmp_path / "merged", base, torch.bfloat16, is_tied=False)
    found = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert found == config | {key: "bfloat16", "tie_word_embeddings": False}
    write_beside(tmp_path / "merged", base, torch.float32, is_tied=True)
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_merged_model_stops_where_the_training_stopped(random_qwen: Path, tmp_path: Path) -> None:
    base = shutil.copytree(random_qwen, tmp_path / "base")
    encoder = Encoder(load_tokenizer(base), PromptSettings())
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": encoder.end_id + 1}))
    merged = shutil.copytree(base, tmp_path / "merged")
    write_beside(merged, base)
    model = AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():  # a model whose every next token is the end of an answer
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        model.lm_head.register_forward_hook(
            lambda _, __, output: output.index_fill(-1, torch.tensor(encoder.end_id), 9)
        )
    output = model.generate(torch.tensor([[5, 6]]), max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert output.tolist() == [[5, 6, encoder.end_id]]
