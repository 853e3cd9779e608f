"""Adapters of other programs, beside the updates that they stand for, added to the base's weights by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from loratune.delivery.merge.update import read_updates
from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.attach import check_adapter, load_adapter
from loratune.model.adapter.foreign_names import renamed_prefix
from loratune.model.adapter.joined_pairs import Pair, exchanged, joined, stacked
from loratune.model.adapter.other_layouts import in_peft_layout
from loratune.model.adapter.reloaded import own_logits
from loratune.model.architecture.file_layout import parameter_infos
from loratune.model.from_folder import load_plain

IDS = torch.arange(40).reshape(2, 20) * 7
RANK, ALPHA = 3, 6
PREFIX = "base_model.model."
Tensors = dict[str, torch.Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")


def shapes_of(base: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(values.shape) for name, values in load_plain(base).named_parameters()}


def write(folder: Path, tensors: Tensors, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: values.contiguous() for name, values in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def drawn(rows: int, columns: int) -> Pair:
    return Pair(torch.randn(RANK, columns) * 0.3, torch.randn(rows, RANK) * 0.3)


def update_of(pair: Pair) -> torch.Tensor:
    return ALPHA / RANK * pair.up @ pair.down


def by_peft(base: Path, adapter: Path) -> torch.Tensor:
    """Logits of a translated adapter, as PEFT loads it: it has to use every tensor."""
    model = PeftModel.from_pretrained(load_plain(base), str(in_peft_layout(adapter, shapes_of(base))))
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def by_hand(base: Path, updates: Tensors) -> torch.Tensor:
    model: Any = load_plain(base)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, update in updates.items():
            parameters[name] += update
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def test_matrices_joined_from_parts_have_the_same_product() -> None:
    parts = [drawn(4, 5), None, drawn(3, 5)]
    whole = joined(parts, [4, 2, 3])
    wanted = torch.cat([parts[0].up @ parts[0].down, torch.zeros(2, 5), parts[2].up @ parts[2].down])  # type: ignore[union-attr]
    torch.testing.assert_close(whole.up @ whole.down, wanted)


def test_a_stack_is_laid_out_as_peft_reads_it_and_exchanging_its_sides_twice_changes_nothing() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.matrices = nn.Parameter(torch.zeros(4, 6, 5))

    pairs = {number: drawn(6, 5) for number in (0, 1, 3)}
    pair = stacked(pairs, 4)
    model = get_peft_model(Stack(), LoraConfig(r=RANK, lora_alpha=RANK, target_parameters=["inner.matrices"]))  # type: ignore[arg-type]
    layer: Any = model.base_model.model.inner
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = pair
    wanted = torch.stack([pairs[n].up @ pairs[n].down if n in pairs else torch.zeros(6, 5) for n in range(4)])
    torch.testing.assert_close(layer.get_delta_weight("default"), wanted)
    assert all(torch.equal(one, other) for one, other in zip(exchanged(exchanged(pair, 4), 4), pair, strict=True))


FORMS: dict[str, Callable[[str], str]] = {
    "no prefix": lambda name: name.removeprefix(PREFIX),
    "an adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "no ending": lambda name: name.removesuffix(".weight"),
    "neither": lambda name: name.removeprefix(PREFIX).removesuffix(".weight"),
    "the other class": lambda name: name.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model."),
    "the decoder alone": lambda name: name.replace(f"{PREFIX}model.", ""),
}


@pytest.mark.parametrize("form", FORMS)
def test_names_of_other_programs_are_matched_with_the_base_s(tiny_model: TinyModel, tmp_path: Path, form: str) -> None:
    base, torch_names = tiny_model("qwen3_5"), shapes_of(tiny_model("qwen3_5"))
    modules = [name.removesuffix(".weight") for name in torch_names if "self_attn" in name and "proj" in name]
    tensors, updates = {}, {}
    for module in modules:
        pair = drawn(*torch_names[f"{module}.weight"])
        updates[f"{module}.weight"] = update_of(pair)
        tensors |= {f"{PREFIX}{module}.lora_A.weight": pair.down, f"{PREFIX}{module}.lora_B.weight": pair.up}
    own = write(tmp_path / "own", tensors, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert in_peft_layout(own, torch_names) == own
    foreign = {FORMS[form](name): values for name, values in tensors.items()}
    adapter = write(tmp_path / "adapter", foreign, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    torch.testing.assert_close(by_peft(base, adapter), by_hand(base, updates), atol=1e-4, rtol=1e-4)
    assert own_logits(base, adapter).difference(own_logits(base, own)) == 0
    first, second = (read_updates(folder, parameter_infos(base), True) for folder in (own, adapter))
    assert first.keys() == second.keys()
    assert all(update.equals(second[name]) for name, update in first.items())


def test_a_language_model_within_a_larger_one_is_told_from_its_vision_tower(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Gemma 3 has projections of the same names in both."""
    base = tiny_model("gemma3")
    module = "model.language_model.layers.0.self_attn.q_proj"
    pair = drawn(*shapes_of(base)[f"{module}.weight"])
    named = f"{PREFIX}model.layers.0.self_attn.q_proj"
    adapter = write(tmp_path / "adapter", {f"{named}.lora_A.weight": pair.down, f"{named}.lora_B.weight": pair.up})
    wanted = by_hand(base, {f"{module}.weight": update_of(pair)})
    torch.testing.assert_close(by_peft(base, adapter), wanted, atol=1e-4, rtol=1e-4)


def stack_updates(base: Path, pairs: dict[tuple[int, str], Pair], layer: int = 1) -> Tensors:
    stack, shapes = f"model.layers.{layer}.mlp.experts", shapes_of(base)
    both, down = (torch.zeros(shapes[f"{stack}.{name}"]) for name in ("gate_up_proj", "down_proj"))
    half = both.shape[1] // 2
    for (number, matrix), pair in pairs.items():
        rows = {"gate": both[number, :half], "up": both[number, half:], "down": down[number]}[matrix]
        rows += update_of(pair)
    return {f"{stack}.gate_up_proj": both, f"{stack}.down_proj": down}


KINDS = ["qwen3_moe", "qwen3_5_moe", pytest.param("mixtral", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_matrix_of_a_stack_by_itself(tiny_model: TinyModel, tmp_path: Path, kind: str) -> None:
    base = tiny_model(kind)
    count, both, width = shapes_of(base)["model.layers.1.mlp.experts.gate_up_proj"]
    sizes = {"gate": (both // 2, width), "up": (both // 2, width), "down": (width, both // 2)}
    pairs = {(number, name): drawn(*sizes[name]) for number in range(count - 1) for name in sizes}
    place = "model.language_model" if kind == "qwen3_5_moe" else "model"
    tensors = {}
    for (number, name), pair in pairs.items():
        module = f"{PREFIX}{place}.layers.1.mlp.experts.{number}.{name}_proj"
        tensors |= {f"{module}.lora_A.weight": pair.down, f"{module}.lora_B.weight": pair.up}
    adapter = write(tmp_path / "adapter", tensors)
    wanted = by_hand(base, stack_updates(base, pairs))
    torch.testing.assert_close(by_peft(base, adapter), wanted, atol=1e-4, rtol=1e-4)
    assert float((wanted - by_hand(base, {})).abs().max()) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_all_matrices_in_one_tensor_with_a_shared_side_and_sides_exchanged(
    tiny_model: TinyModel, tmp_path: Path, kind: str
) -> None:
    base = tiny_model(kind)
    count, both, width = shapes_of(base)["model.layers.1.mlp.experts.gate_up_proj"]
    pairs, tensors = {}, {}
    half = both // 2
    kinds = (("gate", "w1", half, width), ("up", "w3", half, width), ("down", "w2", width, half))
    for name, own, rows, columns in kinds:
        down = torch.randn(count if name == "down" else 1, RANK, columns) * 0.3
        up = torch.randn(1 if name == "down" else count, rows, RANK) * 0.3
        module = f"{PREFIX}model.layers.1.mlp.experts.{own}"
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        for number in range(count):
            pairs[number, name] = Pair(down[number % len(down)], up[number % len(up)])
    wanted = by_hand(base, stack_updates(base, pairs))
    adapter = write(tmp_path / "adapter", tensors)
    torch.testing.assert_close(by_peft(base, adapter), wanted, atol=1e-4, rtol=1e-4)

    translated = in_peft_layout(adapter, shapes_of(base))
    held, config = (
        load_file(translated / "adapter_model.safetensors"),
        json.loads((translated / "adapter_config.json").read_text()),
    )
    old = {}
    for name in (name for name in held if ".lora_A" in name):
        other = name.replace("lora_A", "lora_B")
        old[name], old[other] = exchanged(Pair(held[name], held[other]), count)
    earlier = write(tmp_path / "earlier", old, **config)
    assert in_peft_layout(earlier, shapes_of(base)) != earlier
    torch.testing.assert_close(by_peft(base, earlier), wanted, atol=1e-4, rtol=1e-4)
    again = write(tmp_path / "again", held, **config)
    assert in_peft_layout(again, shapes_of(base)) == again


def test_queries_keys_and_values_of_a_delta_net_apart(tiny_model: TinyModel, tmp_path: Path) -> None:
    base, net = tiny_model("qwen3_5"), "model.layers.0.linear_attn"
    rows, columns = shapes_of(base)[f"{net}.in_proj_qkv.weight"]
    parts = {"q": drawn(rows // 4, columns), "k": drawn(rows // 4, columns), "v": drawn(rows // 2, columns)}
    tensors = {}
    for name, pair in parts.items():
        module = f"{PREFIX}{net}.in_proj_{name}"
        tensors |= {f"{module}.lora_A.weight": pair.down, f"{module}.lora_B.weight": pair.up}
    update = torch.cat([update_of(pair) for pair in parts.values()])
    adapter = write(tmp_path / "adapter", tensors)
    wanted = by_hand(base, {f"{net}.in_proj_qkv.weight": update})
    torch.testing.assert_close(by_peft(base, adapter), wanted, atol=1e-4, rtol=1e-4)
    assert own_logits(base, adapter).change > 0

    lacking = {name: values for name, values in tensors.items() if "in_proj_k" not in name}
    with pytest.raises(LoratuneError, match="not all parts of it have LoRA"):
        by_peft(base, write(tmp_path / "lacking", lacking))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight", "Megatron's own checkpoints"),
        ("model.layers.0.self_attn.rotary.lora_A.weight", "names of no layout that loratune reads"),
        ("blocks.0.attention.query.lora_A", "names of no layout that loratune reads"),
    ],
)
def test_other_layouts_are_refused_by_name(tiny_model: TinyModel, tmp_path: Path, name: str, told: str) -> None:
    adapter = write(tmp_path / "adapter", {name: torch.ones(RANK, 32)})
    with pytest.raises(LoratuneError, match=told) as raised:
        load_adapter(load_plain(tiny_model("qwen3")), adapter)
    assert raised.value.exit_code == Exit.MODEL
    assert name in str(raised.value)


def test_names_that_fit_two_parts_of_the_base_are_refused() -> None:
    places = {"one.layers.0.proj": (8, 8), "two.layers.0.proj": (8, 8)}
    with pytest.raises(LoratuneError, match="fits several modules of the base"):
        renamed_prefix({"layers.0.proj": (8, 8)}, places, "adapter")
    assert renamed_prefix({"layers.0.proj": (8, 4)}, places, "adapter") is None


def test_a_missing_tensor_is_noticed_under_other_names_too(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("qwen3_5")
    pair = drawn(*shapes_of(base)["model.layers.1.self_attn.k_proj.weight"])
    module = f"{PREFIX}model.language_model.layers.1.self_attn.k_proj"
    tensors = {f"{module}.lora_A.weight": pair.down, f"{module}.lora_B.weight": pair.up}
    adapter = write(tmp_path / "adapter", tensors, target_modules=["k_proj", "v_proj"])
    with pytest.raises(LoratuneError, match="0 tensors too many, 2 too few"):
        check_adapter(adapter, shapes_of(base))
