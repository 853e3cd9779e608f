"""GGUF files of mixtures and of gated delta nets: values by hand, names by gguf's table, logits by another reader."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import CONFIGS, make_tiny_model, tiny_config
from transformers import CONFIG_MAPPING

from loratune.delivery.export.gguf import architectures, layout
from loratune.delivery.export.gguf import file as gguf_file
from loratune.delivery.export.gguf.architectures import ARCHITECTURES, architecture_name
from loratune.delivery.export.gguf.check import check_gguf
from loratune.delivery.export.gguf.file import ModelToWrite, write_gguf
from loratune.delivery.export.gguf.keys import describe, read_config
from loratune.delivery.export.gguf.layout import plan_tensors
from loratune.delivery.export.gguf.proof import compare_logits
from loratune.delivery.export.gguf.refusal import NotForGgufError
from loratune.errors import LoratuneError
from loratune.model.architecture.families import GGUF_ARCHITECTURES
from loratune.model.architecture.file_layout import FileLayout
from loratune.model.architecture.norms import adds_one, is_norm
from loratune.model.config import empty_model
from loratune.model.from_folder import load_plain
from loratune.runs.probe import ProbeRow

EXPORTED = [kind for kind in CONFIGS if architecture_name(CONFIG_MAPPING[kind]()) in ARCHITECTURES]
SETTINGS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"num_hidden_layers": 7, "layer_types": None},
    "gemma3": {"text_config": CONFIGS["gemma3"]["text_config"] | {"num_hidden_layers": 7, "layer_types": None}},
}
"""Gemma 3 in GGUF attends to all tokens in each sixth layer."""
QUICK = ("qwen3_moe", "phi3", "qwen3_5_moe", "qwen3_next")
EVERY = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in EXPORTED]
HEADS, KEYS, SIZE = 4, 2, 8
"""Value heads, key heads and the size of each in the tiny models with gated delta nets."""

Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A folder of a tiny model, which is made once."""

    def model(kind: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"gguf-{kind}"
        return folder if folder.exists() else make_tiny_model(kind, folder, **SETTINGS.get(kind, {}))

    return model


def rows() -> list[ProbeRow]:
    """Rows of 9 and 70 tokens: the delta rule computes in chunks of 64."""
    drawn = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 3000, (length,), generator=drawn).tolist() for length in (9, 70)]
    return [ProbeRow(row, [-100, *row[1:]]) for row in ids]


def written(model: Path, target: Path, quantization: Any = "f32") -> dict[str, torch.Tensor]:
    """The values in a model's file by name, after the file has been compared with the model's tensors."""
    write_gguf(model, target, quantization)
    check_gguf(model, target)
    tensors = gguf.GGUFReader(target).tensors
    return {one.name: torch.from_numpy(gguf.dequantize(one.data, one.tensor_type).copy()) for one in tensors}


def tensors_of(model: Path) -> dict[str, torch.Tensor]:
    """The tensors in a model's files, with the names that a language model alone would have."""
    return {
        name.replace(".language_model", ""): values for name, values in load_file(model / "model.safetensors").items()
    }


# --- against another reader ---


@pytest.mark.parametrize("kind", EVERY)
def test_a_file_is_the_model_in_every_type(models: Models, tmp_path: Path, kind: str) -> None:
    model = models(kind)
    # Rounding moves the logits of a random model of seven layers beyond bounds that are meant for trained ones.
    for quantization in ("f32",) if kind in SETTINGS else ("f32", "bf16", "q8_0"):
        file = tmp_path / f"{quantization}.gguf"
        write_gguf(model, file, quantization)
        assert (check_gguf(model, file).largest_difference == 0) == (quantization == "f32")
        proof = compare_logits(model, file, quantization, rows())
        assert proof.read_by == ("loratune" if kind == "qwen3_next" else "transformers")
        assert (proof.parameters > 0) == (
            kind in ("lfm2", "qwen2_moe") or kind.startswith(("qwen3_5", "qwen3_moe", "qwen3_next"))
        )
        if quantization == "f32":
            assert proof.logits.largest_difference <= 1e-6 * proof.logits.largest_logit
            assert not proof.rounding


def test_keys_of_convolutions_mixtures_and_gated_delta_nets(models: Models) -> None:
    expected: dict[str, dict[str, Any]] = {
        "lfm2": {"attention.head_count_kv": [0, 2], "shortconv.l_cache": 3, "feed_forward_length": 48},
        "qwen2_moe": {
            "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 16,
            "expert_shared_feed_forward_length": 16, "feed_forward_length": 48,
        },
        "qwen3_5": {
            "ssm.conv_kernel": 4, "ssm.state_size": 8, "ssm.group_count": 2, "ssm.time_step_rank": 4,
            "ssm.inner_size": 32, "full_attention_interval": 2, "rope.dimension_count": 4,
            "rope.dimension_sections": [11, 11, 10, 0], "attention.key_length": 16,
        },
    }  # fmt: skip
    for kind, keys in expected.items():
        name = architecture_name(read_config(models(kind)))
        found = ModelToWrite(models(kind)).keys
        assert {f"{name}.{key}": value for key, value in keys.items()}.items() <= found.items()


def test_factors_for_long_contexts_are_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long_rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0],
    }  # fmt: skip
    settings = {"rope_parameters": long_rope, "original_max_position_embeddings": 32}
    model = make_tiny_model("phi3", tmp_path / "model", **settings)
    stored = written(model, tmp_path / "model.gguf")
    assert stored["rope_factors_short.weight"].tolist() == [1.0, 1.5]
    assert stored["rope_factors_long.weight"].tolist() == [2.0, 4.0]
    keys = ModelToWrite(model).keys
    assert keys["phi3.rope.scaling.attn_factor"] == pytest.approx((1 + math.log(2048 / 32) / math.log(32)) ** 0.5)
    assert keys["phi3.rope.dimension_count"] == 4
    compare_logits(model, tmp_path / "model.gguf", "f32", rows())  # the second row is longer than 32
    monkeypatch.setattr(gguf_file, "describe", lambda *_: keys | {"phi3.rope.scaling.attn_factor": 1.0})
    write_gguf(model, tmp_path / "wrong.gguf", "f32")
    with pytest.raises(LoratuneError, match="is not the merged model"):
        compare_logits(model, tmp_path / "wrong.gguf", "f32", rows())


@pytest.mark.parametrize("kind", EVERY)
def test_names_are_gguf_s_own_for_the_architecture(models: Models, kind: str) -> None:
    config = read_config(models(kind))
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture_name(config)]
    names = [gguf.TENSOR_NAMES[kind].format(bid=layer) for kind in gguf.MODEL_TENSORS[known] for layer in range(7)]
    planned = [tensor.name for tensor in plan_tensors(config)]
    assert {name.removesuffix(".weight").removesuffix(".bias") for name in planned} <= {*names}
    assert len({*planned}) == len(planned)


def test_the_architectures_that_are_listed_are_those_that_are_tested() -> None:
    assert {*GGUF_ARCHITECTURES} == {*ARCHITECTURES}
    assert {architecture_name(CONFIG_MAPPING[kind]()) for kind in EXPORTED} == {*ARCHITECTURES}


def test_norms_that_add_one_are_found_by_running_them() -> None:
    found = {}
    for kind in ("llama", "gemma3_text", "qwen3_5_text", "qwen3_next"):
        modules = empty_model(tiny_config(kind)).modules()
        found |= {type(module).__name__: adds_one(module) for module in modules if is_norm(module)}
    assert found == {
        "LlamaRMSNorm": False, "Gemma3RMSNorm": True, "Qwen3_5RMSNorm": True, "Qwen3_5RMSNormGated": False,
        "Qwen3NextRMSNorm": True, "Qwen3NextRMSNormGated": False,
    }  # fmt: skip


# --- values by hand ---


def test_the_matrices_of_a_mixture_are_stacked_in_order(models: Models, tmp_path: Path) -> None:
    model = models("qwen3_moe")
    stored, tensors = written(model, tmp_path / "model.gguf"), tensors_of(model)
    for matrix in ("gate", "up", "down"):
        for number in range(4):
            expected = tensors[f"model.layers.1.mlp.experts.{number}.{matrix}_proj.weight"]
            assert torch.equal(stored[f"blk.1.ffn_{matrix}_exps.weight"][number], expected)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    write_gguf(model, tmp_path / "small.gguf", "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "small.gguf").tensors}
    assert kinds["blk.0.ffn_gate_inp.weight"] == "F32"  # it selects experts
    assert kinds["blk.0.ffn_gate_exps.weight"] == "Q8_0"


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_next"])
def test_norms_decay_and_convolution_are_as_the_graph_takes_them(models: Models, tmp_path: Path, kind: str) -> None:
    stored, tensors = written(models(kind), tmp_path / "model.gguf"), tensors_of(models(kind))
    shifted = {
        "output_norm": "norm", "blk.0.attn_norm": "layers.0.input_layernorm",
        "blk.0.post_attention_norm": "layers.0.post_attention_layernorm",
        "blk.1.attn_q_norm": "layers.1.self_attn.q_norm", "blk.1.attn_k_norm": "layers.1.self_attn.k_norm",
    }  # fmt: skip
    for theirs, ours in shifted.items():
        assert torch.equal(stored[f"{theirs}.weight"], tensors[f"model.{ours}.weight"] + 1)
    place = "model.layers.0.linear_attn"
    assert torch.equal(stored["blk.0.ssm_norm.weight"], tensors[f"{place}.norm.weight"])
    decay, bias = -tensors[f"{place}.A_log"].exp(), tensors[f"{place}.dt_bias"]
    order = [0, 2, 1, 3] if kind == "qwen3_5" else [0, 1, 2, 3]  # the first head of each key head, then the second
    torch.testing.assert_close(stored["blk.0.ssm_a"], decay[order], rtol=1e-6, atol=0)
    assert torch.equal(stored["blk.0.ssm_dt.bias"], bias[order])
    convolution = tensors[f"{place}.conv1d.weight"]
    assert convolution.ndim == 3
    assert stored["blk.0.ssm_conv1d.weight"].shape == (convolution.shape[0], convolution.shape[2])


def test_value_heads_are_tiled(models: Models, tmp_path: Path) -> None:
    stored, tensors = written(models("qwen3_5"), tmp_path / "model.gguf"), tensors_of(models("qwen3_5"))
    place, before = "model.layers.0.linear_attn", 2 * KEYS * SIZE
    mixed, gate, out, convolution = (
        tensors[f"{place}.{name}.weight"] for name in ("in_proj_qkv", "in_proj_z", "out_proj", "conv1d")
    )
    assert torch.equal(stored["blk.0.attn_qkv.weight"][:before], mixed[:before])
    for head in range(HEADS):
        key, turn = divmod(head, HEADS // KEYS)
        tiled = turn * KEYS + key
        ours, theirs = slice(head * SIZE, (head + 1) * SIZE), slice(tiled * SIZE, (tiled + 1) * SIZE)
        assert torch.equal(stored["blk.0.attn_gate.weight"][theirs], gate[ours])
        assert torch.equal(stored["blk.0.ssm_out.weight"][:, theirs], out[:, ours])
        assert torch.equal(stored["blk.0.attn_qkv.weight"][before:][theirs], mixed[before:][ours])
        assert torch.equal(stored["blk.0.ssm_conv1d.weight"][before:][theirs], convolution[before:, 0][ours])
        for theirs_name, ours_name in (("alpha", "a"), ("beta", "b")):
            matrix = tensors[f"{place}.in_proj_{ours_name}.weight"]
            assert torch.equal(stored[f"blk.0.ssm_{theirs_name}.weight"][tiled], matrix[head])


def test_the_joined_projection_is_split_as_transformers_splits_it(models: Models, tmp_path: Path) -> None:
    stored = written(models("qwen3_next"), tmp_path / "model.gguf")
    net = load_plain(models("qwen3_next")).get_submodule("model.layers.0.linear_attn")
    joined, gates = net.in_proj_qkvz.weight, net.in_proj_ba.weight
    query, key, value, gate, _, _ = net.fix_query_key_value_ordering(joined.T[None], gates.T[None])
    mixed = torch.cat([part[0].flatten(1) for part in (query, key, value)], dim=1).T
    assert torch.equal(stored["blk.0.attn_qkv.weight"], mixed)
    assert torch.equal(stored["blk.0.attn_gate.weight"], gate[0].flatten(1).T)
    assert torch.equal(stored["blk.0.ssm_ba.weight"], gates)  # which the graph splits itself


# --- faults ---

MATRIX, PART, TILED = FileLayout.matrix, layout.part_rows, architectures.tiled_heads
FAULTS: dict[str, tuple[str, Any, str, Any]] = {
    "a mixture's matrices in another order": (
        "qwen3_moe", FileLayout, "matrix", lambda layout, name, number, files: MATRIX(layout, name, 3 - number, files)),
    "gate and up exchanged": (
        "qwen3_5_moe", layout, "part_rows", lambda size, part, parts: PART(size, parts - 1 - part, parts)),
    "value heads not tiled": (
        "qwen3_5_moe", architectures, "tiled_heads", lambda *sizes, **more: TILED(*sizes, **more).sort().values),
    "norms without 1": ("qwen3_next", layout, "plus_one", lambda values: values.float()),
    "the logarithm of the decay": ("qwen3_5_moe", architectures, "decay", lambda values: values.float()),
    "the joined projection not split": (
        "qwen3_next", architectures, "joined_projection_rows", lambda net: torch.arange(96).split([64, 32])),
    "gate and up exchanged, read by loratune": (
        "qwen3_next", layout, "part_rows", lambda size, part, parts: PART(size, parts - 1 - part, parts)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_with_wrong_values_is_caught(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    kind, where, name, other = FAULTS[fault]
    model, file = models(kind), tmp_path / "wrong.gguf"
    monkeypatch.setattr(where, name, other)
    write_gguf(model, file, "q8_0")
    check_gguf(model, file)  # which expects what is written
    with pytest.raises(LoratuneError, match="is another in the file than in the model"):
        compare_logits(model, file, "q8_0", rows())


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("qwen3_moe", "expert_used_count", 1),
        ("qwen3_moe", "rope.freq_base", 2e4),
        ("qwen3_5_moe", "rope.dimension_count", 8),
        ("qwen3_5_moe", "attention.layer_norm_rms_epsilon", 0.1),
        ("qwen3_next", "expert_used_count", 1),
        ("qwen3_next", "rope.dimension_count", 8),
        ("qwen3_5_moe", "ssm.state_size", 16),
        ("qwen3_next", "ssm.time_step_rank", 2),
    ],
)
def test_wrong_keys_are_caught_though_rounding_moves_logits_further(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, key: str, value: Any
) -> None:
    model, file = models(kind), tmp_path / "wrong.gguf"
    name = architecture_name(read_config(model))
    monkeypatch.setattr(gguf_file, "describe", lambda *given: describe(*given) | {f"{name}.{key}": value})
    write_gguf(model, file, "q8_0")
    with pytest.raises(LoratuneError, match="is not the merged model" if key[:3] != "ssm" else "shapes that its keys"):
        compare_logits(model, file, "q8_0", rows())


# --- what is refused or left out ---


@pytest.mark.parametrize(
    ("kind", "settings", "what"),
    [
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "a parameter that GGUF's qwen3moe does not have"),
        ("qwen3_next", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ("phi3", {"hidden_size": 64, "head_dim": 8}, "head_dim 8"),
        ("gemma3_text", {}, "layer_types with full attention in other layers than each 6th"),
        ("glm4", {}, "model_type 'glm4'"),
        ("qwen3_vl", {}, "model_type 'qwen3_vl'"),
    ],
)
def test_what_cannot_be_written_is_refused_with_the_way_out(
    tmp_path: Path, kind: str, settings: dict[str, Any], what: str
) -> None:
    model = make_tiny_model(kind, tmp_path / kind, **settings)
    with pytest.raises(NotForGgufError, match=what) as caught:
        write_gguf(model, tmp_path / "model.gguf", "f32")
    assert "convert_hf_to_gguf.py" in caught.value.message
    assert not (tmp_path / "model.gguf").exists()


def test_an_export_says_what_it_leaves_out_and_what_read_it(cli: Any, models: Models, tmp_path: Path) -> None:
    for kind, reader in (("qwen3_5", "transformers"), ("qwen3_next", "loratune")):
        output = tmp_path / kind
        done = cli("export", "--model", models(kind), "--format", "gguf", "-q", "f16", "--output", output)
        assert done.exit_code == 0, done.stderr
        said = " ".join(done.stderr.split())
        assert "take no part in writing text" in said
        assert ("--mmproj" in said) == (kind == "qwen3_5")
        assert ("loratune's own reader" in said) == (reader == "loratune")
        report = json.loads((output / "verification.json").read_text())
        assert report["read_by"] == reader
        stored = {tensor.name for tensor in gguf.GGUFReader(output / report["file"]).tensors}
        assert not [name for name in stored if "visual" in name or "mtp" in name]
