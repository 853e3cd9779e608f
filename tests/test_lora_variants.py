"""LoRA's variants: starts from the base, rates of A and B, ranks and alphas of modules; compared with PEFT's own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TinyModel
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import Result

from loratune.errors import Exit, LoratuneError
from loratune.model.adapter import starts
from loratune.model.adapter.attach import attach_adapter
from loratune.model.adapter.input_start import start_from_inputs
from loratune.model.adapter.own_parameters import own_parameters
from loratune.model.adapter.targets import attached_layers
from loratune.model.architecture.roles import quantised_matrices
from loratune.model.base import load_base
from loratune.model.hardware import detect_hardware
from loratune.model.weights.dequantised import held_weight, inputs_unrounded
from loratune.recipe.advice import advise
from loratune.recipe.method_sections import LoraSettings
from loratune.recipe.sections import ModelSettings, Recipe
from loratune.training.base_start import BaseStart
from loratune.training.rates import with_rate_ratio

Cli = Callable[..., Result]
IDS = torch.tensor([[5, 6, 7, 8, 2000, 3000, 41, 40], [9, 60, 70, 80, 2001, 2999, 14, 4]])
RANK, ALPHA = 4, 12
STARTS = ["pissa", "olora"]


def base_of(folder: Path, dtype: Any = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits.float()


def adapted(folder: Path, dtype: Any = torch.float32, **settings: Any) -> Any:
    lora = LoraSettings.model_validate({"rank": RANK, "alpha": ALPHA, "dropout": 0.0} | settings)
    return attach_adapter(base_of(folder, dtype), lora, "base", 0)


def trained_by_hand(model: Any, callback: BaseStart | None = None) -> torch.Tensor:
    """Take five steps of AdamW, and return the logits."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3, weight_decay=0.0)
    nothing: Any = SimpleNamespace()
    for _ in range(5):
        model(input_ids=IDS, labels=IDS).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.5)
        if callback:
            callback.on_pre_optimizer_step(nothing, nothing, nothing)
        optimizer.step()
        if callback:
            callback.on_optimizer_step(nothing, nothing, nothing)
        optimizer.zero_grad()
    return logits_of(model)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", STARTS)
def test_a_start_from_the_base_changes_neither_base_nor_logits(random_qwen: Path, init: str, use_rslora: bool) -> None:
    plain = base_of(random_qwen)
    model = adapted(random_qwen, init=init, use_rslora=use_rslora)
    assert torch.equal(logits_of(plain), logits_of(model))
    own = {name.replace(".base_layer", ""): weight for name, weight in model.get_base_model().named_parameters()}
    assert all(torch.equal(weight, own[name]) for name, weight in plain.named_parameters())
    assert model.peft_config["default"].r == 2 * RANK
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(ALPHA / (RANK**0.5 if use_rslora else RANK))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", STARTS)
def test_a_start_from_the_base_is_trained_as_peft_trains_it(
    random_qwen: Path, init: str, use_rslora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=init, use_rslora=use_rslora,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    before = logits_of(base_of(random_qwen))
    expected = trained_by_hand(get_peft_model(base_of(random_qwen), config))
    model = adapted(random_qwen, init=init, use_rslora=use_rslora)
    found = trained_by_hand(model, BaseStart(model, is_used=True))
    change = float((expected - before).norm())
    assert float((found - expected).norm()) < 2e-3 * change, "float32, and a decomposition by iteration"

    for planted in ("_without_initial", "_of_difference", "B stays behind"):
        with monkeypatch.context() as patch:
            if planted.startswith("_"):
                patch.setattr(starts, planted, lambda weight: None)
            model = adapted(random_qwen, init=init, use_rslora=use_rslora)
        found = trained_by_hand(model, BaseStart(model, is_used=planted != "B stays behind"))
        assert float((found - expected).norm()) > 2e-2 * change, planted


@pytest.mark.parametrize(
    ("init", "kind", "flags"),
    [
        ("olora", "qwen2", ["--model.quantization", "int8"]),
        ("pissa", "gpt2", []),  # whose matrices are transposed
        pytest.param("pissa", "qwen2", ["--model.quantization", "int8"], marks=pytest.mark.slow),
        pytest.param("pissa", "qwen2", ["--model.quantization", "nf4"], marks=pytest.mark.slow),
        pytest.param("olora", "qwen2", ["--model.quantization", "nf4"], marks=pytest.mark.slow),
        pytest.param("olora", "gpt2", [], marks=pytest.mark.slow),
        pytest.param("pissa", "qwen2", ["--lora.use_dora"], marks=pytest.mark.slow),
        ("eva", "gpt2", []),
        pytest.param("eva", "qwen2", ["--model.quantization", "int8"], marks=pytest.mark.slow),
        pytest.param("eva", "qwen2", ["--lora.use_dora"], marks=pytest.mark.slow),
        pytest.param("eva", "qwen2", ["--model.quantization", "nf4"], marks=pytest.mark.slow),
        pytest.param("eva", "qwen2_moe", ["--lora.target_modules", "shared-experts"], marks=pytest.mark.slow),
        pytest.param("eva", "qwen3_5_text", [], marks=pytest.mark.slow),  # with recurrent layers
    ],
)
def test_a_start_from_any_base_has_no_effect_before_the_first_step(
    tiny_model: TinyModel, cli: Cli, rows_file: Path, tmp_path: Path, init: str, kind: str, flags: list[str]
) -> None:
    """The run's own checks compare PEFT's reading of the files; here the first validation is the base's."""
    losses = {}
    for name, start in {"default": [], init: ["--lora.init", init, "--lora.rank", 2]}.items():
        result = cli(
            "sft", "--model.base", tiny_model(kind), "--model.dtype", "float32", "--data.train", rows_file, *flags,
            "--data.validation", "0.2", "--training.max_steps", 2, "--evaluation.questions_share", 0, "--output",
            tmp_path / name, *start,
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        losses[name] = json.loads((tmp_path / name / "report.json").read_text())["validation_loss"]
    assert losses[init]["before"] == pytest.approx(losses["default"]["before"], rel=1e-6)
    assert losses[init]["after"] != losses[init]["before"]


PADDED = torch.tensor([[5, 6, 7, 8, 2000, 3000, 41, 40], [9, 60, 70, 80, 2001, 14, 0, 0]])
MASK = torch.tensor([[1] * 8, [1] * 6 + [0] * 2]).bool()
LABELLED = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0, 0]]).bool()


def inputs_of(model: Any, name: str) -> torch.Tensor:
    """What a layer of the base reads at the labelled positions, each row by itself, in float64."""
    found: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0][0]))
    with torch.inference_mode():
        for ids, mask in zip(PADDED, MASK, strict=True):
            model(input_ids=ids[mask][None])
    hook.remove()
    return torch.cat([states[one[: len(states)]] for states, one in zip(found, LABELLED, strict=True)]).double()


def off_directions(model: Any, base: Any) -> list[str]:
    """The layers whose A is not what the singular vectors of their inputs are, up to signs."""
    off = []
    for name, layer in attached_layers(model):
        inputs = inputs_of(base, name)
        _, _, right = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False)
        weight = layer.lora_A["default"].weight.detach().double()
        assert not layer.lora_B["default"].weight.any()
        # The inputs are float32, and the gaps between their singular values are not much smaller than these.
        if not torch.allclose((weight * right[:RANK]).sum(1).abs(), torch.ones(RANK).double(), atol=1e-6):
            off.append(name)
    return off


def test_eva_begins_with_the_singular_vectors_of_what_each_layer_reads(random_qwen: Path) -> None:
    base, model = base_of(random_qwen), adapted(random_qwen)
    assert len(off_directions(model, base)) == len(list(attached_layers(model))) == 14
    start_from_inputs(model, PADDED, MASK, LABELLED)
    assert off_directions(model, base) == []
    torch.testing.assert_close(logits_of(model), logits_of(base), rtol=0, atol=0)
    start_from_inputs(model, PADDED, MASK, MASK)  # of questions too
    assert off_directions(model, base)


def test_eva_is_what_peft_computes_of_the_same_rows(random_qwen: Path) -> None:
    from peft import EvaConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    model = adapted(random_qwen)
    start_from_inputs(model, PADDED, MASK, LABELLED)
    config = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    other = get_peft_model(base_of(random_qwen), config, low_cpu_mem_usage=True)
    batch = {"input_ids": PADDED, "attention_mask": MASK.long(), "labels": PADDED.where(LABELLED, -100)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = get_eva_state_dict(other, [batch, batch], show_progress_bar=False)  # it stops when nothing changes
    for name, layer in attached_layers(model):
        expected = next(values for key, values in known.items() if key.endswith(name))
        alike = (layer.lora_A["default"].weight * expected).sum(1).abs().float()
        torch.testing.assert_close(alike, torch.ones(RANK), rtol=0, atol=1e-4)


def test_directions_that_rows_do_not_have_are_refused_by_name(random_qwen: Path) -> None:
    model = adapted(random_qwen, rank=12)
    with pytest.raises(LoratuneError, match="the inputs at 11 answer tokens have too few directions") as caught:
        start_from_inputs(model, PADDED, MASK, LABELLED)
    assert "model.layers.0.self_attn.q_proj: 10 directions, and its rank is 12" in str(caught.value)
    assert "and 9 more" in str(caught.value)
    model = adapted(random_qwen, target_modules=["q_proj"])
    model.config.num_hidden_layers = 1
    with pytest.raises(LoratuneError, match=r"layers\.1\.self_attn\.q_proj: it does not read every token") as caught:
        start_from_inputs(model, PADDED, MASK, LABELLED)
    assert "layers.0" not in str(caught.value)
    assert caught.value.exit_code == Exit.USAGE


def test_a_run_with_eva_begins_with_the_first_rows_and_leaves_plain_lora(
    sft: Callable[..., Path], random_qwen: Path
) -> None:
    flags = ("--lora.rank", RANK, "--training.batch_size", 4, "--training.learning_rate", "1e-9")
    weights = {}
    for name, more in {"default": [], "eva": ["--lora.init", "eva"], "again": ["--lora.init", "eva"]}.items():
        run = sft(name, *flags, *more)
        weights[name] = load_file(run / "adapter" / "adapter_model.safetensors")
        config = json.loads((run / "adapter" / "adapter_config.json").read_text())
        assert (config["r"], config["init_lora_weights"]) == (RANK, True)
        assert by_peft(random_qwen, run / "adapter").isfinite().all()
    for name, tensor in weights["eva"].items():
        assert torch.equal(tensor, weights["again"][name])
        if "lora_A" in name:
            assert not torch.allclose(tensor, weights["default"][name], atol=1e-2)
            torch.testing.assert_close(tensor @ tensor.T, torch.eye(RANK), rtol=0, atol=1e-5)


def test_a_rank_above_that_of_the_base_is_refused_with_the_modules(random_qwen: Path) -> None:
    with pytest.raises(LoratuneError, match="above the base's own") as caught:
        adapted(random_qwen, init="pissa", rank=40)
    assert "model.layers.0.self_attn.k_proj: 16 × 32, of rank 16 at most" in str(caught.value)
    assert caught.value.exit_code == Exit.USAGE


@pytest.fixture
def sft(cli: Cli, random_qwen: Path, rows_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train a few steps into a folder of tmp_path."""

    def run(name: str, *flags: Any) -> Path:
        result = cli(
            "sft", "--model.base", random_qwen, "--model.dtype", "float32", "--data.train", rows_file,
            "--training.learning_rate", "2e-3", "--training.max_steps", 3, "--lora.dropout", "0",
            "--evaluation.questions_share", "0", "--output", tmp_path / name, *flags,
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        return tmp_path / name

    return run


def by_peft(base: Path, adapter: Path) -> torch.Tensor:
    return logits_of(PeftModel.from_pretrained(base_of(base), str(adapter)))


def test_dora_on_int8_is_peft_s_on_the_dequantised_weights(random_qwen: Path) -> None:
    """On a CPU, PEFT's dequantisation would leave bitsandbytes' own layers without scales."""
    settings = ModelSettings(base="x", dtype="float32", quantization="int8")
    quantised, dense = load_base(settings, random_qwen, detect_hardware()), base_of(random_qwen)
    for name in quantised_matrices(dense):
        dense.get_parameter(name).data = held_weight(quantised.get_submodule(name.removesuffix(".weight")))
    before = own_parameters(quantised).fingerprint()
    lora = LoraSettings(rank=RANK, alpha=ALPHA, use_dora=True)
    model, expected = (attach_adapter(base, lora, "base", 0) for base in (quantised, dense))
    trained = {name: weight for name, weight in expected.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for name, weight in trained.items():
            weight += 0.1 * torch.randn_like(weight)
            model.get_parameter(name).copy_(weight)
    expected(input_ids=IDS, labels=IDS).loss.backward()
    wanted = logits_of(expected)
    for _ in range(2):  # the first pass moves the scales
        found = logits_of(model)
        # bitsandbytes rounds what a layer reads to 1/127 of its largest value.
        assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.02
    assert own_parameters(model).fingerprint() == before
    with inputs_unrounded(model):
        torch.testing.assert_close(logits_of(model), wanted, rtol=0, atol=1e-5)
        model(input_ids=IDS, labels=IDS).loss.backward()
    for name, weight in trained.items():
        torch.testing.assert_close(model.get_parameter(name).grad, weight.grad, rtol=1e-4, atol=1e-6)


def test_a_run_with_dora_on_int8_answers_and_is_merged(
    sft: Callable[..., Path], cli: Cli, random_qwen: Path, tmp_path: Path
) -> None:
    run = sft("run", "--model.quantization", "int8", "--lora.use_dora")
    answer = cli("infer", "--adapter", run, "--prompt", "How much?", "--max-new-tokens", 4)
    assert answer.exit_code == 0, answer.stderr
    done = cli("merge", "--adapter", run, "--output", tmp_path / "merged")
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize("init", ["pissa", pytest.param("olora", marks=pytest.mark.slow)])
def test_a_run_that_starts_from_the_base_leaves_plain_lora_of_twice_the_rank(
    sft: Callable[..., Path], cli: Cli, random_qwen: Path, tmp_path: Path, init: str
) -> None:
    run = sft("run", "--lora.init", init, "--lora.rank", RANK, "--lora.alpha", 16, "--training.optimizer", "adamw")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (2 * RANK, 32, True)
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    base = dict(base_of(random_qwen).named_parameters())
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        down, up = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        weight = base[name.removeprefix("base_model.model.").replace("lora_A.", "")].detach()
        # What it has begun with: still in A, and the difference between the halves of B.
        begun = (up[:, :RANK] - up[:, RANK:]) @ down[RANK:] * 16 / RANK
        if init == "pissa":
            left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
            expected = left[:, :RANK] * sizes[:RANK] @ right[:RANK]
        else:
            columns, rows = torch.linalg.qr(weight)
            expected = 16 / RANK * columns[:, :RANK] @ rows[:RANK]
        torch.testing.assert_close(begun, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        assert down[:RANK].any()
        assert up[:, RANK:].any()

    assert cli("merge", "--adapter", run, "--output", tmp_path / "merged").exit_code == 0
    merged, saved = logits_of(base_of(tmp_path / "merged")), by_peft(random_qwen, run / "adapter")
    torch.testing.assert_close(merged, saved, rtol=0, atol=1e-5 * float(saved.abs().max()))
    assert float((saved - logits_of(base_of(random_qwen))).abs().max()) > 1e-3


def test_the_matrices_b_have_the_rate_that_the_ratio_says(sft: Callable[..., Path]) -> None:
    flags = ("--training.max_steps", 1, "--training.scheduler", "constant", "--training.warmup", 0)
    for ratio in (1, 8):
        run = sft(f"run{ratio}", *flags, "--lora.b_learning_rate_ratio", ratio)
        tensors = load_file(run / "adapter" / "adapter_model.safetensors")
        # The first step of Adam moves a weight by the rate, whatever its gradient; B begins with zeros.
        moved = [tensor.abs().max() for name, tensor in tensors.items() if "lora_B" in name]
        assert float(max(moved)) == pytest.approx(2e-3 * ratio, rel=1e-4)


def test_the_groups_of_rates_are_peft_s(random_qwen: Path) -> None:
    model = adapted(random_qwen, bias="all")
    names = {id(weight): name for name, weight in model.named_parameters()}
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    own = with_rate_ratio(torch.optim.AdamW(weights, lr=1e-3), model, 16)
    expected = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    found, wanted = (
        {names[id(weight)]: group["lr"] for group in optimizer.param_groups for weight in group["params"]}
        for optimizer in (own, expected)
    )
    assert found == wanted
    assert {*found.values()} == {1e-3, 16e-3}


PATTERNS: dict[str, Any] = {
    "rank_pattern": {"o_proj": 2, r"layers\.1\..*up_proj": 6}, "alpha_pattern": {"self_attn.o_proj": 5, "k_proj": 3},
}  # fmt: skip


@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_give_modules_the_ranks_and_scales_that_peft_gives_them(random_qwen: Path, use_rslora: bool) -> None:
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", use_rslora=use_rslora, **PATTERNS)
    layers = dict(get_peft_model(base_of(random_qwen), config).base_model.model.named_modules())
    for init, times in (("default", 1), ("pissa", 2)):
        model = adapted(random_qwen, use_rslora=use_rslora, init=init, **PATTERNS).get_base_model()
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                assert module.r["default"] == times * layers[name].r["default"]
                assert module.scaling["default"] == pytest.approx(layers[name].scaling["default"])
    assert {layer.r["default"] for layer in layers.values() if isinstance(layer, LoraLayer)} == {2, 4, 6}


def test_a_run_with_patterns_is_merged_as_peft_computes_it(
    sft: Callable[..., Path], cli: Cli, random_qwen: Path, tmp_path: Path
) -> None:
    patterns = ("--lora.rank_pattern", "o_proj=2", "--lora.alpha_pattern", "down_proj=64.5")
    run = sft("run", *patterns)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"o_proj": 2}, {"down_proj": 64.5})
    assert cli("merge", "--adapter", run, "--output", tmp_path / "merged").exit_code == 0
    merged, saved = logits_of(base_of(tmp_path / "merged")), by_peft(random_qwen, run / "adapter")
    torch.testing.assert_close(merged, saved, rtol=0, atol=1e-5 * float(saved.abs().max()))


def test_patterns_without_a_module_are_refused_together(random_qwen: Path) -> None:
    with pytest.raises(LoratuneError) as caught:
        adapted(random_qwen, target_modules="mlp", rank_pattern={"o_proj": 2, "(": 3}, alpha_pattern={"head": 1})
    assert caught.value.exit_code == Exit.USAGE
    told = str(caught.value)
    assert "lora.rank_pattern 'o_proj': no module of the adapter ends so; it has gate_proj, up_proj, down_proj" in told
    assert "lora.rank_pattern '(' is not a regular expression: missing ), unterminated subpattern at position 0" in told
    assert "lora.alpha_pattern 'head'" in told


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ({"init": "pissa", "rank": 16, "alpha": 32}, ["plain LoRA of rank 32", "--max-lora-rank 32"]),
        ({"init": "pissa", "rank": 200, "alpha": 400}, ["highest rank, 400, is above vLLM's default"]),
        ({"init": "olora", "rank": 300, "alpha": 600}, ["highest rank, 600, is above 512", "has to be merged"]),
        ({"rank_pattern": {"o_proj": 64}}, ["--max-lora-rank 64", "lora.alpha_pattern: vLLM and SGLang cannot serve"]),
        ({"alpha_pattern": {"o_proj": 64}}, ["vLLM and SGLang cannot serve"]),
    ],
)
def test_what_a_server_makes_of_a_variant_is_told(lora: dict[str, Any], told: list[str]) -> None:
    sentences = " ".join(
        advise(Recipe.model_validate({"model": {"base": "x"}, "data": {"train": ["a"]}, "lora": lora}))
    )
    assert all(part in sentences for part in told), sentences


def test_patterns_of_one_scale_are_served() -> None:
    lora = {"rank_pattern": {"o_proj": 4}, "alpha_pattern": {"o_proj": 8}}
    assert advise(Recipe.model_validate({"model": {"base": "x"}, "data": {"train": ["a"]}, "lora": lora})) == []
