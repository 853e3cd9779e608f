"""Training, measuring and decoding with the targets of every family: gradients, memory, and plain PEFT's reading."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import CONFIGS, make_tiny_model, tiny_config
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D
from typer.testing import Result

from loratune.engine.decoder_choice import open_decoder
from loratune.engine.sampling import Sampling
from loratune.engine.sequence import RunningSequence
from loratune.errors import LoratuneError
from loratune.model.adapter.attach import attach_adapter, save_adapter
from loratune.model.adapter.own_parameters import BASE
from loratune.model.adapter.targets import check_attached, resolve_targets
from loratune.model.config import auto_class, empty_model
from loratune.model.hardware import detect_hardware
from loratune.recipe.sections import LoraSettings
from loratune.training.activations import measure_passes
from loratune.training.trainer import AdapterTrainer

QUICK = ("qwen3_5", "qwen3_5_moe", "gpt_oss", "gpt2")
"""Those of the default run: recurrent layers, beside experts, experts as [inputs, outputs], and matrices as such."""
KINDS = [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in CONFIGS]
MIXTURES = (
    "deepseek_v3", "glm4_moe", "gpt_oss", "mixtral", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe",
    "qwen3_next",
)  # fmt: skip
OUTSIDE = re.compile(r"(.*\.)?(visual|vision_tower|vision_model|multi_modal_projector|lm_head)(\..*)?")
GATES = re.compile(r".*\.(in_proj_a|in_proj_b|in_proj_ba|shared_expert_gate)")
WITHIN = {
    "attention": re.compile(r".*\.(self_attn|linear_attn|attn|mamba|conv)\.\w+"),
    "shared-experts": re.compile(r".*\.shared_experts?\.\w+"),
    "mlp": re.compile(r".*\.(mlp|feed_forward|shared_mlp)\.\w+"),
}
REPLACED = {"deepseek_v3", "glm4_moe", "qwen3_next"}
"""Families on which PEFT takes gate_proj, up_proj and down_proj for matrices of experts, wherever they are."""


def by_name(kind: str, model: Any, group: str) -> set[str]:
    """The modules of a group, from the classes of modules and their names."""
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not OUTSIDE.fullmatch(name) and not GATES.fullmatch(name)
    }
    if kind in REPLACED:
        linear = {name for name in linear if not name.endswith(("gate_proj", "up_proj", "down_proj"))}
    return {name for name in linear if group == "all-linear" or WITHIN[group].fullmatch(name)}


def stacks(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if ".experts." in name and parameter.ndim == 3}


def loaded(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    return auto_class(type(config)).from_pretrained(folder, dtype=torch.float32).eval()


def adapted_by_peft(model: Any) -> set[str]:
    """The names of modules and parameters that have LoRA matrices, from the names of trained weights alone."""
    wrapped = dict(model.named_modules())
    found = set()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            place = name.partition(".lora_")[0]
            stack = getattr(wrapped[place], "parameter_name", None)
            plain = place.removeprefix("base_model.model.").replace(".base_layer", "")
            found.add(f"{plain}.{stack}" if stack else plain)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_targets_are_trained_and_plain_peft_reads_them(kind: str, tmp_path: Path) -> None:
    base, ids = make_tiny_model(kind, tmp_path / "base"), torch.arange(20, 44)[None]
    for number, target in enumerate(["all-linear", *([["attention", "experts"]] if kind in MIXTURES else [])]):
        plain = loaded(base)
        group = "attention" if "experts" in target else "all-linear"
        expected = by_name(kind, plain, group) | (stacks(plain) if "experts" in target else set())
        model: Any = attach_adapter(plain, LoraSettings(target_modules=target, rank=2, dropout=0.0), str(base), 0)
        assert adapted_by_peft(model) == expected
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if ".lora_B." in name:
                    nn.init.normal_(weight, 0.0, 0.2)
        model(input_ids=ids, labels=ids).loss.backward()
        for name, weight in model.named_parameters():
            assert weight.requires_grad == (".lora_" in name), name
            assert (weight.grad is not None and bool(weight.grad.any())) == weight.requires_grad, name
        save_adapter(model, tmp_path / f"adapter{number}")
        by_peft = PeftModel.from_pretrained(loaded(base), tmp_path / f"adapter{number}")
        with torch.no_grad():
            logits = [one(input_ids=ids).logits for one in (model, by_peft, loaded(base))]
        assert torch.equal(logits[0], logits[1])
        assert (logits[0] - logits[2]).abs().max() > 1e-3 * logits[2].abs().max()


def attached(kind: str, **settings: Any) -> tuple[Any, Any]:
    """A model on which PEFT has put an adapter, and the attention as its targets."""
    model = auto_class(type(tiny_config(kind))).from_config(tiny_config(kind))
    targets = resolve_targets(model, LoraSettings(target_modules="attention"))
    return get_peft_model(model, LoraConfig(r=2, **settings)), targets


def test_an_adapter_on_a_router_is_refused() -> None:
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model, targets = attached("qwen3_moe", target_modules=attention)
    check_attached(model, targets)
    model, targets = attached("qwen3_moe", target_modules=attention, target_parameters=["mlp.gate.weight"])
    with pytest.raises(LoratuneError, match=r"model\.layers\.0\.mlp\.gate\.weight was not asked for"):
        check_attached(model, targets)


@pytest.mark.filterwarnings("ignore:The following rank_pattern:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:The following alpha_pattern:RuntimeWarning")
def test_targets_that_peft_replaces_are_refused() -> None:
    names = ["gate_proj", "up_proj", "down_proj"]
    model, targets = attached("qwen3_next", target_modules=names)
    with pytest.raises(LoratuneError, match=r"experts\.down_proj was not asked for"):
        check_attached(model, targets)
    base = empty_model(tiny_config("qwen3_next"))
    for target in ("down_proj", "model.layers.0.mlp.shared_expert.down_proj", r".*shared_expert\..*"):
        with pytest.raises(LoratuneError, match=r"down_proj.* for the matrices of all experts; use experts"):
            resolve_targets(base, LoraSettings(target_modules=[target]))
    left_out = resolve_targets(base, LoraSettings(target_modules="all-linear")).left_out
    assert "down_proj, gate_proj, up_proj, which PEFT takes for experts of this architecture" in left_out


def test_experts_are_trained_with_recomputed_copies_and_without_auxiliary_loss(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_tiny_model("qwen3_moe", tmp_path / "base", output_router_logits=True)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    seen, routers = [], []
    plain = AdapterTrainer.training_step

    def watched(self: Any, model: Any, *arguments: Any, **settings: Any) -> Any:
        result = plain(self, model, *arguments, **settings)
        seen.append((model.config.output_router_logits, model.base_model.model.model.gradient_checkpointing))
        routers.append(
            [weight.clone() for name, weight in model.named_parameters() if name.endswith("mlp.gate.weight")]
        )
        return result

    monkeypatch.setattr(AdapterTrainer, "training_step", watched)
    result = cli(
        "sft", "--model.base", base, "--data.train", tmp_path / "rows.json", "--lora.target_modules", "experts",
        "--training.max_steps", "2", "--training.batch_size", "4", "--training.learning_rate", "1e-2",
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert seen
    assert {*seen} == {(False, True)}
    assert all(torch.equal(first, last) for first, last in zip(routers[0], routers[-1], strict=True))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["gradient_checkpointing"] is True
    assert report["adapter"]["groups"].keys() == {"experts"}
    assert report["adapter"]["groups"]["experts"]["parameters"] == report["adapter"]["trainable_parameters"]
    shown = re.sub(r"\s+", " ", result.stderr)
    assert re.search(r"experts 4 stacks, [\d,]+ parameters \(100%\)", shown)


def test_copies_of_experts_are_no_memory_of_tokens(tmp_path: Path) -> None:
    base, hardware = make_tiny_model("qwen3_moe", tmp_path / "base"), detect_hardware()
    found = {}
    for target in ("attention", "experts"):
        settings = LoraSettings(target_modules=["attention", target], dropout=0.0, rank=1)
        model = attach_adapter(loaded(base), settings, str(base), 0)
        trained = 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        memory = measure_passes(model, False, 64, 64, hardware)
        found[target] = (memory.kept, memory.fixed - trained)
    copies = sum(p.numel() * p.element_size() for name, p in loaded(base).named_parameters() if ".experts." in name)
    # Two layers: the copies of one and their gradients are as large as those of both.
    assert found["experts"][1] - found["attention"][1] == pytest.approx(copies, rel=0.1)
    assert measure_passes(model, False, 256, 256, hardware).kept == pytest.approx(found["experts"][0], rel=0.05)


def test_rows_with_and_without_experts_are_decoded_side_by_side(tmp_path: Path) -> None:
    base = make_tiny_model("qwen3_moe", tmp_path / "base")
    settings = LoraSettings(target_modules=["attention", "experts"], dropout=0.0, rank=2)
    model: Any = attach_adapter(loaded(base), settings, str(base), 0).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(weight, 0.0, 0.5)
    save_adapter(model, tmp_path / "adapter")
    prompts = [(list(range(20, 30)), "default"), (list(range(20, 30)), BASE), (list(range(40, 60)), "default")]
    expected = []
    by_peft = PeftModel.from_pretrained(loaded(base), tmp_path / "adapter")
    for prompt, adapter in prompts:
        one = loaded(base) if adapter == BASE else by_peft
        made = one.generate(input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=3002)
        expected.append(made[0, len(prompt) :].tolist())
    decoder = open_decoder(model, slots=4)
    greedy = Sampling(max_new_tokens=6, repetition_penalty=1.0)
    rows = [RunningSequence(prompt, greedy, frozenset({3002}), adapter) for prompt, adapter in prompts]
    for row in rows:
        decoder.add(row)
    while not decoder.is_idle:
        decoder.step()
    decoder.close()
    assert [row.tokens for row in rows] == expected
    assert expected[0] != expected[1]
