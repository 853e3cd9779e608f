"""Merges of every family: into the base's own files, proved, and refused where a fault is planted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from misreading import misread_updates
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, MIXTURES, make_tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D
from typer.testing import Result

from loratune.delivery.merge import merge
from loratune.delivery.merge.merged_weights import MergePlan, plan_merge, write_merged
from loratune.delivery.merge.update import TensorUpdate, read_updates
from loratune.delivery.verification.noise import ALLOWED, bounds_of_noise, noise_of
from loratune.delivery.verification.parity import _logits, compare_models
from loratune.delivery.verification.proof import EXACT, check_parity
from loratune.delivery.verification.read_back import read_back
from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.attach import load_adapter
from loratune.model.adapter.peft_merge import Change
from loratune.model.adapter.peft_stacks import StackRows
from loratune.model.architecture.file_layout import FileLayout, file_layout, prediction_tensors
from loratune.model.architecture.roles import expert_stacks, transposed_matrices
from loratune.model.architecture.structure import causal_model
from loratune.model.from_folder import load_from_folder, load_plain
from loratune.model.weights import mapped, reference
from loratune.model.weights.mapped import load_mapped
from loratune.model.weights.rounding import Rounding, rounded_as
from loratune.model.weights.tensor_files import TensorFiles
from loratune.runs.probe import ProbeRow

Cli = Callable[..., Result]
Models = Callable[..., Path]
Tensors = dict[str, torch.Tensor]

WEIGHTS = "model.safetensors"
USUAL = ("qwen3_5_moe", "qwen3_moe", "gemma3", "cohere2")
"""Nested files with unused tensors, a tensor per expert, scaled embeddings, scaled logits."""
STACKS = ("qwen3_moe", "qwen3_5_moe", "qwen3_next", "gpt_oss")
"""Mixtures with a tensor per expert, with stacks, with both parts of a layer's state, and with transposed stacks."""
FAMILIES = [kind if kind in USUAL else pytest.param(kind, marks=pytest.mark.slow) for kind in CONFIGS]
LAID_OUT = [kind if kind in STACKS[:2] else pytest.param(kind, marks=pytest.mark.slow) for kind in STACKS]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Folder of a tiny model of a family, made when first asked for."""
    folder, made = tmp_path_factory.mktemp("models"), dict[tuple[str, torch.dtype], Path]()

    def model(kind: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        if (kind, dtype) not in made:
            made[kind, dtype] = make_tiny_model(kind, folder / f"{kind}-{dtype}", dtype)
        return made[kind, dtype]

    return model


def targets_of(model: Any) -> list[str]:
    """Full names of the linear modules of the attention, or of what stands in for it, in the text's layers."""
    parts = (".self_attn.", ".linear_attn.", ".attn.", ".mamba.", ".conv.")
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and any(part in name for part in parts)
        and "vis" not in name
        and name.rpartition(".")[2] not in ("in_proj_a", "in_proj_b", "in_proj_ba")
    ]


def with_random_values(peft: Any, strength: float = 0.05) -> Any:
    """Let each update have the same share of its weights' size."""
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in [module for module in peft.modules() if hasattr(module, "get_delta_weight")]:
            held = layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight
            layer.lora_B["default"].weight.normal_()
            layer.lora_B["default"].weight *= strength * held.norm() / layer.get_delta_weight("default").norm()
    return peft.eval()


def adapter_of(base: Path, folder: Path) -> Any:
    """Write a plain PEFT adapter of a model's attention; returns PEFT's float32 model."""
    model = load_plain(base).float()
    names = targets_of(model)
    is_turned = isinstance(model.get_submodule(names[0]), Conv1D)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=names, fan_in_fan_out=is_turned)
    peft = with_random_values(get_peft_model(model, config))
    peft.save_pretrained(folder, save_embedding_layers=False)
    return peft


def layout_of(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(values.shape), values.dtype) for name, values in load_file(path / WEIGHTS).items()}


def failed(result: Result, output: Path) -> str:
    """The message of a merge that was refused, and left nothing."""
    assert result.exit_code == Exit.MODEL, result.stderr or result.exception
    assert not output.exists()
    return str(result.stderr)


# --- whole merges ---


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_merge_has_the_base_s_layout_and_peft_s_values(
    cli: Cli, models: Models, tmp_path: Path, kind: str, dtype: str
) -> None:
    base, output = models(kind), tmp_path / "merged"
    expected = adapter_of(base, tmp_path / "adapter").merge_and_unload()
    result = cli("merge", "-a", tmp_path / "adapter", "--base-model", base, "-o", output, "--dtype", dtype)
    assert result.exit_code == 0, result.stderr

    shapes, written = layout_of(base), getattr(torch, dtype)
    assert layout_of(output) == {name: (shape, written) for name, (shape, _) in shapes.items()}
    before, after = load_file(base / WEIGHTS), load_file(output / WEIGHTS)
    model = load_plain(output)  # as transformers maps the files to parameters
    found = model.state_dict()
    step = torch.finfo(written).eps
    for name, values in expected.state_dict().items():
        torch.testing.assert_close(found[name].float(), values.to(written).float(), rtol=step, atol=step * 1e-2)
    report = json.loads((output / "verification.json").read_text())
    changed = [name for name, values in after.items() if not torch.equal(values, before[name].to(written))]
    assert len(changed) == report["read_back"]["updated"] == len(targets_of(model))
    assert report["logits_with_rounding"]["original"]["largest_difference"] <= (
        report["bounds"]["difference"] * max(1, report["logits"]["original"]["largest_logit"])
    )


def test_unused_tensors_stay_and_the_head_for_further_tokens_is_told(cli: Cli, models: Models, tmp_path: Path) -> None:
    base, output = models("qwen3_5_moe"), tmp_path / "merged"
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (base / name).write_text(json.dumps({"image_processor_type": name}))
    adapter_of(base, tmp_path / "adapter")
    result = cli("merge", "-a", tmp_path / "adapter", "--base-model", base, "-o", output, "--no-logits")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("for the prediction of further tokens") == 1
    assert "3 tensors for the prediction of further tokens, such as mtp.fc.weight, stay the base's" in result.stderr
    before, after = load_file(base / WEIGHTS), load_file(output / WEIGHTS)
    unused = [name for name in before if name.startswith(("mtp.", "model.visual."))]
    assert len(unused) == 24
    assert all(torch.equal(before[name], after[name]) for name in unused)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert (output / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["mtp.fc.weight", "mtp.layers.0.input_layernorm.weight"], 2),
        (["model.layers.4.eh_proj.weight", "model.layers.3.input_layernorm.weight"], 1),
        (["model.visual.blocks.9.attn.qkv.weight", "model.rotary_emb.inv_freq"], 0),
    ],
)
def test_tensors_for_the_prediction_of_further_tokens_are_known(names: list[str], expected: int) -> None:
    assert prediction_tensors(names, 4) == names[:expected]


OTHER_PARTS: dict[str, dict[str, Any]] = {
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "LoRA on the head": {"target_modules": ["q_proj", "in_proj_qkv", "lm_head"]},
    "rows of tokens": {"trainable_token_indices": [7, 300]},
    "lengths": {"use_dora": True},
}
NESTED = [
    ("qwen3_5", "a head of its own"),
    *(
        pytest.param(kind, part, marks=pytest.mark.slow)
        for kind in ("qwen3_5", "gemma3", "qwen3_vl", "qwen3_5_moe", "cohere2", "gemma4_text")
        for part in OTHER_PARTS
        if (kind, part) != ("qwen3_5", "a head of its own")
    ),
]


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
@pytest.mark.parametrize(("kind", "part"), NESTED)
def test_other_parts_of_an_adapter_are_merged_into_any_layout(
    cli: Cli, models: Models, tmp_path: Path, kind: str, part: str
) -> None:
    settings = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "in_proj_qkv"]} | OTHER_PARTS[part]
    model = load_from_folder(models(kind), dtype=torch.float32, attn_implementation="sdpa")
    peft = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    output = tmp_path / "merged"
    result = cli("merge", "-a", tmp_path / "adapter", "--base-model", models(kind), "-o", output, "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        wanted, found = (model.eval()(input_ids=ids, use_cache=False).logits for model in (peft, load_plain(output)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


# --- what is planted in whole merges ---


def in_the_file(change: Callable[[Tensors], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Change what was written, before anything reads it."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        write = merge.write_merged

        def write_wrong(plan: Any, base: Any, folder: Path, advance: Any) -> None:
            write(plan, base, folder, advance)
            tensors = load_file(folder / WEIGHTS)
            change(tensors)
            save_file(tensors, folder / WEIGHTS, {"format": "pt"})

        patch.setattr(merge, "write_merged", write_wrong)

    return plant


def leave_out_of_the_plan(patch: pytest.MonkeyPatch) -> None:
    plan_merge = merge.plan_merge

    def plan_wrong(*arguments: Any) -> MergePlan:
        plan = plan_merge(*arguments)
        tensors = {name: one for name, one in plan.tensors.items() if not name.startswith("mtp.")}
        shards = {file: [info for info in infos if info.name in tensors] for file, infos in plan.shards.items()}
        return dataclasses.replace(plan, tensors=tensors, shards=shards)

    patch.setattr(merge, "plan_merge", plan_wrong)


def take_another_prefix(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FileLayout, "in_files", lambda _, changes, __: dict(changes))


def exchange_processors(patch: pytest.MonkeyPatch) -> None:
    write = merge.write_model_files

    def write_wrong(source: Any, encoder: Any, base: Path, folder: Path, *others: Any) -> Any:
        changes = write(source, encoder, base, folder, *others)
        (folder / "preprocessor_config.json").write_text("{}")
        return changes

    patch.setattr(merge, "write_model_files", write_wrong)


PLANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "tensors left out of the file": (in_the_file(lambda t: t.pop("mtp.fc.weight")), "holds other tensors than"),
    "tensors left out of the plan": (leave_out_of_the_plan, "mtp.fc.weight was not written"),
    "a vision tensor": (
        in_the_file(lambda t: t["model.visual.pos_embed.weight"][3].neg_()),
        "model.visual.pos_embed.weight: the written file holds other values than the base",
    ),
    "a stack of experts": (
        in_the_file(lambda t: t["model.language_model.layers.1.mlp.experts.down_proj"][2, 5].neg_()),
        "experts.down_proj: the written file holds other values than the base",
    ),
    "names without the prefix": (
        in_the_file(lambda t: t.update({n.replace("language_model.", ""): t.pop(n) for n in list(t)})),
        "holds other tensors than",
    ),
    "updates by the names in memory": (take_another_prefix, "was not changed, and PEFT changes it"),
    "another processor": (exchange_processors, "preprocessor_config.json: not that of the base"),
}


@pytest.fixture(scope="module")
def nested(models: Models, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Base and adapter of a mixture in the files of a model that reads images."""
    base, folder = models("qwen3_5_moe"), tmp_path_factory.mktemp("nested")
    (base / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "of the base"}))
    adapter_of(base, folder)
    return base, folder


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_noticed(
    cli: Cli, nested: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: str
) -> None:
    base, adapter = nested
    planted, words = PLANTS[plant]
    planted(monkeypatch)
    result = cli("merge", "-a", adapter, "--base-model", base, "-o", tmp_path / "merged", "--no-logits")
    assert words in failed(result, tmp_path / "merged")


def drop_one(updates: dict[str, TensorUpdate]) -> None:
    del updates[sorted(updates)[1]]


def halve_one(updates: dict[str, TensorUpdate]) -> None:
    updates[sorted(updates)[0]].scaling *= 0.5


def drop_all(updates: dict[str, TensorUpdate]) -> None:
    for update in updates.values():
        update.scaling *= 1e-9


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "qwen3_moe"])
@pytest.mark.parametrize("change", [drop_one, halve_one, drop_all])
def test_the_models_alone_tell_a_wrong_merge(
    cli: Cli, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, change: Any
) -> None:
    adapter_of(models(kind), tmp_path / "adapter")
    misread_updates(monkeypatch, change)
    monkeypatch.setattr(merge, "read_back", lambda *_: None)
    result = cli("merge", "-a", tmp_path / "adapter", "--base-model", models(kind), "-o", tmp_path / "merged")
    assert "the merged model is not what base + adapter is" in failed(result, tmp_path / "merged")


@pytest.mark.parametrize("kind", ["cohere2", "minicpm3", "gemma2"])
def test_logits_are_compared_as_the_model_scales_and_caps_them(
    cli: Cli, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model, row = load_mapped(models(kind)), ProbeRow(list(range(9)), list(range(9)))
    with torch.inference_mode():
        expected = model(input_ids=torch.arange(9)[None], use_cache=False).logits[0, :-1]
    assert torch.equal(torch.cat(list(_logits(model, [row]))), expected)
    if kind != "cohere2":
        return
    adapter_of(models(kind), tmp_path / "adapter")
    write = merge.write_model_files

    def write_wrong(source: Any, encoder: Any, base: Path, folder: Path, *others: Any) -> Any:
        changes = write(source, encoder, base, folder, *others)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"logit_scale": 1.0}))
        return changes

    monkeypatch.setattr(merge, "write_model_files", write_wrong)
    monkeypatch.setattr(merge, "check_beside", lambda *_: None)
    result = cli("merge", "-a", tmp_path / "adapter", "--base-model", models(kind), "-o", tmp_path / "merged")
    assert "the merged model is not what base + adapter is" in failed(result, tmp_path / "merged")


# --- stacks of matrices ---


@dataclasses.dataclass
class Mixture:
    """A mixture with an adapter on its stacks, as PEFT reads it, and as updates of parameters."""

    base: Path
    peft: Any
    layout: FileLayout
    files: TensorFiles
    updates: dict[str, TensorUpdate]
    changes: dict[str, Change]

    def plan(self) -> MergePlan:
        updates = self.layout.in_files(self.updates, self.files.infos)
        return plan_merge(self.files, updates, False, None, 10**9)

    def read_back(self, folder: Path, plan: MergePlan) -> Any:
        changes = self.layout.in_files(self.changes, self.files.infos)
        peft: Any = SimpleNamespace(changes=changes, is_tied=False)
        return read_back(plan, peft, self.files, folder, lambda _: None)


def wrappers_of(peft: Any) -> Iterator[tuple[str, Any]]:
    """Name of each adapted parameter, and PEFT's layer."""
    places = {id(module): name for name, module in peft.get_base_model().named_modules()}
    for module in list(peft.modules()):
        if hasattr(module, "parameter_name"):
            path = places[id(module.get_base_layer())].replace(".base_layer", "")
            yield f"{path}.{module.parameter_name}", module


@pytest.fixture
def mixture(models: Models, request: pytest.FixtureRequest) -> Mixture:
    base = models(request.param, torch.float32)
    model, files = load_plain(base), TensorFiles([base / WEIGHTS])
    layout, stacks = file_layout(model, files.infos), sorted(expert_stacks(model))
    assert {name.rpartition(".")[2] for name in stacks} == {"gate_up_proj", "down_proj"}
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=[], target_parameters=stacks)
    peft = with_random_values(get_peft_model(model, config))
    updates = {}
    for name, layer in wrappers_of(peft):
        up, down, scaling = layer.get_delta_factors("default")
        updates[name] = TensorUpdate(up=up.detach().clone(), down=down.detach().clone(), scaling=scaling)
    assert sorted(updates) == stacks
    changes = {name: Change(lora=StackRows(layer, "default")) for name, layer in wrappers_of(peft)}
    return Mixture(base, peft, layout, files, updates, changes)


@pytest.mark.parametrize("mixture", LAID_OUT, indirect=True)
def test_updates_of_stacks_become_updates_of_the_files_tensors(mixture: Mixture, tmp_path: Path) -> None:
    plan = mixture.plan()
    write_merged(plan, mixture.files, tmp_path, lambda _: None)
    assert layout_of(tmp_path) == layout_of(mixture.base)
    found = mixture.read_back(tmp_path, plan)
    assert found.updated == len(
        [name for name in load_file(mixture.base / WEIGHTS) if ".experts." in name and "bias" not in name]
    )

    for path in mixture.base.iterdir():
        if path.name != WEIGHTS:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    merged, expected = dict(load_plain(tmp_path).named_parameters()), dict(load_plain(mixture.base).named_parameters())
    for name, update in mixture.updates.items():
        product = update.scaling * update.up.double() @ update.down.double()  # type: ignore[union-attr]
        torch.testing.assert_close(merged[name].double(), expected[name].double() + product, rtol=1e-6, atol=1e-7)
    kept = merged.keys() - mixture.updates.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in kept)
    unloaded = dict(mixture.peft.merge_and_unload().named_parameters())
    for name, values in merged.items():
        torch.testing.assert_close(values, unloaded[name], rtol=1e-5, atol=1e-6)


def exchange(first: Any, second: Any) -> None:
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


def drop_a_matrix(update: TensorUpdate) -> None:
    update.up[0] = 0  # type: ignore[index]


def move_to_the_neighbour(update: TensorUpdate) -> None:
    update.up, update.down = update.up.roll(1, 0), update.down.roll(1, 0)  # type: ignore[union-attr]


def exchange_halves(update: TensorUpdate) -> None:
    half = update.up.shape[1] // 2  # type: ignore[union-attr]
    update.up = update.up.roll(half, 1)  # type: ignore[union-attr]


WRONG = (drop_a_matrix, move_to_the_neighbour, exchange_halves)


@pytest.mark.parametrize("change", WRONG)
@pytest.mark.parametrize("mixture", LAID_OUT, indirect=True)
def test_a_wrong_update_of_a_stack_is_noticed_in_the_files(mixture: Mixture, tmp_path: Path, change: Any) -> None:
    change(mixture.updates[min(name for name in mixture.updates if "gate_up" in name)])
    plan = mixture.plan()
    write_merged(plan, mixture.files, tmp_path, lambda _: None)
    with pytest.raises(LoratuneError, match=r"holds (row|matrix) \d+ wrongly, \S+ rounding steps away"):
        mixture.read_back(tmp_path, plan)


@pytest.mark.parametrize("mixture", LAID_OUT, indirect=True)
def test_the_models_tell_a_wrong_update_of_a_stack_from_a_right_one(mixture: Mixture, tmp_path: Path) -> None:
    mixture.peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ours = PeftModel.from_pretrained(load_mapped(mixture.base), tmp_path / "adapter").eval()
    reference._update_stacks(ours)
    rows = rows_of(40, 30)
    parities = {}
    for change in (None, *WRONG):
        folder = tmp_path / str(change and change.__name__)
        folder.mkdir()
        wrong = {name: dataclasses.replace(update) for name, update in mixture.updates.items()}
        first = wrong[min(name for name in wrong if "gate_up" in name)]
        first.up = first.up.clone()  # type: ignore[union-attr]
        if change:
            change(first)
        plan = dataclasses.replace(mixture, updates=wrong).plan()
        write_merged(plan, mixture.files, folder, lambda _: None)
        for path in mixture.base.iterdir():
            if path.name != WEIGHTS:
                (folder / path.name).write_bytes(path.read_bytes())
        (parities[change],) = compare_models(ours, [load_mapped(folder)], rows)
    assert check_parity(parities.pop(None), EXACT) == []
    assert [change for change, parity in parities.items() if not check_parity(parity, EXACT)] == [], parities
    (peft,) = compare_models(mixture.peft, [ours], rows)
    assert check_parity(peft, EXACT) == []


def rows_of(*lengths: int) -> list[ProbeRow]:
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(0, 3000, (length,), generator=generator).tolist() for length in lengths]
    return [ProbeRow(row, row) for row in ids]


def stacks_adapter_of(base: Path, folder: Path) -> Any:
    """Write a plain PEFT adapter of a mixture's attention and stacks; returns PEFT's float32 model."""
    model = load_plain(base).float()
    stacks = [name for name, values in model.named_parameters() if ".experts." in name and values.ndim == 3]
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets_of(model), target_parameters=stacks)
    peft = with_random_values(get_peft_model(model, config))
    peft.save_pretrained(folder, save_embedding_layers=False)
    return peft


def test_dora_on_transposed_matrices_is_refused_with_each_of_them_once(models: Models, tmp_path: Path) -> None:
    base = models("gpt2")
    config = LoraConfig(r=2, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True)
    get_peft_model(load_plain(base), config).save_pretrained(tmp_path)
    infos, model = TensorFiles([base / WEIGHTS]).infos, load_plain(base)
    infos = file_layout(model, infos).infos(infos)
    with pytest.raises(LoratuneError) as raised:
        read_updates(tmp_path, infos, True, transposed_matrices(model))
    assert str(raised.value).partition("nothing is merged:\n")[2].splitlines() == [
        f"  transformer.h.{layer}.attn.c_attn.weight: DoRA on a transposed matrix cannot be merged" for layer in (0, 1)
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "kind", [kind if kind in STACKS[:2] else pytest.param(kind, marks=pytest.mark.slow) for kind in MIXTURES]
)
def test_an_adapter_of_stacks_is_merged_as_peft_does(
    cli: Cli, models: Models, tmp_path: Path, kind: str, dtype: str
) -> None:
    base, output = models(kind), tmp_path / "merged"
    expected = stacks_adapter_of(base, tmp_path / "adapter").merge_and_unload().state_dict()
    result = cli("merge", "-a", tmp_path / "adapter", "--base-model", base, "-o", output, "--dtype", dtype)
    assert result.exit_code == 0, result.stderr
    written = getattr(torch, dtype)
    assert layout_of(output) == {name: (shape, written) for name, (shape, _) in layout_of(base).items()}
    step = torch.finfo(written).eps
    for name, values in load_plain(output).state_dict().items():
        wanted = expected[name].to(written).float()
        torch.testing.assert_close(values.float(), wanted, rtol=step, atol=step * 1e-2)


def drop_the_stack_s_update(updates: dict[str, TensorUpdate]) -> None:
    del updates[min(name for name in updates if ".experts." in name)]


def move_all_to_the_neighbours(updates: dict[str, TensorUpdate]) -> None:
    move_to_the_neighbour(updates[min(name for name in updates if "experts.gate_up" in name)])


def exchange_all_halves(updates: dict[str, TensorUpdate]) -> None:
    exchange_halves(updates[min(name for name in updates if "experts.gate_up" in name)])


@pytest.mark.parametrize("kind", LAID_OUT[:2])
@pytest.mark.parametrize("flags", [("--no-logits",), ()])
@pytest.mark.parametrize("change", [drop_the_stack_s_update, move_all_to_the_neighbours, exchange_all_halves])
def test_a_stack_s_update_in_the_wrong_place_is_noticed(
    cli: Cli, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, flags: Any, change: Any
) -> None:
    stacks_adapter_of(models(kind), tmp_path / "adapter")
    misread_updates(monkeypatch, change)
    if not flags:  # the models tell it too
        monkeypatch.setattr(merge, "read_back", lambda *_: None)
    output = tmp_path / "merged"
    result = cli("merge", "-a", tmp_path / "adapter", "--base-model", models(kind), "-o", output, *flags)
    words = ("is not what base + adapter is",) if not flags else ("PEFT's", "not what PEFT makes of this adapter")
    told = failed(result, output)
    assert any(one in told for one in words), told


# --- computing in float32 from mapped files ---


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_mapped_model_computes_what_transformers_does_in_float32(
    models: Models, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    expected = type(load_plain(models(kind))).from_pretrained(models(kind), dtype=torch.float32).eval()
    monkeypatch.setattr(mapped, "RESIDENT_BYTES", 0)
    ids = torch.randint(0, 3000, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = expected(input_ids=ids, use_cache=False).logits
        found = load_mapped(models(kind))(input_ids=ids, use_cache=False).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


def test_no_stack_is_put_together(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[str]()
    monkeypatch.setattr(FileLayout, "read", lambda self, name, files: (read.append(name), READ(self, name, files))[1])
    monkeypatch.setattr(mapped, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(mapped, "load_plain", lambda _: pytest.fail("transformers puts stacks together"))
    for in_float32 in (True, False):
        model = load_mapped(models("qwen3_moe"), in_float32)
        taken = list[int]()
        for module in model.modules():
            for stack in getattr(module, "stacks", {}).values():
                monkeypatch.setattr(stack, "read", counting(stack.read, taken))
        with torch.inference_mode():
            model(input_ids=torch.tensor([[5]]), use_cache=False)
        assert len(taken) == 2 * 2 * 2  # layers, experts of the token, stacks
    assert not any("experts" in name for name in read)


READ = FileLayout.read


def counting(read: Callable[[int], torch.Tensor], taken: list[int]) -> Callable[[int], torch.Tensor]:
    def noted(number: int) -> torch.Tensor:
        taken.append(number)
        return read(number)

    return noted


# --- bounds from noise ---


def test_noise_allows_right_merges_and_not_the_base_alone(models: Models, tmp_path: Path) -> None:
    base, rows = models("qwen3_5_moe_text"), rows_of(60, 40, 50)
    merged = adapter_of(base, tmp_path / "adapter").merge_and_unload().eval()
    ours = load_adapter(load_mapped(base), tmp_path / "adapter", keep_dtype=True)
    roundings = {f"{name}.weight": Rounding(torch.float32) for name in targets_of(merged)}
    noise = noise_of(ours, merged, roundings, rows)
    assert len({one.largest_difference for one in noise}) == len(noise) > 1
    assert noise_of(ours, merged, roundings, rows) == noise, "the noise is the same each time"
    bounds = bounds_of_noise(noise)
    right, alone = compare_models(ours, [merged, load_mapped(base)], rows)
    assert check_parity(right, bounds) == []
    assert check_parity(alone, bounds)
    measured = ALLOWED * max(one.largest_difference / one.largest_logit for one in noise)
    assert right.largest_difference / right.largest_logit < measured < 1e-3
    assert bounds_of_noise([dataclasses.replace(right, largest_difference=0.0)]) == EXACT


@pytest.mark.parametrize("width", [32, 2048])
def test_noise_is_what_two_right_sums_of_a_layer_differ_by(tmp_path: Path, width: int) -> None:
    """Whatever their length: float32 rounds a sum of 2,048 products by more than it rounds a weight."""
    base = make_tiny_model("qwen2", tmp_path / "base", hidden_size=width, num_hidden_layers=1)
    merged = adapter_of(base, tmp_path / "adapter").merge_and_unload()
    ours = load_adapter(load_mapped(base), tmp_path / "adapter", keep_dtype=True)
    name, inputs = "model.layers.0.self_attn.q_proj", torch.randn(50, width)
    layer = causal_model(ours).get_submodule(name)
    with torch.inference_mode():
        apart = (merged.get_submodule(name)(inputs) - (without := layer(inputs))).norm()
        for run in range(3):
            with rounded_as(ours, {f"{name}.weight": Rounding(torch.float32, seed=(run, 0))}):
                assert apart / 2 < (layer(inputs) - without).norm() < 2 * apart


def test_a_merge_that_needs_other_bounds_says_where_they_come_from(
    cli: Cli, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight = dataclasses.replace(EXACT, difference=1e-9)
    for module in ("verify", "noise"):
        monkeypatch.setattr(f"loratune.delivery.verification.{module}.EXACT", tight)
    adapter_of(models("qwen3_5_moe"), tmp_path / "adapter")
    output = tmp_path / "merged"
    result = cli("merge", "-a", tmp_path / "adapter", "--base-model", models("qwen3_5_moe"), "-o", output)
    assert result.exit_code == 0, result.stderr
    report = json.loads((output / "verification.json").read_text())
    largest = max(one["largest_difference"] / one["largest_logit"] for one in report["noise"])
    assert report["bounds"]["difference"] == pytest.approx(ALLOWED * largest)
    assert f"largest difference {ALLOWED * largest:.1e} of the largest logit" in result.stderr
    assert "from what rounding alone does to this model in 3 runs" in result.stderr
