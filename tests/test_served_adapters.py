"""Adapters for servers: names of the class that is served, loaded there by transformers and PEFT, faults included."""

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
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from loratune.delivery.export.export import export
from loratune.delivery.export.job import ExportOptions
from loratune.delivery.export.servers import proof
from loratune.delivery.export.servers.plan import ServerAdvice, check_for, serve_command
from loratune.errors import Exit, LoratuneError
from loratune.model.adapter import files, renaming
from loratune.model.adapter.attach import load_adapter
from loratune.model.adapter.reloaded import own_logits
from loratune.model.architecture.roles import Role, linear_modules
from loratune.model.architecture.served_class import served_class
from loratune.model.config import auto_class
from loratune.model.from_folder import load_plain
from loratune.recipe.servers import SERVERS, Part, unserved
from loratune.runs.opening import open_adapter

IDS = torch.arange(60).reshape(2, 30) * 7
NESTED = ("qwen3_5", "qwen3_5_moe", "qwen3_vl", "gemma3", "qwen2_5_vl")
FAMILIES = [
    "qwen3_5", "qwen3_5_moe", "qwen3_moe",
    *(
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in ("qwen3", "qwen3_vl", "gemma3", "qwen2_5_vl", "qwen3_next")
    ),
]  # fmt: skip


@pytest.fixture
def adapter_of(tiny_model: TinyModel, tmp_path: Path) -> Callable[..., Path]:
    """Have PEFT write an adapter with an update that shows, on the class that loratune trains."""

    def write(kind: str, **settings: Any) -> Path:
        model = load_plain(tiny_model(kind))
        torch.manual_seed(1)
        targets = linear_modules(model, Role.ATTENTION)
        config = {"r": 4, "lora_alpha": 8, "target_modules": targets, "init_lora_weights": False, **settings}
        get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config)).save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return write


def logits_of(auto: Any, base: Path, adapter: Path | None) -> torch.Tensor:
    model = auto.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter)) if adapter else model
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=IDS).logits
    return logits


def exported(adapter: Path, base: Path, server: Any, output: Path) -> Any:
    verification, _ = export(open_adapter(adapter), output, ExportOptions(server, model=str(base)))
    return verification.proved.served


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_served_class_computes_what_the_trained_one_computes(
    tiny_model: TinyModel, adapter_of: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    base, adapter = tiny_model(kind), adapter_of(kind)
    proved = exported(adapter, base, "vllm", tmp_path / "out")
    served = AutoModelForImageTextToText if kind in NESTED else AutoModelForCausalLM
    wanted = logits_of(auto_class(type(load_plain(base).config)), base, adapter)
    found, without = logits_of(served, base, tmp_path / "out"), logits_of(served, base, None)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert float((found - without).abs().max()) > 0.1
    assert proved.model_class == type(served.from_pretrained(base)).__name__
    assert proved.modules == len(load_file(adapter / "adapter_model.safetensors")) // 2
    assert (proved.largest_difference, proved.largest_change > 0.1) == (0.0, True)


def test_names_and_targets_are_those_of_the_base_s_files(
    tiny_model: TinyModel, adapter_of: Callable[..., Path], tmp_path: Path
) -> None:
    settings = {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 16}, "layers_to_transform": [1]}
    exported(
        adapter_of("qwen3_5", target_modules=["q_proj", "v_proj"], **settings),
        tiny_model("qwen3_5"),
        "sglang",
        tmp_path / "out",
    )
    names = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    held = load_file(tiny_model("qwen3_5") / "model.safetensors").keys()
    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names}
    assert {f"{module}.weight" for module in modules} <= held
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    query = "model.language_model.layers.1.self_attn.q_proj"
    assert set(config["target_modules"]) == modules == {query, query.replace("q_proj", "v_proj")}
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({query: 8}, {query: 16})
    assert "layers_to_transform" not in config
    assert "where `base_model` is a `Qwen3_5ForConditionalGeneration`" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_stacks_get_the_names_of_the_served_class_too(
    tiny_model: TinyModel, adapter_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_model("qwen3_5_moe")
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    patterns = {"rank_pattern": {r".*\.gate_up_proj": 8}, "alpha_pattern": {r".*\.gate_up_proj": 16}}
    adapter = adapter_of("qwen3_5_moe", target_parameters=stacks, lora_dropout=0.0, **patterns)
    served, values = served_class(base), json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = renaming.renamed_tensors(tensors, served.modules, adapter)
    config = renaming.renamed_config(values, served.trained_shapes, served.parameters, adapter)
    (tmp_path / "out").mkdir()
    save_file({names[name]: value for name, value in tensors.items()}, tmp_path / "out" / "adapter_model.safetensors")
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config))
    stack = "model.language_model.layers.1.mlp.experts"
    assert config["rank_pattern"][f"{stack}.gate_up_proj"] == 8
    assert {f"{stack}.gate_up_proj", f"{stack}.down_proj"} <= set(config["target_parameters"])
    found = logits_of(AutoModelForImageTextToText, base, tmp_path / "out")
    torch.testing.assert_close(found, logits_of(AutoModelForCausalLM, base, adapter), atol=1e-5, rtol=1e-5)
    assert float((found - logits_of(AutoModelForImageTextToText, base, None)).abs().max()) > 0.1


def test_an_expression_becomes_names_for_servers(
    tiny_model: TinyModel, adapter_of: Callable[..., Path], tmp_path: Path
) -> None:
    exported(adapter_of("qwen3", target_modules=r".*\.1\..*q_proj"), tiny_model("qwen3"), "sglang", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]


def test_an_adapter_to_give_away_keeps_its_names_and_says_for_which_class(
    tiny_model: TinyModel,
    adapter_of: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = adapter_of("qwen3_5")
    proved = exported(adapter, tiny_model("qwen3_5"), "adapter", tmp_path / "out")
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes()
    assert proved.model_class == "Qwen3_5ForCausalLM"
    told = " ".join(capsys.readouterr().err.split())
    assert "the adapter is for Qwen3_5ForCausalLM" in told
    assert "Programs that load Qwen3_5ForConditionalGeneration, as servers do, apply nothing of it" in told


def test_loratune_reads_what_it_has_exported(
    tiny_model: TinyModel, adapter_of: Callable[..., Path], tmp_path: Path
) -> None:
    base, adapter = tiny_model("qwen3_5"), adapter_of("qwen3_5")
    exported(adapter, base, "vllm", tmp_path / "out")
    assert own_logits(base, tmp_path / "out").difference(own_logits(base, adapter)) == 0
    exported(tmp_path / "out", base, "sglang", tmp_path / "again")
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "again"))
    assert first.keys() == again.keys()


@pytest.mark.parametrize("is_seen_by_names", [True, False])
def test_names_of_another_class_are_caught(
    tiny_model: TinyModel,
    adapter_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_seen_by_names: bool,
) -> None:
    """With such names PEFT gives the base's own outputs, and a warning."""
    base, adapter = tiny_model("qwen3_5"), adapter_of("qwen3_5", target_modules=["q_proj", "v_proj"])
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"init_lora_weights": false', '"init_lora_weights": true'))
    served = served_class(base)
    wanted = logits_of(AutoModelForImageTextToText, base, None)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        assert torch.equal(logits_of(AutoModelForImageTextToText, base, adapter), wanted)
    if not is_seen_by_names:
        monkeypatch.setattr(proof, "check_adapter", lambda *_: None)
        monkeypatch.setattr(proof, "in_peft_layout", lambda folder, _: folder)
    with pytest.raises(
        LoratuneError, match=r"do not have the names of|logit differs by .*the exported one by 0"
    ) as raised:
        proof.prove_served(open_adapter(adapter), adapter, base, served)
    assert raised.value.exit_code == Exit.MODEL
    assert ("logit differs" in str(raised.value)) == (not is_seen_by_names)


def test_another_adapter_than_the_run_s_is_caught(
    tiny_model: TinyModel, adapter_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = renaming.renamed_config

    def with_another_alpha(*arguments: Any) -> dict[str, Any]:
        return real(*arguments) | {"alpha_pattern": {"q_proj": 9}}

    monkeypatch.setattr("loratune.delivery.export.adapter_folder.renamed_config", with_another_alpha)
    with pytest.raises(LoratuneError, match="logit differs"):
        exported(adapter_of("qwen3_5"), tiny_model("qwen3_5"), "vllm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_of_no_module_is_an_error(
    tiny_model: TinyModel, adapter_of: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = adapter_of("qwen3_5")
    names = load_file(adapter / "adapter_model.safetensors").keys()
    strange = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
    with pytest.raises(LoratuneError, match=r"(?s)1 tensor of no module of the base.*layers\.9"):
        renaming.renamed_tensors([*names, strange], served_class(tiny_model("qwen3_5")).modules, adapter)


def test_too_little_memory_leaves_the_check_of_names(
    tiny_model: TinyModel, adapter_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "free_main_memory_bytes", lambda: 0)
    proved = exported(adapter_of("qwen3"), tiny_model("qwen3"), "vllm", tmp_path / "out")
    assert (proved.modules, proved.largest_difference, proved.largest_change) == (8, None, None)


def write(folder: Path, modules: dict[str, tuple[int, int]], **settings: Any) -> Path:
    """An adapter of rank 4 with these modules: name → columns and rows."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for module, (columns, rows) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(4, columns)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(rows, 4)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": sorted({m.rpartition(".")[2] for m in modules}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder


STACK = "model.layers.0.mlp.experts"
ANSWERS = {
    Part.DECAY: ({"model.layers.0.linear_attn.in_proj_a": (32, 4)}, {}, "in_proj_a"),
    Part.RECURRENT: ({"model.layers.0.linear_attn.in_proj_qkv": (32, 64)}, {}, ""),
    Part.ROUTER: ({"model.layers.0.mlp.gate": (32, 8)}, {}, "LoRA on gate"),
    Part.EMBEDDING: ({"lm_head": (32, 3008)}, {}, "LoRA on lm_head"),
    Part.RSLORA: ({"model.layers.0.self_attn.q_proj": (32, 32)}, {"use_rslora": True}, "use_rslora"),
    Part.DORA: ({"model.layers.0.self_attn.q_proj": (32, 32)}, {"use_dora": True}, "DoRA"),
    Part.LORA_BIAS: ({"model.layers.0.self_attn.q_proj": (32, 32)}, {"lora_bias": True}, "lora_bias"),
    Part.BASE_BIASES: ({"model.layers.0.self_attn.q_proj": (32, 32)}, {"bias": "all"}, "bias: all"),
    Part.WHOLE_MODULES: ({"model.layers.0.self_attn.q_proj": (32, 32)}, {"modules_to_save": ["norm"]}, "norm"),
    Part.TOKENS: ({"model.layers.0.self_attn.q_proj": (32, 32)}, {"trainable_token_indices": [1]}, "token"),
    Part.PATTERNS: (
        {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.0.self_attn.v_proj": (32, 32)},
        {"alpha_pattern": {"v_proj": 3}}, "1 modules with another alpha",
    ),
    Part.STACKS: (
        {f"{STACK}.base_layer": (32, 32), STACK: (16, 32)}, {"target_parameters": ["gate_up_proj", "down_proj"]},
        "LoRA on experts",
    ),
    Part.USUAL: ({"model.layers.0.self_attn.q_proj": (32, 32)}, {}, ""),
}  # fmt: skip
"""Part → modules, settings, and words of the refusal."""


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("part", Part)
def test_what_a_server_does_not_serve_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Any, part: Part
) -> None:
    monkeypatch.setattr(files, "SETTINGS", files.SETTINGS | {"target_parameters"})
    modules, settings, words = ANSWERS[part]
    advice = check_for(server, write(tmp_path / "adapter", modules, **settings))
    assert len(advice.problems) == (not SERVERS[server].answers[part].is_served), advice
    assert all(words in problem for problem in advice.problems)


def test_a_gate_with_one_output_is_known_whatever_its_name(tmp_path: Path) -> None:
    advice = check_for("vllm", write(tmp_path / "adapter", {"model.layers.0.mlp.shared_switch": (32, 1)}))
    assert "LoRA on shared_switch" in advice.problems[0]


def test_stacks_need_a_version_and_all_of_their_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SETTINGS", files.SETTINGS | {"target_parameters"})
    modules, settings, _ = ANSWERS[Part.STACKS]
    advice = check_for("vllm", write(tmp_path / "adapter", modules, **settings))
    assert "0.33 and newer" in advice.warnings[0]
    half = check_for("vllm", write(tmp_path / "adapter", {STACK: (16, 32)}, target_parameters=["down_proj"]))
    assert half.problems == [f"LoRA on a part of the matrices of {STACK}: all or none have to be adapted"]


def test_the_table_answers_for_every_part() -> None:
    assert all(server.answers.keys() == set(Part) for server in SERVERS.values())
    assert (unserved(Part.DORA), unserved(Part.RSLORA), unserved(Part.USUAL)) == (["vLLM", "SGLang"], ["SGLang"], [])


def test_sglang_gets_its_own_flags(tmp_path: Path) -> None:
    command = serve_command("base", "faq", Path("out/faq"), ServerAdvice("sglang", 24, [], []), Path("out/t.jinja"))
    assert command.line == (
        "python -m sglang.launch_server --model-path base --enable-lora --lora-paths faq=out/faq --max-lora-rank 24 "
        "--chat-template out/t.jinja"
    )
    words = serve_command("base", "faq", Path("out/a=1"), ServerAdvice("sglang", 8, [], [])).words
    assert json.loads(words[words.index("--lora-paths") + 1]) == {"lora_name": "faq", "lora_path": "out/a=1"}


def test_a_refusal_advises_to_merge_and_serve_there(
    tiny_model: TinyModel, adapter_of: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = adapter_of("qwen3", use_rslora=True)
    with pytest.raises(LoratuneError, match="SGLang cannot serve this adapter") as raised:
        exported(adapter, tiny_model("qwen3"), "sglang", tmp_path / "out")
    assert [command.words[:2] for command in raised.value.commands] == [("loratune", "merge"), ("python", "-m")]


def test_a_loaded_adapter_of_the_served_class_is_the_run_s(
    tiny_model: TinyModel, adapter_of: Callable[..., Path], tmp_path: Path
) -> None:
    base, adapter = tiny_model("qwen3_5"), adapter_of("qwen3_5")
    exported(adapter, base, "vllm", tmp_path / "out")
    states = [load_adapter(load_plain(base), folder).state_dict() for folder in (adapter, tmp_path / "out")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(values, states[1][name]) for name, values in states[0].items())
