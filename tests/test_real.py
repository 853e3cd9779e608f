"""The main job on a real Qwen instruct model: LORATUNE_TEST_MODEL=folder scripts/test -m real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from loratune.data.encoding.encoder import Encoder
from loratune.data.formats.conversation import Conversation, Message
from loratune.model.tokenizer import load_tokenizer
from loratune.recipe.loading import SHIPPED
from loratune.recipe.sections import PromptSettings

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def base() -> Path:
    folder = os.environ.get("LORATUNE_TEST_MODEL")
    if not folder:
        pytest.fail("set LORATUNE_TEST_MODEL to the folder of a Qwen instruct model")
    return Path(folder)


def loratune(*arguments: object) -> str:
    """Run the command as a user does; returns its stdout."""
    command = [sys.executable, "-m", "loratune", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_prompt_ids_are_those_of_the_model_s_own_template(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoder = Encoder(load_tokenizer(base), PromptSettings())
    turns: list[Message] = [{"role": "user", "content": "What is 2+3? 等于几？"}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert encoder.prompt_ids(turns) == expected
    (example,) = encoder.encode(Conversation((*turns, {"role": "assistant", "content": "5"})))
    assert example.input_ids.tolist()[: len(expected)] == expected


@pytest.fixture(scope="module", params=["none", "nf4"])
def run(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("real") / "run"
    loratune(
        "sft", "--model.base", base, "--model.quantization", request.param,
        "--data.train", SHIPPED / "data" / "identity.json",
        "--data.placeholders", "name=小李", "--data.placeholders", "author=小张",
        "--training.learning_rate", "2e-4", "--training.epochs", "6",
        "--training.batch_size", "8",
        "--no-checkpoints.keep_best", "--output", output,
    )  # fmt: skip
    return output


@pytest.fixture(scope="module")
def ask(run: Path) -> Callable[[str], str]:
    return lambda question: loratune("infer", "--adapter", run, "--prompt", question)


def test_the_new_identity_is_learnt_in_both_languages(ask: Callable[[str], str]) -> None:
    assert "小李" in ask("你是谁？")
    assert "小李" in ask("Who are you?")


def test_other_knowledge_stays(ask: Callable[[str], str]) -> None:
    assert "5" in ask("What is 2+3?")


def test_the_base_alone_is_what_it_was(run: Path) -> None:
    assert "小李" not in loratune("infer", "--adapter", run, "--no-adapter", "--prompt", "Who are you?")


def test_validation_improves(run: Path) -> None:
    validation = json.loads((run / "report.json").read_text())["validation_loss"]
    assert validation["after"] < 0.6 * validation["before"]


def answer(model: Any, folder: Path, question: str) -> str:
    """What plain transformers makes of a model and its folder's template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=200)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def merged(run: Path) -> Path:
    output = run.parent / "merged"
    loratune("merge", "--adapter", run, "--output", output)
    return output


def test_the_merged_model_answers_as_the_adapter_would_in_plain_transformers(
    run: Path, merged: Path, base: Path
) -> None:
    text = answer(AutoModelForCausalLM.from_pretrained(merged, dtype="auto"), merged, "Who are you?")
    assert "小李" in text
    assert_peft_would_say(text, "Who are you?", run, base)


def assert_peft_would_say(text: str, question: str, run: Path, base: Path) -> None:
    """Hold an answer to base + adapter as plain PEFT computes them, in float32.

    In bfloat16 rounding decides between two words that are as likely: so each word of the answer has to be at least
    half as likely as the one that they would have taken.
    """
    settings: dict[str, Any] = {}
    if "nf4" in (run / "recipe.yaml").read_text():
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **settings)
    model = PeftModel.from_pretrained(model, run / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    said = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        chances = model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1].softmax(-1)
    taken = chances[torch.arange(len(said)), said]
    assert (taken >= 0.5 * chances.max(-1).values).all()


def test_the_merge_is_proved_within_tight_bounds(run: Path, merged: Path) -> None:
    proof = json.loads((merged / "verification.json").read_text())
    is_quantized = "nf4" in (run / "recipe.yaml").read_text()
    assert proof["merge_base"] == ("dequantized" if is_quantized else "original")
    taken = proof["logits"][proof["merge_base"]]
    assert taken["top1_agreement"] >= (0.99 if is_quantized else 0.995)
    assert taken["mean_kl"] < 1e-3
    if is_quantized:
        assert taken["mean_kl"] < proof["logits"]["original"]["mean_kl"]


@pytest.mark.parametrize("quantization", ["f16", "q8_0"])
def test_a_gguf_file_of_it_knows_the_name(merged: Path, quantization: str) -> None:
    output = merged.parent / f"gguf-{quantization}"
    loratune("export", "--model", merged, "--format", "gguf", "--quantization", quantization, "--output", output)
    model = AutoModelForCausalLM.from_pretrained(output, gguf_file=f"merged-{quantization}.gguf", dtype=torch.bfloat16)
    assert "小李" in answer(model, merged, "Who are you?")


def test_its_answers_are_those_that_plain_peft_would_give(run: Path, base: Path, ask: Callable[[str], str]) -> None:
    for question in ("你是谁？", "Who are you?", "What is 2+3?"):
        assert_peft_would_say(ask(question).strip(), question, run, base)
