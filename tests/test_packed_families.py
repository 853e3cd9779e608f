"""Packed and padded passes of every family against transformers' and PEFT's own, and the checks before training."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import TinyModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, make_tiny_model
from torch import nn
from torch.nn import functional
from typer.testing import Result

from loratune.data.assembly.batches import collate_padded
from loratune.data.assembly.steps import PassLayout
from loratune.errors import LoratuneError
from loratune.model.adapter.attach import save_adapter
from loratune.model.adapter.plain_copy import perturbed, with_same_weights
from loratune.model.architecture.recurrent import recurrent_modules
from loratune.model.architecture.roles import Role, linear_modules
from loratune.model.architecture.structure import decoder_of, output_layer
from loratune.model.base import dtype_name, load_base
from loratune.model.hardware import detect_hardware
from loratune.model.kernels import linear_cross_entropy, packed_rows
from loratune.model.kernels.attention_choice import AttentionChoice, choose_attention
from loratune.model.kernels.lora_linear import use_fused_lora
from loratune.model.kernels.norm_mlp import use_fused_elementwise
from loratune.model.kernels.packed_attention import _attend_by_products
from loratune.model.kernels.packed_rows import PackedRows, _alike
from loratune.recipe.loading import load_recipe
from loratune.recipe.sections import ModelSettings
from loratune.training import session
from loratune.training.activations import measure_passes
from loratune.training.probes import saved_adapter
from loratune.training.probes.checked_model import CheckedModel, check_model
from loratune.training.probes.gradients import check_gradients
from loratune.training.probes.isolation import choose_packing, why_not_apart
from loratune.training.probes.padding import why_padding_matters
from loratune.training.probes.passes import packed, padded, random_documents
from loratune.training.probes.saved_adapter import check_saved_adapter

LENGTHS = (5, 23, 70, 40, 3)
QUICK = ("qwen3_5", "gpt_oss", "lfm2")
FAMILIES = [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in CONFIGS]


USUAL = ["documents", "order", "logits", "gradients", "saved adapter"]
"""Names of the checks of a packed run."""


class Trained(NamedTuple):
    """A model as `sft` makes it, and the same one as transformers and PEFT make it."""

    model: Any
    plain: Any
    """The base alone; see `with_same_weights`."""
    own_attention: str
    reference: Any
    """With the same adapter."""

    def checked(self, **flags: Any) -> CheckedModel:
        recipe = load_recipe(None, {"model.base": "x", "data.train": ["y"]} | flags)
        hardware, is_packed = detect_hardware(), recipe.training.packing
        attention = choose_attention(self.model.get_base_model(), hardware, "auto", is_packed)
        return check_model(self.model, self.plain, attention, self.own_attention, recipe)


def trained(
    base: Path, dtype: torch.dtype = torch.float32, targets: list[str] | None = None, quantization: str = "none"
) -> Trained:
    """Put LoRA on attention and recurrent layers, and none on experts, which PEFT treats in a way of its own."""
    given = {"dtype": dtype_name(dtype), "attn_implementation": "sdpa", "quantization": quantization}
    model = load_base(ModelSettings(base=str(base), **given), base, detect_hardware())
    names = targets or [*linear_modules(model, Role.ATTENTION), *recurrent_linears(model)]
    plain, other = with_same_weights(model), with_same_weights(model)
    own_attention = str(model.config._attn_implementation)
    lora = {
        "r": 4,
        "target_modules": names,
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": any("c_attn" in name for name in names),
    }
    adapted, reference = (get_peft_model(one, LoraConfig(**lora)) for one in (model, other))
    reference.load_state_dict(adapted.state_dict())
    use_fused_lora(adapted)
    use_fused_elementwise(model)
    return Trained(adapted, plain, own_attention, reference)


def recurrent_linears(model: Any) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    within = (inner for module in recurrent_modules(decoder_of(model)) for inner in module.modules())
    return [names[module] for module in within if isinstance(module, nn.Linear)]


class Step(NamedTuple):
    """Summed loss of rows, and the gradients of all adapter weights."""

    loss: float
    gradients: torch.Tensor


def step(model: Any, losses: Iterator[torch.Tensor]) -> Step:
    total = 0.0
    for loss in losses:
        loss.backward()
        total += float(loss.detach())
    gradients = [parameter.grad.flatten().double() for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad(set_to_none=True)
    return Step(total, torch.cat(gradients))


def step_by_rows(model: Any, documents: list[list[int]]) -> Step:
    """Each row alone through transformers and PEFT."""
    tensors = [torch.tensor(ids) for ids in documents]
    logits = ((ids, model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()) for ids in tensors)
    return step(model, (functional.cross_entropy(made, ids[1:], reduction="sum") for ids, made in logits))


def step_of(model: Any, batch: dict[str, Any]) -> Step:
    return step(model, iter([model(**batch, summed_loss=True).loss_sum]))


def assert_same(got: Step, expected: Step) -> None:
    assert got.loss == pytest.approx(expected.loss, rel=1e-5)
    assert (got.gradients - expected.gradients).norm() <= 1e-5 * expected.gradients.norm()


@pytest.mark.parametrize("kind", FAMILIES)
def test_losses_and_gradients_are_those_of_rows_one_by_one(tiny_model: TinyModel, kind: str) -> None:
    it = trained(tiny_model(kind))
    checked = it.checked()
    assert checked.is_packed
    assert checked.warnings == ()
    assert [check.name for check in checked.checks] == USUAL
    documents = random_documents(it.model, LENGTHS, seed=3)
    with perturbed(it.model), perturbed(it.reference):
        for one in (it.model, it.reference):
            one.eval()  # some families have dropout of their own
        expected = step_by_rows(it.reference, documents)
        assert_same(step_of(it.model, packed(it.model, documents)), expected)
        assert_same(step_of(it.model, padded(it.model, documents)), expected)
    assert measure_passes(it.model, True, 70, 200, detect_hardware()).kept > 0


@pytest.mark.parametrize("kind", ["granitemoehybrid", pytest.param("qwen3_5", marks=pytest.mark.slow)])
def test_recomputed_layers_have_the_documents_of_their_pass(tiny_model: TinyModel, kind: str) -> None:
    """Also where the logits come from the model's own forward, which is recomputed before the layers."""
    it = trained(tiny_model(kind))
    assert it.checked().is_packed
    documents = random_documents(it.model, LENGTHS, seed=3)
    with perturbed(it.model), perturbed(it.reference):
        it.model.train()
        it.model.activation_checkpointing_enable()
        it.model.enable_input_require_grads()
        assert_same(step_of(it.model, packed(it.model, documents)), step_by_rows(it.reference, documents))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [(torch.bfloat16, "none"), (torch.float32, "int8"), (torch.bfloat16, "int8")],
    ids=lambda value: dtype_name(value) if isinstance(value, torch.dtype) else value,
)
@pytest.mark.parametrize("kind", [*CONFIGS])
def test_checks_do_not_cry_wolf(tiny_model: TinyModel, kind: str, dtype: torch.dtype, quantization: str) -> None:
    if (kind, quantization) == ("gpt2", "int8"):
        pytest.skip("its layers are no nn.Linear")
    it = trained(tiny_model(kind), dtype, quantization=quantization)
    assert it.checked().is_packed
    it = trained(tiny_model(kind), dtype, quantization=quantization)
    checked = it.checked(**{"training.packing": False})
    assert (checked.is_packed, checked.is_single, checked.warnings) == (False, False, ())


def test_a_model_is_as_it_was_after_its_checks(tiny_model: TinyModel) -> None:
    it = trained(tiny_model("lfm2"))
    before = {name: values.clone() for name, values in it.model.state_dict().items()}
    it.model.train()
    decoder_of(it.model).eval()
    modes = [module.training for module in it.model.modules()]
    random = torch.get_rng_state()
    it.checked()
    assert [module.training for module in it.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], values) for name, values in it.model.state_dict().items())
    assert all(parameter.grad is None for parameter in it.model.parameters())
    assert {name for name, parameter in it.model.named_parameters() if parameter.requires_grad} == {
        name for name in before if "lora_" in name
    }


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        ("qwen3_5", "sdpa: one call per document, without a GPU"),
        ("gpt_oss", "eager with a mask: since packing fails here: attention to single documents knows no s_aux"),
    ],
)
def test_the_first_attention_that_keeps_documents_apart_is_taken(
    tiny_model: TinyModel, kind: str, attention: str
) -> None:
    it = trained(tiny_model(kind))
    checked = it.checked()
    assert str(checked.attention) == attention
    assert checked.is_masked == (kind == "gpt_oss")


def test_rows_are_padded_where_nothing_keeps_documents_apart(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_rows, "create_masks_for_generate", lambda *_, **__: None)
    it = trained(tiny_model("gpt_oss"))
    checked = it.checked()
    assert not checked.is_packed
    (warning,) = checked.warnings
    assert warning.startswith("training.packing: rows are padded, since documents of a packed row see each other")
    assert [check.name for check in checked.checks] == [
        "documents",
        "padding",
        "order",
        "logits",
        "gradients",
        "saved adapter",
    ]
    documents = random_documents(it.model, LENGTHS, seed=3)
    with perturbed(it.model), perturbed(it.reference):
        it.model.eval()
        assert_same(step_of(it.model, padded(it.model, documents)), step_by_rows(it.reference, documents))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("packing", [True, False])
def test_what_llm_int8_shares_between_tokens_is_no_leak(
    tiny_model: TinyModel, dtype: torch.dtype, packing: bool
) -> None:
    """It keeps a column of the inputs in 16 bits for all tokens of a pass where one of them has a large value there."""
    it = trained(tiny_model("qwen3_5"), dtype, quantization="int8")
    own, *others = (random_documents(it.model, (8,), seed=seed)[0] for seed in range(3))

    def is_changed() -> bool:
        states = [decoder_of(it.model.eval())(torch.tensor([own + other]))[0][:, : len(own)] for other in others]
        return not torch.equal(*states)

    assert is_changed()
    checked = it.checked(**{"training.packing": packing})
    assert (checked.is_packed, checked.is_single, checked.warnings) == (packing, False, ())
    (order,) = (check.result for check in checked.checks if check.name == "order")
    assert order == "no token sees a later one, but for how LLM.int8 rounds"
    assert is_changed()


@contextmanager
def no_boundaries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The recurrent layers are not told of documents."""
    with monkeypatch.context() as patch:
        patch.setattr(packed_rows, "_documents_of", lambda inputs: None)
        patch.setattr(packed_rows, "recurrent_modules", without_borders)
        yield


def without_borders(decoder: Any) -> Iterator[Any]:
    for module in recurrent_modules(decoder):
        own = module.forward
        module.forward = lambda *given, own=own, **inputs: own(
            *given, **{name: value for name, value in inputs.items() if name not in packed_rows.BORDERS}
        )
        yield module


@contextmanager
def whole_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A recurrent layer computes the row as one document."""
    with monkeypatch.context() as patch:
        patch.setattr(packed_rows, "_by_document", lambda forward, row, documents: forward(row))
        yield


@contextmanager
def only_the_convolution_leaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where a kernel for the recurrence gets the boundaries, and that of the convolution does not."""
    plain = packed_rows._by_document

    def leak(forward: Any, row: torch.Tensor, documents: Any) -> torch.Tensor:
        return plain(forward, row + 0.5 * functional.pad(row, (0, 0, 1, 0))[:, :-1], documents)

    with monkeypatch.context() as patch:
        patch.setattr(packed_rows, "_by_document", leak)
        yield


@contextmanager
def padding_on_the_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The state of a recurrent layer goes through padding before it comes to a document."""

    def compute(forward: Any, row: torch.Tensor, documents: Any) -> torch.Tensor:
        lengths = documents.lengths
        rows = torch.stack([functional.pad(one, (0, 0, max(lengths) - len(one), 0)) for one in row[0].split(lengths)])
        return torch.cat([states[-length:] for states, length in zip(forward(rows), lengths, strict=True)])[None]

    with monkeypatch.context() as patch:
        patch.setattr(packed_rows, "_by_document", compute)
        yield


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize(
    ("kind", "fault", "told"),
    [
        ("lfm2", nullcontext, ""),
        ("lfm2", no_boundaries, "see each other"),
        ("qwen3_5", whole_rows, "see each other"),
        ("qwen3_5", only_the_convolution_leaks, "see each other"),
        ("granitemoehybrid", padding_on_the_left, "has other states than alone"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_recurrent_layers_that_mix_documents_are_noticed(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, kind: str, fault: Any, told: str, quantization: str
) -> None:
    it = trained(tiny_model(kind), quantization=quantization)
    base = it.model.get_base_model()
    choose_attention(base, detect_hardware(), "auto", is_packed=True)
    with fault(monkeypatch):
        PackedRows(base)
        assert told in why_not_apart(it.model)
        assert bool(told) == bool(why_not_apart(it.model))
        packing = choose_packing(it.model, AttentionChoice("sdpa", ""), it.own_attention)
    assert packing.is_packed == (not told)


def test_a_check_that_sees_nothing_without_boundaries_proves_nothing(tiny_model: TinyModel) -> None:
    it = trained(tiny_model("qwen2"))
    for module in decoder_of(it.model).modules():
        if type(module).__name__.endswith("Attention"):
            module.forward = lambda hidden_states, **_: (hidden_states, None)
    assert "do not see each other even without boundaries" in why_not_apart(it.model)


def test_boundaries_that_do_not_fill_the_row_are_refused(tiny_model: TinyModel) -> None:
    it = trained(tiny_model("lfm2"))
    PackedRows(it.model.get_base_model())
    batch = packed(it.model, random_documents(it.model, (3, 4), seed=0)) | {"document_lengths": [3, 3]}
    del batch["labels"]
    with pytest.raises(ValueError, match=r"documents of 6 tokens in rows of \(1, 7\)"):
        decoder_of(it.model)(**batch)


def test_packed_rows_are_undone_and_leave_other_passes_alone(tiny_model: TinyModel) -> None:
    it = trained(tiny_model("lfm2"))
    base = it.model.get_base_model()
    ids = torch.tensor(random_documents(it.model, (9,), seed=0))
    before = base(input_ids=ids).logits
    rows = PackedRows(base)
    assert torch.equal(base(input_ids=ids).logits, before)
    assert len(rows.recurrent) == 1
    rows.remove()
    assert "forward" not in vars(decoder_of(base))
    assert "forward" not in vars(rows.recurrent[0])


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_documents_share_a_batch_with_others_of_similar_length(lengths: list[int]) -> None:
    groups = _alike(lengths)
    assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
    for group in groups:
        own = [lengths[number] for number in group]
        assert max(own) == own[0] <= 2 * min(own)


def test_products_take_values_of_another_size_than_keys() -> None:
    """As in multi-head latent attention."""
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, 150, size, generator=random) for size in (12, 12, 8))
    expected = functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(_attend_by_products(query, key, value, None), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("packing", [True, False])
def test_a_model_that_encodes_texts_is_refused(tmp_path: Path, packing: bool, quantization: str) -> None:
    base = make_tiny_model("gemma3_text", tmp_path / "base", use_bidirectional_attention=True)
    it = trained(base, quantization=quantization)
    with pytest.raises(LoratuneError, match="Gemma3ForCausalLM: a token sees those after it"):
        it.checked(**{"training.packing": packing})


def test_a_scale_of_the_logits_that_is_left_out_shows(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    it = trained(tiny_model("cohere2"))
    with monkeypatch.context() as patch:
        patch.setattr(linear_cross_entropy, "head_of", output_layer)
        it.checked()
    documents = random_documents(it.model, LENGTHS, seed=3)
    it.model.eval()
    got = step_of(it.model, packed(it.model, documents))
    assert abs(got.loss / step_by_rows(it.reference, documents).loss - 1) > 0.01


def test_a_trainable_weight_of_the_base_is_refused(tiny_model: TinyModel) -> None:
    it = trained(tiny_model("qwen2"))
    decoder_of(it.model).norm.weight.requires_grad_()
    with pytest.raises(LoratuneError, match=r"model\.norm\.weight would be trained, but was not asked for"):
        it.checked()


def test_an_adapter_weight_that_no_gradient_reaches_is_refused(tiny_model: TinyModel) -> None:
    it = trained(tiny_model("qwen2"))
    first = decoder_of(it.model).layers[0].mlp
    first.unused = it.model.base_model.model.model.layers[1].self_attn.q_proj
    decoder_of(it.model).layers[1].self_attn.q_proj = first.unused.base_layer
    with pytest.raises(LoratuneError, match=r"unused\.lora_A\.default\.weight gets no gradient") as told:
        it.checked()
    assert "2 weights" in str(told.value)


def test_no_gradient_is_left_when_weights_are_refused(tiny_model: TinyModel) -> None:
    it = trained(tiny_model("qwen2"))
    it.checked()
    decoder_of(it.model).norm.weight.requires_grad_()
    recipe = load_recipe(None, {"model.base": "x", "data.train": ["y"]})
    with pytest.raises(LoratuneError):
        check_gradients(it.model, recipe, packed(it.model, random_documents(it.model, (5,), seed=0)))
    assert all(parameter.grad is None for parameter in it.model.parameters())


def under_another_prefix(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name.replace(".model.layers", ".layers"): values for name, values in load_file(path).items()}, path)


def one_module_left_out(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: values for name, values in load_file(path).items() if "layers.1.self_attn.v" not in name}, path)


def in_less_precision(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: values.bfloat16() for name, values in load_file(path).items()}, path)


def with_another_scale(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 9}))


@pytest.mark.parametrize(
    "fault", [None, under_another_prefix, one_module_left_out, in_less_precision, with_another_scale]
)
def test_an_adapter_that_its_files_do_not_give_back_is_refused(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Path], None] | None
) -> None:
    def save(model: Any, target: Path) -> None:
        save_adapter(model, target)
        if fault:
            fault(target)

    monkeypatch.setattr(saved_adapter, "save_adapter", save)
    it = trained(tiny_model("qwen2"))
    context = pytest.raises(LoratuneError, match="lost or changed") if fault else nullcontext()
    with context:
        check_saved_adapter(it.model, it.plain)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_states_that_peft_does_not_give_are_refused(tiny_model: TinyModel, quantization: str) -> None:
    it = trained(tiny_model("qwen2"), quantization=quantization)
    layer = it.model.base_model.model.model.layers[0].self_attn.q_proj
    layer.forward = lambda x, own=layer.forward: 1.5 * own(x)
    with pytest.raises(LoratuneError, match=r"the states differ by \d+\.\d% of the adapter's effect"):
        check_saved_adapter(it.model, it.plain)


def test_rows_are_passes_of_their_own_where_padding_matters(tiny_model: TinyModel) -> None:
    it = trained(tiny_model("qwen2"))
    assert why_padding_matters(it.model) == ""
    for one in (it.model, it.plain):
        embedding = one.get_input_embeddings()
        embedding.register_forward_hook(lambda _, __, output: output * (1 + output.shape[1]))
    assert why_padding_matters(it.model)
    checked = it.checked(**{"training.packing": False})
    assert (checked.is_packed, checked.is_single) == (False, True)
    assert "each row is a pass of its own" in checked.warnings[0]


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_padding_that_is_seen_is_noticed(tiny_model: TinyModel, quantization: str) -> None:
    it = trained(tiny_model("qwen2"), quantization=quantization)
    embedding = it.model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, __, output: output + output.mean(1, keepdim=True))
    assert why_padding_matters(it.model) == "the padding's tokens change the states of a padded row"


def test_states_that_depend_on_the_length_of_the_padding_are_noticed(tiny_model: TinyModel) -> None:
    it = trained(tiny_model("qwen2"))
    embedding = decoder_of(it.model).get_input_embeddings()
    embedding.register_forward_hook(lambda _, __, output: output * output.shape[1])
    norm = decoder_of(it.model).norm
    norm.register_forward_hook(lambda _, __, output: output * output.shape[1])
    assert why_padding_matters(it.model) == "a padded row has other states than the row alone"


def test_a_pass_of_a_single_row_has_no_padding() -> None:
    layout = PassLayout(10**6, 10**6, is_packed=False, is_single=True)
    assert layout.passes(torch.tensor([3, 99, 50]).numpy()) == [[1], [2], [0]]
    row = {"input_ids": [1] * 99, "labels": [1] * 99, "sequence": 0}
    assert collate_padded([row], 0, is_rounded=False)["input_ids"].shape == (1, 99)
    assert collate_padded([row], 0)["input_ids"].shape == (1, 100)


def test_what_was_checked_is_told_and_recorded(
    cli: Callable[..., Result], tiny_model: TinyModel, tmp_path: Path
) -> None:
    rows = [{"instruction": f"How much is {n}+{n}?", "output": f"It is {2 * n}."} for n in range(6)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = [
        "sft", "--model.base", tiny_model("qwen3_5"), "--model.dtype", "float32",
        "--data.train", tmp_path / "rows.json",
        "--data.validation", "0", "--lora.target_modules", "attention", "--training.batch_size", "3",
        "--output", tmp_path / "run",
    ]  # fmt: skip
    result = cli(*flags, "--training.max_steps", "1")
    assert result.exit_code == 0, result.stderr
    assert (
        "documents of a packed row do not see each other, 1 recurrent layer computing each by itself" in result.stderr
    )
    report, manifest = (json.loads((tmp_path / "run" / name).read_text()) for name in ("report.json", "manifest.json"))
    assert report["checks"] == manifest["checks"]
    assert [check["name"] for check in report["checks"]] == [
        "documents",
        "order",
        "logits",
        "gradients",
        "saved adapter",
    ]
    assert all(check["seconds"] >= 0 for check in report["checks"])


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["--training.packing", "--no-training.packing"])
@pytest.mark.parametrize("kind", sorted(CONFIGS.keys() - {"gpt2", "gemma3"}))
def test_every_family_trains_and_resumes_to_the_same_bits(
    cli: Callable[..., Result], tiny_model: TinyModel, tmp_path: Path, kind: str, packing: str
) -> None:
    rows = [{"instruction": f"How much is {n}+{n}?" * (1 + n % 3), "output": f"It is {2 * n}."} for n in range(9)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    def sft(name: str, *flags: str) -> Path:
        result = cli(
            "sft", "--model.base", tiny_model(kind), "--model.dtype", "float32", "--data.train", tmp_path / "rows.json",
            "--lora.target_modules", "attention", "--training.batch_size", "3", "--checkpoints.every_steps", "1",
            "--evaluation.questions_share", "0", packing, "--output", tmp_path / name, *flags,
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        return tmp_path / name / "adapter" / "adapter_model.safetensors"

    whole = sft("whole", "--training.max_steps", "3")
    sft("run", "--training.max_steps", "1")
    assert sft("run", "--training.max_steps", "3", "--resume").read_bytes() == whole.read_bytes()


def test_an_adapter_that_cannot_be_saved_for_its_check_is_told(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(saved_adapter, "save_adapter", fail)
    checked = trained(tiny_model("qwen2")).checked()
    (warning,) = checked.warnings
    assert warning == checked.checks[-1].result
    assert warning.startswith("it is not checked whether PEFT gives the same states from the saved adapter: ")
    assert "No space left on device" in warning


def test_processes_whose_checks_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "from_all", lambda own: [own, (False, False, False)])
    packed_rows_only, padded_rows = (
        CheckedModel(AttentionChoice("sdpa", ""), is_packed, False, False, (), ()) for is_packed in (True, False)
    )
    with pytest.raises(LoratuneError, match="use devices of one kind"):
        session._require_one_layout(packed_rows_only)
    session._require_one_layout(padded_rows)


def test_states_that_are_not_finite_prove_nothing(tiny_model: TinyModel) -> None:
    it = trained(tiny_model("qwen2"))
    decoder_of(it.model).norm.register_forward_hook(lambda _, __, output: output * torch.nan)
    assert why_not_apart(it.model) == "the model's states are not finite"
