"""Training, measuring and decoding with the targets of every family: gradients, memory, and plain PEFT's reading."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, TinyModel
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import CONFIGS, MIXTURES, make_tiny_model, tiny_config
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D
from typer.testing import Result

from loratune.delivery.merge import sources
from loratune.delivery.merge.update import TensorUpdate
from loratune.engine.decoder_choice import open_decoder
from loratune.engine.sampling import Sampling
from loratune.engine.sequence import RunningSequence
from loratune.errors import LoratuneError
from loratune.model.adapter.attach import attach_adapter, load_adapter, save_adapter
from loratune.model.adapter.combination import combine_adapters
from loratune.model.adapter.own_parameters import BASE
from loratune.model.adapter.targets import check_attached, resolve_targets
from loratune.model.architecture.structure import decoder_of
from loratune.model.config import auto_class, empty_model
from loratune.model.hardware import detect_hardware
from loratune.recipe.method_sections import LoraSettings
from loratune.training.activations import measure_passes
from loratune.training.trainer import AdapterTrainer

QUICK = ("qwen3_5", "qwen3_5_moe", "gpt_oss", "gpt2")
"""Those of the default run: recurrent layers, beside experts, experts as [inputs, outputs], and matrices as such."""
KINDS = [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in CONFIGS]
OUTSIDE = re.compile(r"(.*\.)?(visual|embed_vision|vision_tower|vision_model|multi_modal_projector|lm_head)(\..*)?")
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
def test_exactly_the_targets_are_trained_and_plain_peft_reads_them(
    kind: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    base, ids = tiny_model(kind), torch.arange(20, 44)[None]
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
        again = load_adapter(loaded(base), tmp_path / f"adapter{number}")
        with torch.no_grad():
            expected, found, own, plain = (one(input_ids=ids).logits for one in (by_peft, model, again, loaded(base)))
        assert torch.equal(found, expected)
        assert torch.equal(own, expected)
        assert (plain - expected).abs().max() > 1e-3 * plain.abs().max()


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


def test_targets_that_peft_refuses_are_told_with_what_else_there_is() -> None:
    model = empty_model(tiny_config("granitemoehybrid"))
    model.config.model_type = "falcon_h1"  # where PEFT refuses the projection behind a state
    with pytest.raises(LoratuneError, match=r"PEFT refuses one of .*in_proj.*'out_proj' is incompatible"):
        attach_adapter(model, LoraSettings(), "base", seed=0)


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
    base = make_tiny_model("qwen3_5_moe_text", tmp_path / "base", output_router_logits=True)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    seen, routers = [], []
    plain = AdapterTrainer.training_step

    def watched(self: Any, model: Any, *arguments: Any, **settings: Any) -> Any:
        result = plain(self, model, *arguments, **settings)
        seen.append((model.config.output_router_logits, decoder_of(model).gradient_checkpointing))
        routers.append(
            [weight.clone() for name, weight in model.named_parameters() if name.endswith("mlp.gate.weight")]
        )
        return result

    monkeypatch.setattr(AdapterTrainer, "training_step", watched)
    result = cli(
        "sft", "--model.base", base, "--data.train", tmp_path / "rows.json",
        "--lora.target_modules", "all-linear", "--lora.target_modules", "experts",
        "--training.max_steps", "2", "--training.batch_size", "4", "--training.learning_rate", "1e-2",
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert seen
    assert {*seen} == {(False, True)}
    assert all(torch.equal(first, last) for first, last in zip(routers[0], routers[-1], strict=True))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["gradient_checkpointing"] is True
    groups = report["adapter"]["groups"]
    assert groups.keys() == {"attention", "shared-experts", "experts"}
    assert sum(group["parameters"] for group in groups.values()) == report["adapter"]["trainable_parameters"]
    assert 0 < report["health"]["expert_use"]["used"] <= report["health"]["expert_use"]["all"] == 8
    shown = re.sub(r"\s+", " ", result.stderr)
    assert f"experts 4 stacks, {groups['experts']['parameters']:,} parameters" in shown
    assert "gradient checkpointing is on" in shown


def test_copies_of_experts_are_no_memory_of_tokens(tiny_model: TinyModel, tmp_path: Path) -> None:
    base, hardware = tiny_model("qwen3_moe"), detect_hardware()
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


def test_rows_with_and_without_experts_are_decoded_side_by_side(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("qwen3_moe")
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


MERGED = ("qwen3_moe", "qwen3_5_moe", "gpt_oss")
"""Experts in a tensor each, in stacks of nested names, and in transposed stacks."""


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in MERGED else pytest.mark.slow) for k in MIXTURES])
def test_updates_of_experts_are_those_that_peft_computes(kind: str, tmp_path: Path) -> None:
    square = {"intermediate_size": 32} if kind == "gpt_oss" else {}  # whose down matrices are, in the released models
    base = make_tiny_model(kind, tmp_path / "base", **square)
    settings = LoraSettings(target_modules=["attention", "experts"], dropout=0.0, rank=3, alpha=7)
    model: Any = attach_adapter(loaded(base), settings, str(base), 0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(weight)
    save_adapter(model, tmp_path / "adapter")
    _, read = sources._reading(tmp_path / "adapter", base)
    by_peft = PeftModel.from_pretrained(loaded(base), tmp_path / "adapter")
    assert_updates_of_stacks(read(), by_peft, len(stacks(loaded(base))))


def assert_updates_of_stacks(updates: dict[str, TensorUpdate], by_peft: Any, count: int) -> None:
    stacked = 0
    for place, layer in by_peft.base_model.model.named_modules():
        if hasattr(layer, "parameter_name"):
            update = updates[f"{place.replace('.base_layer', '')}.{layer.parameter_name}"]
            delta = layer.get_delta_weight("default").detach().double()
            assert update.up is not None
            assert update.down is not None
            found = update.scaling * (update.up.double() @ update.down.double())
            torch.testing.assert_close(found, delta, rtol=1e-5, atol=1e-6)
            stacked += 1
    assert stacked == count


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k == "gpt_oss" else pytest.mark.slow) for k in MIXTURES])
def test_experts_are_trained_merged_and_equal_to_plain_peft(
    cli: Callable[..., Result], tiny_model: TinyModel, tmp_path: Path, kind: str
) -> None:
    base = tiny_model(kind)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    trained = cli(
        "sft", "--model.base", base, "--data.train", tmp_path / "rows.json", "--model.dtype", "float32",
        "--lora.target_modules", "attention", "--lora.target_modules", "experts", "--training.max_steps", "3",
        "--training.batch_size", "4", "--training.learning_rate", "1e-2", "--output", tmp_path / "run",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.stderr
    merged = cli("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged")
    assert merged.exit_code == 0, merged.stderr
    ids = torch.arange(20, 60)[None]
    by_peft = PeftModel.from_pretrained(loaded(base), tmp_path / "run" / "adapter")
    with torch.no_grad():
        expected, found, plain = (m(input_ids=ids).logits for m in (by_peft, loaded(tmp_path / "merged"), loaded(base)))
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= 1e-4 * scale
    assert (plain - expected).abs().max() > 1e-3 * scale


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern:RuntimeWarning")
def test_adapters_whose_targets_peft_has_replaced_are_read_as_by_peft(tiny_model: TinyModel, tmp_path: Path) -> None:
    """As of those that were trained before transformers 5, whose names PEFT converts and saves."""
    base, ids = tiny_model("mixtral"), torch.arange(20, 44)[None]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["w1", "w2", "w3", "q_proj"], task_type="CAUSAL_LM")
    by_peft: Any = get_peft_model(loaded(base), config).eval()
    assert config.target_parameters == {"gate_up_proj", "down_proj"}
    assert [*config.rank_pattern.values()] == [4]
    with torch.no_grad():
        for name, weight in by_peft.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(weight)
    by_peft.save_pretrained(tmp_path / "adapter")
    model = load_adapter(loaded(base), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, by_peft(input_ids=ids).logits)
    _, read = sources._reading(tmp_path / "adapter", base)
    assert_updates_of_stacks(read(), by_peft, 4)


def test_adapters_on_experts_are_not_combined(tiny_model: TinyModel, tmp_path: Path) -> None:
    """PEFT cannot, which is told before the base is read."""
    base = tiny_model("qwen3_moe")
    for target in ("attention", "experts"):
        model = attach_adapter(loaded(base), LoraSettings(target_modules=target, dropout=0.0), str(base), 0)
        save_adapter(model, tmp_path / target)
    adapters = {target: tmp_path / target for target in ("attention", "experts")}
    with pytest.raises(LoratuneError, match=r"experts .* has experts among its targets") as told:
        combine_adapters(tmp_path / "none", adapters, [0.5, 0.5], "linear", 0.5, tmp_path)
    assert "attention (" not in str(told.value)
