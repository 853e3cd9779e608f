"""What is said of a finished adapter, against plain arithmetic and against runs that went wrong on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import Result

from loratune.data.encoding.encoder import Encoder
from loratune.engine.sampling import Sampling
from loratune.engine.sequence import RunningSequence
from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.update_size import update_sizes
from loratune.runs.report import Answers, Told
from loratune.training.reporting.answers import _told
from loratune.training.reporting.health import GradientFlow, examine
from tests.conftest import ROWS


@pytest.fixture
def adapted(random_qwen: Path) -> Any:
    """A model with an adapter of random weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(random_qwen, dtype=torch.float32)
    config = LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "down_proj"])
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return adapted


def losses(**values: list[float]) -> Any:
    """Metrics with these courses."""
    return SimpleNamespace(of=lambda name: list(enumerate(values.get(name, []))))


def test_sizes_are_those_of_the_products(adapted: Any) -> None:
    sizes, updates = update_sizes(adapted), examine(adapted, GradientFlow(), losses()).updates
    assert sizes.keys() == updates.keys() == {"q_proj", "down_proj"}
    for name, size in updates.items():
        expected = []
        for path, module in adapted.named_modules():
            if path.endswith(name):
                update = module.get_delta_weight("default").detach()
                expected.append(float(update.norm() / module.base_layer.weight.norm()))
        assert list(sizes[name].values()) == pytest.approx(expected, rel=1e-5)
        assert size.modules == len(expected) == 2
        assert size.largest == pytest.approx(max(expected), rel=1e-5)
        assert size.median == pytest.approx(sorted(expected)[0], rel=1e-5)  # the lower one of two
        assert (size.unchanged, size.not_finite) == ((), ())


def test_dead_and_broken_modules_are_named(adapted: Any) -> None:
    layers = adapted.base_model.model.model.layers
    layers[0].self_attn.q_proj.lora_B["default"].weight.data.zero_()
    layers[1].mlp.down_proj.lora_A["default"].weight.data[0, 0] = float("nan")
    health = examine(adapted, GradientFlow(), losses())
    assert health.updates["q_proj"].unchanged == ("model.layers.0.self_attn.q_proj",)
    assert health.updates["down_proj"].not_finite == ("model.layers.1.mlp.down_proj",)
    text = "\n".join(health.sentences)
    assert "1 module (model.layers.1.mlp.down_proj) with NaN" in text
    assert "1 module (model.layers.0.self_attn.q_proj) unchanged" in text


def test_an_adapter_that_hardly_changes_anything_is_told(adapted: Any) -> None:
    assert examine(adapted, GradientFlow(), losses()).sentences == ()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.mul_(1e-6)
    (sentence,) = examine(adapted, GradientFlow(), losses()).sentences
    assert "hardly changes the model" in sentence


@pytest.mark.parametrize(
    ("training", "validation", "is_told"),
    [
        ([3, 2, 1, 0.5], [3, 2, 2.5], True),
        ([3, 2, 1, 0.5], [3, 2, 2.05], False),
        ([3, 2, 1, 0.5], [3, 2, 1.5], False),
        ([1, 2, 3, 4], [3, 2, 2.5], False),
        ([3, 2, 1, 0.5], [3, 4], False),
    ],
)
def test_validation_that_rises_while_training_falls_is_overfitting(
    adapted: Any, training: list[float], validation: list[float], is_told: bool
) -> None:
    health = examine(adapted, GradientFlow(), losses(loss=training, validation_loss=validation))
    assert any("overfitting" in sentence for sentence in health.sentences) == is_told


@pytest.mark.parametrize(
    ("exact", "told"),
    [
        ([0, 0.5, 0.75], None),
        ([0, 0.5, 0.5], None),
        ([0, 0.3, 0.6], None),
        ([0, 0.75, 0.5], "from 2.000 to 2.500 and exact answers have fallen from 75.0% to 50.0%"),
        ([0, 0.75, 0.25], "and exact answers have fallen from 75.0% to 25.0%"),
        ([0, 0.1, 0.2], "from 2.000 to 2.500 while"),
        ([0, 0, 0], "from 2.000 to 2.500 while"),
    ],
)
def test_a_risen_loss_is_no_overfitting_where_most_answers_are_exact_and_no_fewer(
    adapted: Any, exact: list[float], told: str | None
) -> None:
    health = examine(
        adapted, GradientFlow(), losses(loss=[3, 2, 1, 0.5], validation_loss=[3, 2, 2.5], exact_answers=exact)
    )
    (sentence,) = [one for one in health.sentences if "overfitting" in one] or [None]
    assert told is None if sentence is None else told and told in sentence


def test_modules_that_no_gradient_reaches_are_named(adapted: Any) -> None:
    for _, weight in adapted.named_parameters():
        weight.grad = torch.ones_like(weight) if weight.requires_grad else None
    layers = adapted.base_model.model.model.layers
    layers[0].mlp.down_proj.lora_B["default"].weight.grad = None
    layers[1].mlp.down_proj.lora_B["default"].weight.grad.zero_()
    layers[1].self_attn.q_proj.lora_A["default"].weight.grad.zero_()  # as it is in every first step
    flow = GradientFlow()
    flow.on_pre_optimizer_step(None, None, None, model=adapted)
    assert flow.missing == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def told(has_changed: bool, ended: bool | None) -> Told:
    return Told("?", "!", "base", "adapter", has_changed, ended)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([told(True, True)] * 8, []),
        ([told(False, True)] * 7 + [told(True, None)], []),
        ([told(False, True)] * 8, ["none of 8 questions is answered differently"]),
        ([told(True, False)] * 5 + [told(True, True)] * 3, ["5 of 8 answers did not end"]),
        ([told(True, None)] * 5 + [told(True, True)] * 3, []),
        ([told(False, False)], ["none of 1 question is", "1 of 1 answer did not end"]),
        ([], []),
    ],
)
def test_answers_that_stay_or_never_end_are_told(adapted: Any, answers: list[Told], words: list[str]) -> None:
    sentences = examine(adapted, GradientFlow(), losses(), Answers(tuple(answers))).sentences
    assert len(sentences) == len(words)
    assert all(word in sentence for word, sentence in zip(words, sentences, strict=True))


def test_the_report_s_answers_are_those_of_plain_peft(short_run: Path, random_qwen: Path) -> None:
    report = json.loads((short_run / "report.json").read_text())["health"]["answers"]
    answers = report["told"]
    assert report["changed"] == sum(answer["has_changed"] for answer in answers)
    assert (report["judged"], report["ended"]) == (2, 0)
    tokenizer = AutoTokenizer.from_pretrained(random_qwen)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(random_qwen, dtype=torch.float32), short_run / "adapter"
    )
    assert {answer["question"] for answer in answers} <= {row["instruction"] for row in ROWS}
    assert len({answer["question"] for answer in answers}) == len(answers) == 2

    def said(question: str, tokens: int) -> str:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, repetition_penalty=1.0)
        return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    for answer in answers:
        tokens = 2 * (len(tokenizer(answer["expected"]).input_ids) + 1) + 32
        assert answer["adapter"] == said(answer["question"], tokens)
        with model.disable_adapter():
            assert answer["base"] == said(answer["question"], 48)
        assert answer["has_changed"] == (not answer["adapter"].startswith(answer["base"][:20]))
        assert answer["ended"] is False  # random weights never say the end token


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_run_reports_its_health(
    cli: Callable[..., Result], rows_file: Path, tmp_path: Path, quantization: str
) -> None:
    result = cli(
        "sft", "--model.base", "tiny-qwen", "--model.quantization", quantization, "--data.train", rows_file,
        "--training.max_steps", "3", "--training.learning_rate", "1e-3", "--output", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    health = json.loads((tmp_path / "run" / "report.json").read_text())["health"]
    assert health["without_gradient"] == []
    assert not any("update" in sentence or "module" in sentence for sentence in health["sentences"])
    assert set(health["updates"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(0 < size["median"] <= size["largest"] < 0.5 for size in health["updates"].values())
    assert "of the weights' norm" in result.stderr
    told = health["answers"]["told"]
    assert f"{sum(one['has_changed'] for one in told)} of {len(told)} differ from the base's" in result.stderr
    assert told[0]["question"] in result.stderr


def test_a_row_that_cannot_be_asked_does_not_disturb_the_end_of_a_run(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some templates refuse a conversation about tools that they are not given."""
    refused: list[Any] = []
    render = Encoder.prompt_ids

    def picky(self: Encoder, messages: Any, tools: Any = ()) -> list[int]:
        if messages[0]["content"] == "Add one":
            refused.append(messages)
            raise LoratuneError("the template refuses it", Exit.DATA)
        return render(self, messages, tools)

    rows = tmp_path / "rows.json"
    texts = [("Add one", "It is 2."), ("Hi", "Hello")]
    rows.write_text(json.dumps([{"instruction": question, "output": answer} for question, answer in texts]))
    monkeypatch.setattr(Encoder, "prompt_ids", picky)
    result = cli(
        "sft", "--model.base", "tiny-qwen", "--data.train", rows, "--data.validation", "0", "--training.max_steps", "1",
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert refused
    told = json.loads((tmp_path / "run" / "report.json").read_text())["health"]["answers"]["told"]
    assert [one["question"] for one in told] == ["Hi"]


def test_answers_that_are_alike_up_to_where_one_is_cut_off_are_no_change() -> None:
    def ran(tokens: list[int], most: int, finish: str = "length") -> RunningSequence:
        return RunningSequence([1], Sampling(max_new_tokens=most), frozenset(), tokens=tokens, finish=finish)

    def text_of(running: RunningSequence) -> str:
        return str(running.tokens)

    messages = [{"content": "?"}, {"content": "!"}]
    long = list(range(48))
    stopped = ran(long[:20], 48, "stop")
    for before, now, has_changed in (
        (stopped, ran(long[:20], 48, "stop"), False),
        (stopped, ran(long[:9], 48), False),
        (stopped, ran(long[:21], 48), True),
        (ran(long[:9], 48), ran(long[:20], 48, "stop"), False),
    ):
        assert _told(text_of, messages, 2, before, now).has_changed == has_changed
    for now, has_changed in (
        (ran(long[:36], 36), False),
        (ran([*long, 7, 8], 50), False),
        (ran([*long[:35], 99], 36), True),
        (ran(long[:5], 36, "stop"), True),
    ):
        assert _told(text_of, messages, 2, ran(long, 48), now).has_changed == has_changed
