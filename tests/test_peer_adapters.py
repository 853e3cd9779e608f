"""Adapters as other tools and other versions of PEFT write them, beside their updates added by hand."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import Result

from loratune.delivery.merge.update import read_updates
from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.attach import check_adapter, load_adapter
from loratune.model.adapter.values import CONVERSION
from loratune.model.architecture.file_layout import parameter_infos
from loratune.model.from_folder import load_plain

IDS = torch.arange(40).reshape(2, 20) * 7
PREFIX = "base_model.model."
RANK, ALPHA = 4, 8
Scales = dict[str, float]
"""Module → alpha / rank, or alpha / √rank, with which it was trained."""
OF_0_4 = {
    "auto_mapping": None,
    "base_model_name_or_path": "owner/name",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": RANK,
    "revision": None,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}
"""Settings that each version of PEFT writes, with those that it was the first to have."""
OF_0_6 = OF_0_4 | {"alpha_pattern": {}, "rank_pattern": {}}
OF_0_10 = OF_0_6 | {
    "layer_replication": None,
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "use_dora": False,
    "use_rslora": False,
}
OF_0_13 = OF_0_10 | {"runtime_config": {"ephemeral_gpu_offload": False}}
OF_0_15 = OF_0_10 | {
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "lora_bias": False,
    "trainable_token_indices": None,
}
OF_0_18 = OF_0_15 | {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "ensure_weight_tying": False,
    "peft_version": "0.18.1",
    "qalora_group_size": 16,
    "target_parameters": None,
    "use_qalora": False,
}
OF_0_20 = OF_0_18 | {
    "lora_ga_config": None,
    "monteclora_config": None,
    "peft_version": "0.20.0",
    "use_bdlora": None,
    "velora_config": None,
}
UNSLOTH_S_EXPRESSION = (
    r"(?:.*?(?:vision|image|visual|language|text).*?(?:q_proj|v_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj|v_proj)))"
)
ALL, SECOND = ("0", "1"), ("1",)


def scales(layers: tuple[str, ...] = ALL, names: tuple[str, ...] = ("q_proj", "v_proj"), scale: float = 2.0) -> Scales:
    return {f"model.layers.{layer}.self_attn.{name}": scale for layer in layers for name in names}


CASES: dict[str, tuple[dict[str, Any], Scales]] = {
    "PEFT 0.4": (OF_0_4, scales()),
    "PEFT 0.4, an expression": (OF_0_4 | {"target_modules": r".*\.1\.self_attn\.(q|v)_proj"}, scales(SECOND)),
    "PEFT 0.4, layers": (OF_0_4 | {"layers_to_transform": [1], "layers_pattern": "layers"}, scales(SECOND)),
    "PEFT 0.6, alphas": (OF_0_6 | {"alpha_pattern": {"q_proj": 2}}, scales() | scales(names=("q_proj",), scale=0.5)),
    "PEFT 0.10, a rank hides alphas": (
        OF_0_10 | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"0.self_attn.q_proj": 64, "v_proj": 2}},
        scales(names=("q_proj",), scale=4.0) | scales(names=("v_proj",), scale=0.5),
    ),
    "PEFT 0.10, alternatives are no group": (
        OF_0_10 | {"alpha_pattern": {"q_proj|v_proj": 2}},
        scales() | scales(names=("q_proj",), scale=0.5),
    ),
    "PEFT 0.10, a whole name": (
        OF_0_10 | {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"model.layers.1.self_attn.q_proj": 2}},
        scales(names=("v_proj",), scale=4.0) | scales(names=("q_proj",)) | scales(SECOND, names=("q_proj",), scale=0.5),
    ),
    "PEFT 0.13, rsLoRA": (OF_0_13 | {"use_rslora": True}, scales(scale=4.0)),
    "PEFT 0.15, a rank and alphas": (
        OF_0_15 | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"0.self_attn.q_proj": 64}},
        scales() | scales(names=("q_proj",), scale=4.0) | {"model.layers.0.self_attn.q_proj": 32.0},
    ),
    "PEFT 0.15, modules left out": (OF_0_15 | {"exclude_modules": r".*\.0\..*"}, scales(SECOND)),
    "LLaMA-Factory 0.9.5": (OF_0_18, scales()),
    "ms-swift 4.6.0": (OF_0_20 | {"lora_alpha": float(ALPHA), "modules_to_save": []}, scales()),
    "unsloth": (
        OF_0_18
        | {
            "auto_mapping": {
                "base_model_class": "Qwen2ForCausalLM",
                "parent_library": "transformers.models.qwen2.modeling_qwen2",
                "unsloth_fixed": True,
            },
            "target_modules": UNSLOTH_S_EXPRESSION,
        },
        scales(),
    ),
    "axolotl": (
        OF_0_18 | {"fan_in_fan_out": None, "layers_to_transform": [1], "layers_pattern": ["layers"]},
        scales(SECOND),
    ),
}
PATTERNS = ("rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules", "use_rslora")
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")


def rank_of(config: dict[str, Any], module: str) -> int:
    return next((rank for end, rank in config.get("rank_pattern", {}).items() if module.endswith(end)), RANK)


def write(base: Path, folder: Path, config: dict[str, Any], trained: Scales) -> dict[str, torch.Tensor]:
    """Write an adapter, and return its updates: name of a base's matrix → scale · B · A."""
    shapes = {name: values.shape for name, values in load_plain(base).named_parameters()}
    generator = torch.Generator().manual_seed(5)
    tensors, updates = {}, {}
    for module, scale in sorted(trained.items()):
        (rows, columns), rank = shapes[f"{module}.weight"], rank_of(config, module)
        down, up = (torch.randn(shape, generator=generator) * 0.3 for shape in ((rank, columns), (rows, rank)))
        tensors |= {f"{PREFIX}{module}.lora_A.weight": down, f"{PREFIX}{module}.lora_B.weight": up}
        updates[f"{module}.weight"] = scale * up @ down
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return updates


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=IDS).logits
    return logits


def by_hand(base: Path, updates: dict[str, torch.Tensor]) -> torch.Tensor:
    model: Any = load_plain(base)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, update in updates.items():
            parameters[name] += update
    return logits_of(model)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_computes_what_it_was_trained_as(random_qwen: Path, tmp_path: Path, case: str) -> None:
    config, trained = CASES[case]
    updates = write(random_qwen, tmp_path / "adapter", config, trained)
    wanted = by_hand(random_qwen, updates)
    torch.testing.assert_close(
        logits_of(load_adapter(load_plain(random_qwen), tmp_path / "adapter")), wanted, atol=1e-4, rtol=1e-4
    )
    infos = parameter_infos(random_qwen)
    check_adapter(tmp_path / "adapter", {name: info.shape for name, info in infos.items()})
    merged = read_updates(tmp_path / "adapter", infos, True)
    assert merged.keys() == updates.keys()
    for name, update in merged.items():
        zeros = torch.zeros_like(updates[name])
        torch.testing.assert_close(update.apply(zeros, 0).float(), updates[name], atol=1e-4, rtol=1e-4)
    if any(config.get(key) for key in PATTERNS):  # a reader that ignores them computes something else, or refuses
        ignored = {key: value for key, value in config.items() if key not in PATTERNS}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(ignored))
        try:
            other = logits_of(load_adapter(load_plain(random_qwen), tmp_path / "adapter"))
        except LoratuneError:
            return
        assert (other - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("PEFT 0.10, a")])
def test_patterns_of_an_earlier_version_that_are_read_as_today_s_would_be_noticed(
    random_qwen: Path, tmp_path: Path, case: str
) -> None:
    config, trained = CASES[case]
    wanted = by_hand(random_qwen, write(random_qwen, tmp_path / "adapter", config, trained))
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"exclude_modules": None}))
    misread = logits_of(load_adapter(load_plain(random_qwen), tmp_path / "adapter"))
    is_alike = case.endswith("a whole name")
    assert ((misread - wanted).abs().max() < 1e-3) == is_alike


def test_an_exported_adapter_means_the_same_to_today_s_peft(
    random_qwen: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    """PEFT reads a config of an earlier version otherwise than that version did."""
    config, trained = CASES["PEFT 0.10, a rank hides alphas"]
    wanted = by_hand(random_qwen, write(random_qwen, tmp_path / "adapter", config, trained))
    misread = logits_of(PeftModel.from_pretrained(load_plain(random_qwen), str(tmp_path / "adapter")))
    assert (misread - wanted).abs().max() > 1e-2
    given = ["--adapter", tmp_path / "adapter", "--base-model", random_qwen]
    result = cli("export", *given, "--format", "adapter", "--output", tmp_path / "exported")
    assert result.exit_code == 0, result.stderr
    exported = logits_of(PeftModel.from_pretrained(load_plain(random_qwen), str(tmp_path / "exported")))
    torch.testing.assert_close(exported, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(exported, logits_of(load_adapter(load_plain(random_qwen), tmp_path / "exported")))


def test_pickled_weights_are_refused_with_the_command_that_converts_them(
    random_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "an adapter's"
    updates = write(random_qwen, folder, *CASES["PEFT 0.4"])
    wanted = logits_of(load_adapter(load_plain(random_qwen), folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    transposed = {name: values.T.contiguous().T for name, values in tensors.items()}  # safetensors holds rows only
    torch.save(transposed, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(LoratuneError, match="only pickled weights") as raised:
        load_adapter(load_plain(random_qwen), folder)
    assert raised.value.exit_code == Exit.MODEL
    with pytest.raises(LoratuneError, match="only pickled weights"):
        read_updates(folder, parameter_infos(random_qwen), True)
    program, flag, code, *paths = shlex.split(str(raised.value).splitlines()[1])
    assert (program, flag) == ("python", "-c")
    monkeypatch.setattr(sys, "argv", ["-c", *paths])
    exec(code, {})
    assert torch.equal(logits_of(load_adapter(load_plain(random_qwen), folder)), wanted)
    torch.testing.assert_close(wanted, by_hand(random_qwen, updates), atol=1e-4, rtol=1e-4)


class Spy:
    """Its unpickling would write a file."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return open, ("opened", "w")


def test_the_conversion_of_pickled_weights_runs_no_code_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Spy()}, tmp_path / "adapter_model.bin")
    monkeypatch.setattr(sys, "argv", ["-c", "adapter_model.bin", "adapter_model.safetensors"])
    with pytest.raises(Exception, match="Weights only load failed"):
        exec(CONVERSION, {})
    assert not (tmp_path / "opened").exists()
