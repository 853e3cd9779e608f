"""What loratune asks of a model, against the model: of all supported families, and of some laid out otherwise."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModel
from safetensors.torch import load_file
from tiny_models import SIZES, tiny_config
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.core_model_loading import Transpose, WeightConverter
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loratune.errors import LoratuneError
from loratune.model.adapter.attach import attach_adapter
from loratune.model.architecture import file_layout as architecture_file_layout
from loratune.model.architecture.cache_argument import cache_argument
from loratune.model.architecture.file_layout import FileLayout, Part, file_layout
from loratune.model.architecture.layer_memory import LayerMemory, has_states, layer_memories
from loratune.model.architecture.recurrent import recurrent_modules
from loratune.model.architecture.roles import Role, gated_mlp, linear_modules, module_roles, quantised_matrices
from loratune.model.architecture.structure import (
    decoder_of,
    head_size,
    key_value_heads,
    layer_count,
    output_layer,
    rotates_by_longest,
    text_config,
    text_values,
)
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.model.config import empty_model
from loratune.model.weights.tensor_files import TensorFiles
from loratune.recipe.method_sections import LoraSettings

ROOT = Path(__file__).resolve().parent.parent / "loratune"
NAMES = re.compile(
    r"[qkvo]_proj|gate_proj|up_proj|down_proj|lm_head|embed_tokens|self_attn|\.layers\.|\.experts\b"
    r"|(?<![a-z_])_?model\.model\b"
)
NOTHING = LayerMemory(has_keys=False, has_states=False, window=None, other=None)
KEYS, STATES = NOTHING._replace(has_keys=True), NOTHING._replace(has_states=True)
EXAMPLES = {
    "recipe/section.py": "how names are written in a recipe",
    "recipe/method_sections.py": "examples of values in a setting's help",
    "migration/rules_of_models.py": "values of axolotl's lora_target_parameters",
    "migration/tools/unsloth.py": "the default of unsloth's target_modules",
}
"""Files that name a module to a user, or as another tool's config does, and why."""

OTHER_LAYOUTS = ("qwen3_moe", "mixtral", "qwen3_5")
"""Architectures whose parameters are not their files' tensors."""
PLAIN = ["qwen2", "qwen3", "llama", "mistral"]
"""Families whose parameters are their files' tensors, with all weights in linear modules."""


def test_no_other_module_names_a_part_of_a_model() -> None:
    found = {
        str(path.relative_to(ROOT)): match
        for path in ROOT.rglob("*.py")
        if "model/architecture" not in str(path) and (match := NAMES.search(path.read_text(encoding="utf-8")))
    }
    assert {path: match[0] for path, match in found.items() if path not in EXAMPLES} == {}
    assert found.keys() == EXAMPLES.keys()


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ('TARGETS = ["q_proj"]', True),
        ("hidden = causal.lm_head(states)", True),
        ('if ".layers." in name:', True),
        ("states = self._model.model(ids)", True),
        ("states = model.model(ids)", True),
        ('PREFIX = "base_model.model."', False),
        ('KEYS = ("experts_implementation",)', False),
    ],
)
def test_such_a_name_would_be_found(line: str, is_found: bool) -> None:
    assert bool(NAMES.search(line)) is is_found


@pytest.mark.parametrize(
    ("argument", "forward"),
    [
        ("cache", lambda self, states, cache=None: states),
        ("past_key_values", lambda self, states, past_key_values=None: states),
        ("cache_params", lambda self, states, cache_params=None: states),
        ("", lambda self, states: states),
    ],
)
def test_layers_with_a_state_are_found_by_the_cache_of_any_release(argument: str, forward: Any) -> None:
    layer = type("Mixer", (nn.Module,), {"forward": forward})()
    layer.convolution = nn.Conv1d(2, 2, 3, groups=2)
    assert cache_argument(layer) == argument
    assert list(recurrent_modules(layer)) == [layer] * bool(argument)


@pytest.mark.parametrize("kind", PLAIN)
def test_the_parts_and_sizes_are_those_that_compute(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(kind)).eval()
    seen: dict[str, Any] = {}
    decoder_of(model).register_forward_hook(lambda _, __, output: seen.update(states=output.last_hidden_state))
    output_layer(model).register_forward_hook(lambda _, inputs, output: seen.update(given=inputs[0], made=output))
    output = model(input_ids=torch.arange(5)[None], use_cache=True)
    assert torch.equal(seen["given"], seen["states"])
    assert torch.equal(seen["made"], output.logits)
    keys = [layer.keys for layer in output[cache_argument(model)].layers]
    assert {tuple(layer.shape) for layer in keys} == {(1, key_value_heads(model.config), 5, head_size(model.config))}
    assert len(keys) == layer_count(model.config) == len(layer_memories(model.config))
    assert text_config(model.config) is model.config


@pytest.mark.parametrize("kind", PLAIN)
def test_embedding_and_head_are_found_by_name(kind: str, tiny_model: TinyModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(kind))
    embedding, head = vocabulary_of(name for name, _ in model.named_parameters(remove_duplicate=False))
    assert model.get_parameter(embedding) is model.get_input_embeddings().weight
    assert model.get_parameter(head) is model.get_output_embeddings().weight
    assert vocabulary_of([embedding]) == (embedding, head)
    assert vocabulary_of(load_file(tiny_model(kind) / "model.safetensors")) == (embedding, head)


@pytest.mark.parametrize("kind", PLAIN)
def test_the_attending_modules_are_those_that_call_the_attention(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(kind)).eval()
    callers, plain = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module: Any, *arguments: Any, **settings: Any) -> Any:
        callers.append(module)
        return plain(module, *arguments, **settings)

    AttentionInterface.register("noting_callers", attend)
    model.set_attn_implementation("noting_callers")
    model(input_ids=torch.arange(3)[None])
    below = {id(part) for caller in callers for part in caller.modules() if isinstance(part, nn.Linear)}
    found = {id(model.get_submodule(name)) for name in linear_modules(model, Role.ATTENTION)}
    assert len(callers) == 2
    assert found == below


@pytest.mark.parametrize("kind", PLAIN)
def test_every_linear_module_but_the_head_can_be_a_target(kind: str) -> None:
    model = empty_model(tiny_config(kind))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert linear_modules(model) == linear[:-1]
    assert quantised_matrices(model) == {f"{name}.weight" for name in linear[:-1]}
    assert [module_roles(model)[name] for name in ("model.embed_tokens", "lm_head")] == [Role.EMBEDDING, Role.HEAD]


@pytest.mark.parametrize("kind", PLAIN)
def test_parameters_are_the_tensors_of_the_files(kind: str, tiny_model: TinyModel) -> None:
    files = TensorFiles([tiny_model(kind) / "model.safetensors"])
    layout = file_layout(empty_model(tiny_config(kind)), files.infos)
    assert layout.unused == ()
    assert layout.infos(files.infos) == files.infos
    assert list(layout.infos(files.infos)) == [
        name for name in empty_model(tiny_config(kind)).state_dict() if name in files.infos
    ]
    assert layout.in_files(dict.fromkeys(files.infos, 1), files.infos) == dict.fromkeys(files.infos, 1)


def loaded(folder: Path) -> tuple[Any, FileLayout, TensorFiles]:
    model, files = AutoModelForCausalLM.from_pretrained(folder), TensorFiles([folder / "model.safetensors"])
    return model, file_layout(model, files.infos), files


@pytest.mark.parametrize("kind", OTHER_LAYOUTS)
def test_parameters_that_are_not_the_files_tensors_are_put_together_as_transformers_does(
    kind: str, tiny_model: TinyModel
) -> None:
    model, layout, files = loaded(tiny_model(kind))
    parameters = dict(model.named_parameters())
    assert set(files.infos) != set(parameters)
    assert {name: info.shape for name, info in layout.infos(files.infos).items() if name in parameters} == {
        name: tuple(values.shape) for name, values in parameters.items()
    }
    for name, values in parameters.items():
        assert torch.equal(layout.read(name, files), values), name
    used = [tensor for name in layout.parts for tensor in layout.tensors_of(name)]
    assert sorted([*used, *layout.unused]) == sorted(files.infos)


def test_stacked_experts_are_told_by_their_numbers_and_are_no_tensor_of_the_files(
    tiny_model: TinyModel,
) -> None:
    _, layout, _ = loaded(tiny_model("qwen3_moe"))
    fused, own = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts"
    assert layout.parts[fused] == tuple(
        Part(f"{own}.{number}.{name}.weight", number, place)
        for number in range(4)
        for place, name in enumerate(["gate_proj", "up_proj"])
    )
    with pytest.raises(
        LoratuneError, match=r"made of 8 tensors of the files, first .*experts\.0\.gate_proj.*none equals it"
    ):
        layout.tensor_of(fused)
    assert layout.tensor_of("model.norm.weight") == "model.norm.weight"


def test_experts_keep_their_order_beyond_ten_and_whatever_that_of_the_file_is() -> None:
    model = empty_model(tiny_config("qwen3_moe", num_experts=12))
    names = [f"model.layers.0.mlp.experts.{number}.down_proj.weight" for number in range(12)]
    layout = file_layout(model, sorted(names, reverse=True))
    assert layout.tensors_of("model.layers.0.mlp.experts.down_proj") == names


def test_a_nested_model_s_names_in_the_files_are_found(tiny_model: TinyModel) -> None:
    folder = tiny_model("qwen3_5")
    model, layout, files = loaded(folder)
    embedding, head = vocabulary_of(files.infos)
    assert (embedding, head) == ("model.language_model.embed_tokens.weight", "lm_head.weight")
    assert layout.tensor_of(vocabulary_of(dict(model.named_parameters())).embedding) == embedding
    assert any("visual" in name for name in layout.unused)
    values = json.loads((folder / "config.json").read_text())
    assert text_values(values)["num_hidden_layers"] == layer_count(tiny_config("qwen3_5")) == 2
    assert layer_memories(tiny_config("qwen3_5")) == [STATES, KEYS]
    assert has_states(tiny_config("qwen3_5"))


def test_what_layers_keep_is_what_transformers_caches() -> None:
    window = KEYS._replace(window=32)
    assert layer_memories(tiny_config("gemma3")) == [window, KEYS]
    assert layer_memories(tiny_config("granitemoehybrid")) == [STATES, KEYS]
    kinds = ["sliding_attention", "full_attention"] * 2
    shared = tiny_config("gemma4_text", num_hidden_layers=4, layer_types=kinds, num_kv_shared_layers=2)
    assert layer_memories(shared) == [window, KEYS, NOTHING, NOTHING]
    shared.layer_types = ["of a kind that nobody knows"] * 4
    assert layer_memories(shared) == [NOTHING._replace(other="of a kind that nobody knows")] * 4
    assert not any(has_states(tiny_config(kind)) for kind in ("qwen3", "gpt_oss", "deepseek_v3"))


@pytest.mark.parametrize(
    ("rope", "is_by_longest"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, False),
        ({"rope_type": "dynamic", "factor": 2.0}, True),
        ({"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}}, True),
        (None, False),
    ],
)
def test_angles_that_depend_on_the_longest_row(rope: dict[str, Any] | None, is_by_longest: bool) -> None:
    config = tiny_config("llama")
    config.rope_parameters = rope
    assert rotates_by_longest(config) == is_by_longest


def test_a_parameter_that_is_computed_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = WeightConverter(["w.weight"], ["o_proj.weight"], [Transpose(0, 1)])
    monkeypatch.setattr(architecture_file_layout, "get_model_conversion_mapping", lambda model: [turned])
    name = "model.layers.0.self_attn.w.weight"
    with pytest.raises(LoratuneError, match=f"o_proj.weight: transformers computes it from {name} by Transpose"):
        file_layout(empty_model(tiny_config("qwen2")), [name])


def test_a_parameter_that_is_in_the_files_twice_is_refused() -> None:
    with pytest.raises(LoratuneError, match=r"model\.norm\.weight is in the files twice"):
        file_layout(empty_model(tiny_config("qwen2")), ["model.norm.weight", "norm.weight"])


def test_roles_of_experts_routers_and_layers_with_a_state() -> None:
    mixture = module_roles(empty_model(tiny_config("qwen3_moe")))
    assert mixture["model.layers.0.mlp.experts"] == Role.EXPERTS
    assert mixture["model.layers.0.mlp.gate"] == Role.ROUTER
    hybrid = empty_model(tiny_config("qwen3_5"))
    attending = linear_modules(hybrid, Role.ATTENTION)
    recurrent = [f"model.layers.0.linear_attn.{name}" for name in ("out_proj", "in_proj_qkv", "in_proj_z")]
    assert attending == [*recurrent, *(f"model.layers.1.self_attn.{letter}_proj" for letter in "qkvo")]
    roles = module_roles(hybrid)
    assert {*roles.values()} == {Role.EMBEDDING, Role.HEAD, Role.ATTENTION, Role.MLP, Role.GATE}
    assert roles["model.layers.0.linear_attn.in_proj_a"] == roles["model.layers.0.linear_attn.in_proj_b"] == Role.GATE
    whole = module_roles(AutoModelForImageTextToText.from_config(tiny_config("qwen3_5")))
    assert {name.replace("language_model.", "") for name in whole} == {*roles}


def test_attention_of_a_class_that_does_not_name_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("qwen2"))
    for part in (model, model.model):
        monkeypatch.setattr(type(part), "_can_record_outputs", {})
    told = "the model has no attention, or its class does not declare them; it has all-linear, with q_proj"
    with pytest.raises(LoratuneError, match=told):
        attach_adapter(model, LoraSettings(target_modules="attention"), "base", seed=0)
    with pytest.raises(LoratuneError, match="the model has no mlp"):  # which cannot be told from attention then
        attach_adapter(model, LoraSettings(target_modules="mlp"), "base", seed=0)


def test_of_a_gated_mlp_the_matrix_that_leads_back_is_told_by_its_shape() -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 6)
            self.activation = nn.SiLU()

    assert list(gated_mlp(Renamed())) == [("w1", "w3", "w2"), ("w3", "w1", "w2")]
    assert list(gated_mlp(nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4)))) == []
    scaled = Renamed()
    scaled.activation = nn.RMSNorm(6)  # type: ignore[assignment]
    assert list(gated_mlp(scaled)) == []


def test_the_decoder_is_found_where_the_class_names_a_part_of_a_larger_model() -> None:
    sizes = SIZES | {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48}
    model = empty_model(CONFIG_MAPPING["llama4_text"](**sizes))
    assert model.get_decoder() is model
    assert decoder_of(model) is model.model
    assert {Role.ATTENTION, Role.EXPERTS, Role.ROUTER} <= {*module_roles(model).values()}
