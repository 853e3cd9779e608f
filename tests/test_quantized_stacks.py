"""Quantised bases: a mixture's stacks in 4 bits, what stays in 16 bits, and what quantisation changes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from conftest import ROWS, TinyModel
from tiny_models import MIXTURES, make_tiny_model
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import Result

from loratune.errors import Exit, LoratuneError
from loratune.model import base as base_module
from loratune.model.architecture.file_layout import file_layout
from loratune.model.architecture.roles import expert_stacks, module_roles, quantised_matrices
from loratune.model.base import load_base
from loratune.model.files import weight_files
from loratune.model.from_folder import load_from_folder, load_plain
from loratune.model.hardware import detect_hardware
from loratune.model.weights import quantized_stack, quantizer
from loratune.model.weights.dequantised import held_weight
from loratune.model.weights.held import NOT_QUANTISED, bytes_by_group, held_bytes, value_count
from loratune.model.weights.quantized_files import DequantizedFiles
from loratune.model.weights.quantized_stack import QuantizedParameter, quantize_stack, use_quantized_stacks
from loratune.model.weights.unpacked import keep_unpacked
from loratune.model.weights.unquantised import unquantised
from loratune.recipe.sections import ModelSettings
from loratune.training import quantization_effect
from loratune.training.quantization_effect import measure_effect

Cli = Callable[..., Result]
DEFAULT = ["qwen3_moe", "gpt_oss", "qwen3_next"]
"""Experts per tensor in the files, stacks of (inputs, outputs) with biases, and decay gates."""
KINDS = [kind if kind in DEFAULT else pytest.param(kind, marks=pytest.mark.slow) for kind in MIXTURES]
IDS = torch.arange(5, 45)[None]
PLAIN_NAMES = re.compile(
    r"(lm_head|\.gate|_gate|in_proj_(a|b|ba)|conv1d|norm|router|embed_tokens)\.weight|visual\.|A_log|_bias$"
)
"""Parameters that are not quantised, besides biases."""


def settings_of(folder: Path, quantization: str = "nf4", **others: Any) -> ModelSettings:
    values = {"dtype": "float32", "compute_dtype": "float32", "quantization": quantization} | others
    return ModelSettings(base=str(folder), **values)


def quantised(folder: Path, quantization: str = "nf4", **others: Any) -> Any:
    model = load_base(settings_of(folder, quantization, **others), folder, detect_hardware())
    keep_unpacked(model)
    return model.eval()


def there_and_back(matrix: torch.Tensor, double: bool) -> torch.Tensor:
    codes, state = bnb.quantize_4bit(matrix.contiguous(), quant_type="nf4", compress_statistics=double)
    return bnb.dequantize_4bit(codes, state)


def rounded_copy(folder: Path, names: set[str], double: bool) -> Any:
    """The plain model with parameters that bitsandbytes has quantised and dequantised, each matrix by itself."""
    model: Any = load_from_folder(folder, dtype=torch.float32, experts_implementation="grouped_mm").eval()
    for name, parameter in model.named_parameters():
        if name in names:
            matrices = [there_and_back(one, double) for one in parameter.data.reshape(-1, *parameter.shape[-2:])]
            parameter.data = torch.stack(matrices).reshape(parameter.shape)
    return model


def outcome(model: Any, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of a weighted sum of them."""
    inputs = states.clone().requires_grad_()
    logits = model(inputs_embeds=inputs, use_cache=False).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weights).sum().backward()
    assert inputs.grad is not None
    return logits.detach(), inputs.grad


# --- what is quantised ---


@pytest.mark.parametrize("kind", [*KINDS, "qwen3_5"])
def test_matrices_and_stacks_are_quantised_and_nothing_else(tiny_model: TinyModel, kind: str) -> None:
    model = quantised(tiny_model(kind))
    for name, parameter in model.named_parameters():
        is_plain = PLAIN_NAMES.search(name) or name.endswith(".bias") or parameter.ndim == 1
        assert (type(parameter) is torch.nn.Parameter) == bool(is_plain), name
    stacks = {name for name, parameter in model.named_parameters() if isinstance(parameter, QuantizedParameter)}
    assert stacks == set(expert_stacks(model))
    assert bool(stacks) == (kind != "qwen3_5")
    plain = load_plain(tiny_model(kind))
    assert quantised_matrices(plain) == quantised_matrices(model)
    assert module_roles(plain) == module_roles(model)


@pytest.mark.parametrize("double", [True, False])
def test_a_dense_base_is_quantised_as_transformers_does_it(random_qwen: Path, double: bool) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    expected = AutoModelForCausalLM.from_pretrained(random_qwen, dtype=torch.float32, quantization_config=config)
    found = dict(quantised(random_qwen, double_quantization=double).named_parameters())
    compared = 0
    for name, parameter in expected.named_parameters():
        assert type(found[name]) is type(parameter), name
        assert torch.equal(found[name].data, parameter.data), name
        if hasattr(parameter, "quant_state"):
            compared += 1
            assert torch.equal(found[name].quant_state.absmax, parameter.quant_state.absmax)
    assert compared == 14


def test_a_model_without_layers_to_quantise_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(LoratuneError, match="has no layer that bitsandbytes can quantise"):
        quantised(tiny_model("gpt2"))


def test_int8_takes_the_four_dimensions_of_latent_attention(tiny_model: TinyModel) -> None:
    layer = quantised(tiny_model("deepseek_v3"), "int8").model.layers[0].self_attn.kv_b_proj
    states = torch.randn(2, 1, 5, layer.in_features)
    rows = layer(states.view(10, -1))
    assert torch.equal(layer(states), rows.view(2, 1, 5, -1))
    expected = states.view(10, -1) @ held_weight(layer).T
    assert float((rows - expected).norm() / expected.norm()) < 0.02, "inputs are rounded to 1/127 of the largest"


def test_int8_leaves_stacks_as_they_are_and_gates_too(tiny_model: TinyModel) -> None:
    model = quantised(tiny_model("qwen3_next"), "int8")
    kinds = {name: type(parameter).__name__ for name, parameter in model.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == "Int8Params"} == quantised_matrices(model)
    assert all(kinds[name] == "Parameter" for name in expert_stacks(model))


# --- what it computes ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("double", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_quantised_mixture_computes_with_its_dequantised_matrices(
    tiny_model: TinyModel, kind: str, double: bool
) -> None:
    model = quantised(tiny_model(kind), double_quantization=double)
    reference = rounded_copy(tiny_model(kind), quantised_matrices(model) | set(expert_stacks(model)), double)
    states = model.get_input_embeddings()(IDS).detach()
    logits, gradient = outcome(model, states)
    expected_logits, expected_gradient = outcome(reference, states)
    # Sums of some dozen float32 products in another order, and what two layers make of that.
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5 * float(expected_logits.abs().max()))
    largest = float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-5 * largest)

    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    _, recomputed = outcome(model, states)
    torch.testing.assert_close(recomputed, gradient, rtol=0, atol=1e-5 * largest)


def test_no_dequantised_matrix_is_kept_for_the_backward_pass(tmp_path: Path) -> None:
    model = quantised(make_tiny_model("qwen3_moe", tmp_path / "model", moe_intermediate_size=24))
    shapes = {tuple(one.states[0].shape) for one in model.parameters() if isinstance(one, QuantizedParameter)}
    shapes |= {shape[::-1] for shape in shapes}
    saved: list[tuple[int, ...]] = []

    def seen(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    states = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        model(inputs_embeds=states, use_cache=False)
    assert len(saved) > 20
    assert shapes.isdisjoint(saved)


def test_another_function_than_a_product_gets_the_matrix() -> None:
    stack = torch.randn(3, 16, 64)
    parameter = quantize_stack(stack, double=True)
    module = torch.nn.Module()
    module.held = parameter
    module.forward = lambda inputs: (
        inputs @ module.held[1],
        torch.bmm(inputs.expand(3, 2, 16), module.held),
        torch.add(module.held[2], 1) @ module.held[0].T,
    )

    use_quantized_stacks(module, torch.float32)
    inputs = torch.randn(2, 16)
    one, all_of_them, added = module(inputs)
    exact = torch.stack([there_and_back(matrix, True) for matrix in stack])
    torch.testing.assert_close(one, inputs @ exact[1])
    torch.testing.assert_close(all_of_them, torch.bmm(inputs.expand(3, 2, 16), exact))
    torch.testing.assert_close(added, (exact[2] + 1) @ exact[0].T)


# --- memory ---


@pytest.mark.parametrize("double", [True, False])
def test_a_stack_takes_half_a_byte_per_value_and_its_scales(double: bool) -> None:
    parameter = quantize_stack(torch.randn(4, 128, 256), double)
    blocks = 128 * 256 // 64
    scales = blocks + 4 * blocks // 256 + 4 if double else 4 * blocks
    assert held_bytes(parameter) == 4 * (128 * 256 // 2 + scales)
    assert value_count(parameter) == 4 * 128 * 256


def test_the_memory_of_all_groups_is_that_of_all_weights(tiny_model: TinyModel) -> None:
    model = quantised(tiny_model("qwen3_moe"))
    groups = bytes_by_group(model)
    assert groups.keys() == {"embedding and head", "experts", "attention", NOT_QUANTISED}
    assert sum(groups.values()) == sum(held_bytes(parameter) for parameter in model.parameters())
    plain = load_plain(tiny_model("qwen3_moe"))
    stacks = expert_stacks(plain)
    full = sum(one.numel() * 4 for name, one in plain.named_parameters() if name in stacks)
    assert groups["experts"] < full / 6
    assert bytes_by_group(plain)["experts"] == full
    assert sum(map(value_count, model.parameters())) == sum(one.numel() for one in plain.parameters())


# --- planted faults ---


def test_a_quantised_gate_is_noticed(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_module, "kept_in_16_bits", lambda _: {"lm_head"})
    with pytest.raises(LoratuneError, match=r"in_proj_ba\.weight is quantised, and should not be"):
        quantised(tiny_model("qwen3_next"))


def test_a_stack_left_in_16_bits_is_noticed(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = quantizer.StacksQuantizer.param_needs_quantization
    monkeypatch.setattr(
        quantizer.StacksQuantizer, "param_needs_quantization",
        lambda self, model, name, **rest: "layers.1.mlp.experts.down" not in name and needs(self, model, name, **rest),
    )  # fmt: skip
    with pytest.raises(LoratuneError, match=r"layers\.1\.mlp\.experts\.down_proj is not quantised"):
        quantised(tiny_model("qwen3_moe"))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_mixed_up_matrices_are_noticed(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def mixed(values: torch.Tensor, double: bool) -> QuantizedParameter:
        return quantize_stack(values[[0, 2, 1, 3]], double)

    monkeypatch.setattr(quantizer, "quantize_stack", mixed)
    with pytest.raises(LoratuneError, match="2 of its matrices differ from the files, first 1"):
        quantised(tiny_model(kind))


# --- files, runs and merges ---


@pytest.mark.parametrize("kind", [*KINDS, "qwen3_5"])
def test_dequantised_files_hold_what_the_live_model_computes_with(tiny_model: TinyModel, kind: str) -> None:
    model, folder = quantised(tiny_model(kind)), tiny_model(kind)
    files = DequantizedFiles(weight_files(folder), settings_of(folder), detect_hardware())
    layout = file_layout(model, files.infos)
    for name, parameter in model.named_parameters():
        expected = parameter
        if isinstance(parameter, QuantizedParameter):
            expected = torch.stack([*map(bnb.dequantize_4bit, parameter.data, parameter.states)])
        elif hasattr(parameter, "quant_state"):
            expected = bnb.dequantize_4bit(parameter.data, parameter.quant_state)
        assert torch.equal(layout.read(name, files), expected), name


@pytest.fixture(scope="module")
def sft_flags(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(ROWS))
    return ["--model.quantization", "nf4", "--model.dtype", "float32", "--data.train", path, "--lora.target_modules",
            "attention", "--training.learning_rate", "1e-2", "--training.batch_size", "4",
            "--checkpoints.every_steps", "2"]  # fmt: skip


def test_a_run_on_a_quantised_mixture_resumes_merges_and_reports(
    cli: Cli, tiny_model: TinyModel, sft_flags: list[Any], tmp_path: Path
) -> None:
    flags = ["--model.base", tiny_model("qwen3_moe"), *sft_flags]
    done = cli("sft", *flags, "--training.max_steps", 4, "--output", tmp_path / "whole")
    assert done.exit_code == 0, done.stderr
    assert "not quantised" in done.stderr
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert report["base_groups"].keys() == {"embedding and head", "experts", "attention", NOT_QUANTISED}
    assert sum(report["base_groups"].values()) == report["adapter"]["base_bytes"]
    assert report["quantization"]["mean_kl"] > 0
    assert f"{report['quantization']['mean_kl']:.2g} nats from 16 bits" in done.stderr

    weights = tmp_path / "whole" / "adapter" / "adapter_model.safetensors"
    trained = weights.read_bytes()
    again = cli("sft", *flags, "--training.max_steps", 4, "--output", tmp_path / "whole", "--resume", 2)
    assert again.exit_code == 0, again.stderr
    assert "resuming after step 2" in again.stderr
    assert weights.read_bytes() == trained

    done = cli("merge", "--adapter", tmp_path / "whole", "--output", tmp_path / "merged")
    assert done.exit_code == 0, done.stderr
    verified = json.loads((tmp_path / "merged" / "verification.json").read_text())
    assert verified["merge_base"] == "dequantized"
    for kind, parity in verified["logits_with_rounding"].items():
        # float32 sums in another order; without the stacks' own errors they would be 1 apart.
        assert parity["largest_difference"] <= 1e-5 * parity["largest_logit"], kind
    assert verified["logits"]["original"]["mean_kl"] > 100 * verified["logits"]["dequantized"]["mean_kl"]


def test_an_adapter_on_expert_stacks_is_refused_before_loading(cli: Cli, sft_flags: list[Any]) -> None:
    refused = cli("sft", "--model.base", "/nowhere", *sft_flags, "--lora.target_modules", "experts")
    assert refused.exit_code == Exit.USAGE
    assert "lora.target_modules experts adds to whole stacks" in refused.stderr


@pytest.mark.slow
def test_a_4_bit_folder_of_a_mixture_loads_in_transformers(cli: Cli, tiny_model: TinyModel, tmp_path: Path) -> None:
    done = cli("export", "--model", tiny_model("qwen2_moe"), "--format", "bnb4", "--output", tmp_path / "nf4")
    assert done.exit_code == 0, done.stderr
    assert "no file format in 4 bits" in done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    kinds = {name: type(parameter).__name__ for name, parameter in model.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == "Params4bit"} == quantised_matrices(model)


# --- the effect of quantisation ---


class Rows:
    """Stands in for a split, and for its dataset."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = [{"input_ids": row} for row in rows]
        self.lengths = torch.tensor([len(row) for row in rows]).numpy()

    def select(self, chosen: list[int]) -> list[dict[str, list[int]]]:
        return [self.rows[number] for number in chosen]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Rows:
    monkeypatch.setattr(quantization_effect, "as_dataset", lambda split: split)
    return Rows([list(range(9, 39)), [1, 2], list(range(300, 350))])


@pytest.mark.parametrize(("kind", "quantization"), [("qwen3_moe", "nf4"), ("gpt_oss", "nf4"), ("qwen3_next", "int8")])
def test_the_effect_is_that_of_the_weights_alone(
    tiny_model: TinyModel, rows: Rows, kind: str, quantization: str
) -> None:
    model = quantised(tiny_model(kind), quantization)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    effect = measure_effect(model, tiny_model(kind), rows, 60)  # type: ignore[arg-type]
    ids = torch.tensor([list(range(300, 330)), list(range(9, 39))])
    with torch.inference_mode():
        expected = load_plain(tiny_model(kind))(input_ids=ids).logits.double().log_softmax(-1)
        found = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    kl = functional.kl_div(found, expected, reduction="none", log_target=True).sum(-1).mean()
    assert effect.tokens == 60
    assert effect.mean_kl == pytest.approx(float(kl), rel=1e-3)
    assert effect.top1_agreement == pytest.approx(float((expected.argmax(-1) == found.argmax(-1)).float().mean()))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_with_the_weights_of_the_files_it_is_the_plain_model(tiny_model: TinyModel) -> None:
    folder = tiny_model("qwen3_moe")
    model, read = quantised(folder), list[int]()
    with torch.inference_mode():
        expected, rounded = load_plain(folder)(input_ids=IDS).logits, model(input_ids=IDS).logits
        with unquantised(model, folder, lambda size, total: read.append(size)):
            found = model(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, rounded)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert len(read) == 2 * (4 + 2 * 4)


def test_a_comparison_that_would_take_long_is_left_out(
    tiny_model: TinyModel, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization_effect, "TRIED_SECONDS", 0.0)
    model, folder = quantised(tiny_model("qwen3_moe")), tiny_model("qwen3_moe")
    with pytest.raises(quantization_effect.TooSlowError, match="it would take about"):
        measure_effect(model, folder, rows, 0)  # type: ignore[arg-type]
    data: Any = SimpleNamespace(validation=None, train=rows)
    monkeypatch.setattr(quantization_effect, "SECONDS", 0.0)
    weights = quantization_effect.weights_of(model, settings_of(folder), folder, data)
    assert weights.effect is None
    assert "nf4 is from 16 bits was not measured: it would take about" in weights.notes[0]


def test_whatever_fails_in_the_comparison_ends_no_run(
    cli: Cli, random_qwen: Path, sft_flags: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(quantization_effect, "measure_effect", fail)
    done = cli("sft", "--model.base", random_qwen, *sft_flags, "--training.max_steps", 1, "--output", tmp_path / "run")
    assert done.exit_code == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["quantization"] is None
    assert any("was not measured: no room" in warning for warning in report["warnings"])


def test_recurrent_layers_and_large_effects_are_advised_on(tiny_model: TinyModel, rows: Rows) -> None:
    from loratune.runs.report import QuantizationEffect
    from loratune.training.quantization_effect import advice_on

    small, large = QuantizationEffect(60, 0.01, 0.9), QuantizationEffect(60, 0.3, 0.5)
    recurrent, other = load_plain(tiny_model("qwen3_5")), load_plain(tiny_model("qwen3_moe"))
    assert "0.01 nats" in advice_on(recurrent, "nf4", small)[0]
    assert "recurrent layers" in advice_on(recurrent, "nf4", small)[0]
    assert advice_on(recurrent, "int8", small) == advice_on(other, "nf4", small) == []
    assert "50% of its likeliest tokens" in advice_on(other, "nf4", large)[0]
    folder = tiny_model("qwen3_moe")
    notes = quantization_effect.weights_of(
        quantised(folder, "int8"), settings_of(folder, "int8"), folder,
        SimpleNamespace(validation=None, train=rows),  # type: ignore[arg-type]
    ).notes  # fmt: skip
    assert "leaves 49.2 kB of the base as they are: the 4 stacks" in notes[0]


def test_matrices_of_sizes_that_bitsandbytes_cannot_repack_are_left_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "bitsandbytes.nn.modules.has_avx512bf16", lambda: True
    )  # as on a CPU for which it would repack them
    folder = make_tiny_model("qwen3", tmp_path / "base", hidden_size=64, intermediate_size=72)
    model: Any = load_base(settings_of(folder), folder, detect_hardware()).eval()
    mlp, attention = model.model.layers[0].mlp, model.model.layers[0].self_attn
    repacked = [part.support_avx512bf16_for_cpu for part in (mlp.up_proj, mlp.down_proj, attention.q_proj)]
    assert repacked == [False, False, True]  # 72 rows, 72 columns, neither


# --- what it asks of a GPU ---


class Reads(TorchDispatchMode):
    """Counts the times that values of tensors are read, for which a GPU has to be waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count, plain = 0, torch.Tensor.tolist

        def read(tensor: torch.Tensor) -> Any:
            self.count += 1
            return plain(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", read)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero")
        return func(*args, **(kwargs or {}))


def reads_of_layers(monkeypatch: pytest.MonkeyPatch, folder: Path, kind: str, **settings: Any) -> list[int]:
    """The reads of the modules with experts, in a pass of 40 tokens and back."""
    model = quantised(make_tiny_model(kind, folder, **settings))
    modules = [one for one in model.modules() if getattr(one, "stacks", None)]
    found = []
    for module in modules:
        states = torch.randn(40, 32, requires_grad=True)
        chosen = torch.stack([torch.randperm(settings["num_experts"])[:2] for _ in range(40)])
        with monkeypatch.context() as patch, Reads(patch) as reads:
            module(states, chosen, torch.rand(40, 2)).sum().backward()
        found.append(reads.count)
    return found


def test_experts_are_asked_for_once_however_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = reads_of_layers(monkeypatch, tmp_path / "few", "qwen3_moe", num_experts=4)
    many = reads_of_layers(monkeypatch, tmp_path / "many", "qwen3_moe", num_experts=16)
    assert few == many == [1, 1]
    monkeypatch.setattr(quantized_stack, "declares_layout", lambda module: False)  # transformers' own pass
    assert min(reads_of_layers(monkeypatch, tmp_path / "own", "qwen3_moe", num_experts=16)) > 16
