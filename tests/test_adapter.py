"""Attaching, saving and loading the adapter, against PEFT and plain arithmetic."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.attach import attach_adapter, check_frozen, load_adapter, save_adapter
from loratune.model.adapter.summary import summarise_adapter
from loratune.model.adapter.targets import resolve_targets
from loratune.model.base import load_base
from loratune.model.hardware import detect_hardware
from loratune.recipe.advice import first_steps
from loratune.recipe.method_sections import LoraSettings
from loratune.recipe.sections import ModelSettings
from loratune.writing import folder_in_one_step

IDS = torch.tensor([[5, 6, 7, 8, 9]])
LINEAR_SHAPES = {  # out × in of the random model's linear layers
    "q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32),
    "gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48),
}  # fmt: skip


def base_of(folder: Path) -> Any:
    return load_base(ModelSettings(base="x", dtype="float32"), folder, detect_hardware())


def attached(folder: Path, **settings: Any) -> Any:
    return attach_adapter(base_of(folder), LoraSettings(**settings), "some/base", seed=1)


def give_weight(model: Any) -> None:
    """Fill the adapter's matrices, which start as a zero update."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)


@pytest.fixture
def saved(random_qwen: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A saved adapter and the logits of the model that it was saved from."""
    model = attached(random_qwen, rank=4, alpha=8)
    give_weight(model)
    model.eval()
    with folder_in_one_step(tmp_path / "adapter") as folder:
        save_adapter(model, folder)
    return tmp_path / "adapter", model(IDS).logits.detach()


def test_a_fresh_adapter_changes_nothing(random_qwen: Path) -> None:
    torch.testing.assert_close(attached(random_qwen).eval()(IDS).logits, base_of(random_qwen)(IDS).logits)


def test_parameters_are_counted_as_arithmetic_has_it(random_qwen: Path) -> None:
    settings = LoraSettings(rank=4)
    summary = summarise_adapter(attached(random_qwen, rank=4), resolve_targets(base_of(random_qwen), settings))
    expected = 2 * sum(4 * (rows + columns) for rows, columns in LINEAR_SHAPES.values())

    assert summary.trainable_parameters == expected
    assert summary.adapter_bytes == 4 * expected
    assert summary.modules == dict.fromkeys(LINEAR_SHAPES, 2)
    assert {name: group.modules for name, group in summary.groups.items()} == {"attention": 8, "mlp": 6}
    assert sum(group.parameters for group in summary.groups.values()) == expected
    assert summary.base_bytes == sum(p.numel() * 4 for p in base_of(random_qwen).parameters())


def test_just_the_adapter_trains(random_qwen: Path) -> None:
    model = attached(random_qwen, target_modules="attention", bias="lora_only", modules_to_save=["embed_tokens"])
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert all("lora_" in name or "modules_to_save" in name or name.endswith(".bias") for name in training)
    assert not any("gate_proj" in name for name in training)
    assert any("modules_to_save" in name for name in training)


def test_a_trainable_base_weight_is_noticed(random_qwen: Path) -> None:
    model = attached(random_qwen)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"norm\.weight would be trained"):
        check_frozen(model, LoraSettings())


@pytest.mark.parametrize(("layers", "expected"), [("last 1", {1}), ("first 1", {0}), ("0-1", {0, 1})])
def test_layers_choose_where_adapters_sit(random_qwen: Path, layers: str, expected: set[int]) -> None:
    model = attached(random_qwen, layers=layers)
    found = {int(name.split(".layers.")[1].split(".")[0]) for name, _ in model.named_parameters() if "lora_A" in name}
    assert found == expected


@pytest.mark.parametrize("layers", ["last 3", "1-2"])
def test_layers_that_the_model_lacks_are_refused(random_qwen: Path, layers: str) -> None:
    with pytest.raises(LoratuneError, match="the model has 2 layers"):
        attached(random_qwen, layers=layers)


def test_targets_that_match_nothing_are_named_with_those_there_are(random_qwen: Path) -> None:
    with pytest.raises(LoratuneError, match=r"called qkv_proj.*q_proj, k_proj") as raised:
        attached(random_qwen, target_modules=["q_proj", "qkv_proj"])
    assert raised.value.exit_code == Exit.USAGE


def test_modules_to_save_that_match_nothing_are_named(random_qwen: Path) -> None:
    with pytest.raises(LoratuneError, match="called wte"):
        attached(random_qwen, modules_to_save=["wte"])


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"use_rslora": True}, {"bias": "all"}])
def test_variants_survive_saving_and_loading(random_qwen: Path, tmp_path: Path, variant: dict[str, Any]) -> None:
    model = attached(random_qwen, **variant)
    give_weight(model)
    save_adapter(model, tmp_path / "a")
    loaded = PeftModel.from_pretrained(base_of(random_qwen), str(tmp_path / "a"))
    torch.testing.assert_close(loaded.eval()(IDS).logits, model.eval()(IDS).logits)


def test_plain_peft_loads_a_saved_adapter_to_the_same_logits(
    saved: tuple[Path, torch.Tensor], random_qwen: Path
) -> None:
    folder, logits = saved
    reference = AutoModelForCausalLM.from_pretrained(random_qwen, dtype=torch.float32)
    torch.testing.assert_close(PeftModel.from_pretrained(reference, folder).eval()(IDS).logits, logits)


def test_transformers_alone_loads_a_saved_adapter_to_the_same_logits(
    saved: tuple[Path, torch.Tensor], random_qwen: Path
) -> None:
    folder, logits = saved
    model = AutoModelForCausalLM.from_pretrained(random_qwen, dtype=torch.float32)
    model.load_adapter(str(folder))
    torch.testing.assert_close(model.eval()(IDS).logits, logits)


def test_the_update_is_alpha_over_rank_times_b_times_a(saved: tuple[Path, torch.Tensor], random_qwen: Path) -> None:
    folder, logits = saved
    weights = load_file(folder / "adapter_model.safetensors")
    merged = AutoModelForCausalLM.from_pretrained(random_qwen, dtype=torch.float32)
    for name, down in weights.items():
        if "lora_A" in name:
            target = merged.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            target.weight.data += 8 / 4 * (weights[name.replace("lora_A", "lora_B")] @ down)
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_saved_files_are_just_peft_s_and_obey_the_umask(saved: tuple[Path, torch.Tensor]) -> None:
    folder, _ = saved
    mask = os.umask(0)
    os.umask(mask)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~mask}


def test_the_saved_config_names_the_base_and_no_folder(saved: tuple[Path, torch.Tensor], random_qwen: Path) -> None:
    text = (saved[0] / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == "some/base"
    assert str(random_qwen.parent) not in text


def test_an_adapter_with_nan_is_refused(saved: tuple[Path, torch.Tensor], random_qwen: Path) -> None:
    path = saved[0] / "adapter_model.safetensors"
    weights = load_file(path)
    first = next(iter(weights))
    weights[first].view(-1)[0] = float("nan")
    save_file(weights, path)
    with pytest.raises(LoratuneError, match="NaN or infinity in 1 tensor,"):
        load_adapter(base_of(random_qwen), saved[0])


def test_an_adapter_of_a_type_that_is_not_read_is_refused(saved: tuple[Path, torch.Tensor], random_qwen: Path) -> None:
    path = saved[0] / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(LoratuneError, match="of an unsupported dtype"):
        load_adapter(base_of(random_qwen), saved[0])


def test_a_truncated_adapter_is_refused(saved: tuple[Path, torch.Tensor], random_qwen: Path) -> None:
    path = saved[0] / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(LoratuneError, match="damaged"):
        load_adapter(base_of(random_qwen), saved[0])


def test_a_pickled_adapter_is_never_opened(saved: tuple[Path, torch.Tensor], random_qwen: Path) -> None:
    (saved[0] / "adapter_model.safetensors").rename(saved[0] / "adapter_model.bin")
    with pytest.raises(LoratuneError, match=r"no adapter_model\.safetensors"):
        load_adapter(base_of(random_qwen), saved[0])


def test_an_adapter_of_another_rank_than_its_config_is_refused(
    saved: tuple[Path, torch.Tensor], random_qwen: Path
) -> None:
    path = saved[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 2}))
    with pytest.raises(LoratuneError, match="does not fit the base model") as raised:
        load_adapter(base_of(random_qwen), saved[0])
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    "change",
    [{"peft_type": "PROMPT_TUNING"}, {"auto_mapping": {"parent_library": "evil"}}, {"megatron_config": {"a": 1}}],
)
def test_a_config_that_is_not_plain_lora_is_refused(
    saved: tuple[Path, torch.Tensor], random_qwen: Path, change: dict[str, Any]
) -> None:
    path = saved[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(LoratuneError):
        load_adapter(base_of(random_qwen), saved[0])


def test_keys_of_a_newer_peft_are_no_reason_to_refuse(saved: tuple[Path, torch.Tensor], random_qwen: Path) -> None:
    path = saved[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_something_new": False}))
    model = load_adapter(base_of(random_qwen), saved[0])
    torch.testing.assert_close(model.eval()(IDS).logits, saved[1])


def test_a_folder_without_config_is_no_adapter(tmp_path: Path, random_qwen: Path) -> None:
    with pytest.raises(LoratuneError, match=r"no adapter_config\.json"):
        load_adapter(base_of(random_qwen), tmp_path)


def test_the_seed_decides_the_start(random_qwen: Path) -> None:
    def start(seed: int) -> torch.Tensor:
        model = attach_adapter(base_of(random_qwen), LoraSettings(), "b", seed)
        return torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name])

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_copying_a_saved_adapter_elsewhere_keeps_it_usable(
    saved: tuple[Path, torch.Tensor], random_qwen: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(saved[0], tmp_path / "elsewhere")
    torch.testing.assert_close(load_adapter(base_of(random_qwen), copy).eval()(IDS).logits, saved[1])


def test_what_a_first_step_changes_follows_from_alpha_and_rate_and_not_from_the_rank() -> None:
    """One step of Adam on PEFT's own layer: the change along the gradient, for each unit of `first_steps`."""

    def change(rate: float, **settings: Any) -> float:
        torch.manual_seed(0)
        x, wanted = torch.randn(2, 64, 256)
        lora, base = LoraSettings(**settings), torch.nn.Linear(256, 256, bias=False)
        gradient = ((x @ base.weight.T - wanted).T @ x).detach()
        names: Any = {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.use_rslora, "target_modules": ["0"]}
        model: Any = get_peft_model(torch.nn.Sequential(base), LoraConfig(**names))
        (model(x) - wanted).square().sum().backward()
        torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0).step()
        moved = -(model.base_model.model[0].get_delta_weight("default") * gradient).sum().item()
        return moved / first_steps(lora, rate)

    plain = change(1e-4, rank=16, alpha=32)
    assert plain > 0
    for rate, settings in (
        (1e-4, {"rank": 128, "alpha": 32}),
        (4e-4, {"rank": 16, "alpha": 8}),
        (1e-4, {"rank": 64, "alpha": 4, "use_rslora": True}),
    ):
        assert change(rate, **settings) == pytest.approx(plain, rel=0.2)
