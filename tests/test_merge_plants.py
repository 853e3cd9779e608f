"""Faults planted in what a merge writes: each is noticed, however light the adapter; no right merge is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from misreading import misread_updates
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from test_merge import EMBEDDING, HEAD, make_model, small
from transformers import AutoModelForCausalLM, Qwen2Config
from typer.testing import Result

from loratune.delivery.merge import merge
from loratune.delivery.merge.update import TensorUpdate
from loratune.errors import Exit

Tensors = dict[str, torch.Tensor]
Cli = Callable[..., Result]

STRENGTHS = {"strong": 0.1, "medium": 0.01, "light": 0.0005}
"""Size of the update as a share of the weights'; a light one is less than bfloat16 holds in most places."""
WIDE = {"COLUMNS": "20000"}
DOWN, UP, NORM = "model.layers.2.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
ROW = 5
"""One that lies between those which are computed in float64."""
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:Adapter .* have invalid shape. .*lora_B.bias"),
]


def make_base(folder: Path, tied: bool, dtype: torch.dtype) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "pad_token_id": 2999}
    config = small(Qwen2Config, tie_word_embeddings=tied, **sizes)
    return make_model(folder, config, dtype)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Models by whether they are tied and their type, made when first asked for."""
    folder, made = tmp_path_factory.mktemp("bases"), dict[tuple[bool, torch.dtype], Path]()

    def base(tied: bool = True, dtype: torch.dtype = torch.bfloat16) -> Path:
        if (tied, dtype) not in made:
            made[tied, dtype] = make_base(folder / f"{tied}-{dtype}", tied, dtype)
        return made[tied, dtype]

    return base


def train(base: Path, folder: Path, strength: float, **settings: Any) -> Path:
    """A PEFT folder as training would leave it, each part of which changes the base by the same share."""
    torch.manual_seed(3)
    defaults = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**(defaults | settings))
    )
    with torch.no_grad():
        for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
            is_embedding = bool(layer.lora_embedding_A)
            up = layer.lora_embedding_A["default"] if is_embedding else layer.lora_B["default"].weight
            up.normal_()
            up *= strength * layer.get_base_layer().weight.norm() / layer.get_delta_weight("default").norm()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_A" not in name and ".lora_B.default.weight" not in name:
                size = parameter.square().mean().sqrt().clamp_min(0 if "lora_embedding" in name else 0.02)
                parameter += (0 if "lora_embedding" in name else strength) * size * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def adapters(bases: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Strength → adapter of the tied bfloat16 base."""
    folder = tmp_path_factory.mktemp("adapters")
    return {name: train(bases(), folder / name, strength) for name, strength in STRENGTHS.items()}


# --- what is planted ---


def in_the_file(change: Callable[[Tensors, Tensors], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Change written tensors, given the base's, before anything reads them."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        write = merge.write_merged

        def write_wrong(plan: Any, base: Any, folder: Path, advance: Any) -> None:
            write(plan, base, folder, advance)
            path = folder / "model.safetensors"
            tensors = load_file(path)
            change(tensors, {name: base.tensor(name) for name in base.infos})
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})

        patch.setattr(merge, "write_merged", write_wrong)

    return plant


def in_the_updates(change: Callable[[dict[str, Any]], Any], of_writing: bool = False) -> Any:
    """Change what the adapter was understood as, throughout, or in writing alone."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        write = merge.write_merged

        def write_wrong(plan: Any, *others: Any) -> None:
            updates = {
                name: dataclasses.replace(tensor.update) for name, tensor in plan.tensors.items() if tensor.update
            }
            change(updates)
            tensors = {
                name: dataclasses.replace(tensor, update=updates.get(name)) for name, tensor in plan.tensors.items()
            }
            write(dataclasses.replace(plan, tensors=tensors), *others)

        if of_writing:
            patch.setattr(merge, "write_merged", write_wrong)
        else:
            misread_updates(patch, change)

    return plant


def beside(change: Callable[[Path], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Change what stands beside the weights."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        write = merge.write_model_files

        def write_wrong(source: Any, encoder: Any, base: Path, folder: Path, *others: Any) -> Any:
            changes = write(source, encoder, base, folder, *others)
            change(folder)
            return changes

        patch.setattr(merge, "write_model_files", write_wrong)

    return plant


def values(name: str, **changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Other values in a JSON file."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return beside(change)


def plan_another_type(patch: pytest.MonkeyPatch) -> None:
    plan = merge.plan_merge

    def plan_wrong(base: Any, updates: Any, is_tied: bool, dtype: Any, shard_bytes: int) -> Any:
        return plan(base, updates, is_tied, torch.float32, shard_bytes)

    patch.setattr(merge, "plan_merge", plan_wrong)


def drop_metadata(patch: pytest.MonkeyPatch) -> None:
    write = merge.write_merged

    def write_wrong(plan: Any, base: Any, folder: Path, advance: Any) -> None:
        write(plan, base, folder, advance)
        path = folder / "model.safetensors"
        save_file(load_file(path), path)

    patch.setattr(merge, "write_merged", write_wrong)


def scale(factor: float, only: str | None = None) -> Callable[[dict[str, Any]], None]:
    def change(updates: dict[str, Any]) -> None:
        for name, update in updates.items():
            if only in (None, name):
                update.scaling *= factor

    return change


def turn_down(axis: int) -> Callable[[dict[str, Any]], None]:
    def change(updates: dict[str, Any]) -> None:
        for update in updates.values():
            update.down = update.down.flip(axis)

    return change


def drop(part: str) -> Callable[[dict[str, Any]], None]:
    def change(updates: dict[str, Any]) -> None:
        for name in [name for name in updates if part in name]:
            del updates[name]

    return change


def swap(tensors: Tensors, _: Tensors) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        other = name.replace(".layers.1.", ".layers.2.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def flip_bit(tensors: Tensors, _: Tensors) -> None:
    tensors[NORM].view(torch.int16)[7] ^= 1


class RoundedFirst(TensorUpdate):
    """Its update is rounded before it is added."""

    def apply(self, base: torch.Tensor, start: int) -> torch.Tensor:
        return base + super().apply(torch.zeros_like(base), start).bfloat16().to(base.dtype)


class RoundedTwice(TensorUpdate):
    """The sum is rounded to another type first."""

    between = torch.float16

    def apply(self, base: torch.Tensor, start: int) -> torch.Tensor:
        return super().apply(base, start).to(self.between).to(base.dtype)


class RoundedTwiceCoarsely(RoundedTwice):
    """For a base of float16, which rounding to float16 first would not harm."""

    between = torch.bfloat16


def with_arithmetic_of(kind: type[TensorUpdate]) -> Any:
    return in_the_updates(lambda updates: updates.update({n: kind(**vars(u)) for n, u in updates.items()}), True)


def unsampled(change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Any:
    """Change all rows of a matrix that are not computed in float64."""

    def plant(tensors: Tensors, base: Tensors) -> None:
        for name in (DOWN, UP):
            kept = {round(place) for place in torch.linspace(0, len(tensors[name]) - 1, 16).tolist()}
            rows = [row for row in range(len(tensors[name])) if row not in kept]
            changed = change(tensors[name][rows].float(), base[name][rows].float())
            tensors[name][rows] = changed.to(tensors[name].dtype)

    return in_the_file(plant)


def set_rows(tensors: Tensors, name: str, row: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors[name][row] = change(tensors[name][row])


def swap_merges(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    merges = content["model"]["merges"]
    merges[0], merges[9] = merges[9], merges[0]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def append_to_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8") + "{# more #}", encoding="utf-8")


ROPE = {"rope_type": "default", "rope_theta": 20000.0}
PLANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {  # in the weights
    "a tensor times 1.01": in_the_file(lambda t, _: t.update({DOWN: (t[DOWN].float() * 1.01).to(t[DOWN].dtype)})),
    "a layer's update dropped in writing": in_the_updates(drop(".layers.1."), of_writing=True),
    "a tensor's update doubled in writing": in_the_updates(scale(2, UP), of_writing=True),
    "rounded twice": with_arithmetic_of(RoundedTwice),
    "update rounded first": with_arithmetic_of(RoundedFirst),
    "sign of one value": in_the_file(lambda t, _: set_rows(t, DOWN, (ROW, 3), torch.neg)),
    "one row zeroed": in_the_file(lambda t, _: set_rows(t, DOWN, ROW, torch.zeros_like)),
    "many rows zeroed": unsampled(lambda rows, _: torch.zeros_like(rows)),
    "update dropped in rows": unsampled(lambda _, base: base),
    "update doubled in rows": unsampled(lambda rows, base: 2 * rows - base),
    "one bit of a norm": in_the_file(flip_bit),
    "a norm zeroed": in_the_file(lambda t, _: t[NORM].zero_()),
    "two layers swapped": in_the_file(swap),
    "alpha/r doubled": in_the_updates(scale(2)),
    "alpha/r times 1.02": in_the_updates(scale(1.02)),
    "A reversed": in_the_updates(turn_down(1)),
    "ranks of A reversed": in_the_updates(turn_down(0)),
    "a layer dropped in reading": in_the_updates(drop(".layers.3.")),
    "a tensor dropped in reading": in_the_updates(drop(UP)),
    "a tensor's sign flipped in reading": in_the_updates(scale(-1, UP)),
    "scale of rsLoRA": in_the_updates(scale(8**0.5)),
    "all updates zero": in_the_file(lambda t, base: t.update({name: base[name] for name in t})),
    "another type throughout": plan_another_type,
    "no note of the tensors' library": drop_metadata,
}
BESIDE: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "rope_theta": (values("config.json", rope_parameters=ROPE), "config.json: rope_parameters is"),
    "rms_norm_eps": (values("config.json", rms_norm_eps=1e-2), "config.json: rms_norm_eps is 0.01, and 1e-06 in"),
    "untied": (values("config.json", tie_word_embeddings=False), "config.json: tie_word_embeddings is false, and true"),
    "another type": (values("config.json", dtype="float16"), 'config.json: dtype is "float16"'),
    "merges of the tokenizer": (beside(swap_merges), "tokenizer.json: not that of the base"),
    "no tokenizer.json": (beside(lambda folder: (folder / "tokenizer.json").unlink()), "tokenizer.json: missing"),
    "a longer template": (beside(append_to_template), "chat_template.jinja: not that of the base"),
    "end tokens": (values("generation_config.json", eos_token_id=[7]), "an answer ends at [7] where it should"),
    "another sampling": (values("generation_config.json", temperature=9.0), "generation_config.json: temperature is 9"),
    "an adapter beside the weights": (
        beside(lambda folder: (folder / "adapter_config.json").write_text("{}")),
        "adapter_config.json: left over from something else",
    ),
}
RUN_TOO = {"one bit of a norm", "a tensor dropped in reading", "alpha/r times 1.02"}


def refused(result: Result, output: Path) -> str:
    assert result.exit_code == Exit.MODEL, result.stderr or result.exception
    assert "has been removed" in result.stderr
    assert list(output.parent.iterdir()) == []
    return str(result.stderr)


NOTICED = re.compile("the written file holds|not what PEFT makes of this adapter")


def merge_refused(cli: Cli, base: Path, adapter: Path, output: Path, *flags: str) -> str:
    return refused(cli("merge", "-a", adapter, "-m", base, "-o", output, *flags, env=WIDE), output)


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_noticed_where_the_adapter_does_least(
    cli: Cli, bases: Any, adapters: Any, output: Path, monkeypatch: pytest.MonkeyPatch, plant: str
) -> None:
    PLANTS[plant](monkeypatch)
    assert NOTICED.search(merge_refused(cli, bases(), adapters["light"], output, "--no-logits"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "strength"), [(plant, strength) for plant in PLANTS for strength in ("strong", "medium")]
)
def test_a_planted_fault_is_noticed_at_every_strength(
    cli: Cli, bases: Any, adapters: Any, output: Path, monkeypatch: pytest.MonkeyPatch, plant: str, strength: str
) -> None:
    PLANTS[plant](monkeypatch)
    assert NOTICED.search(
        merge_refused(cli, bases(), adapters[strength], output, *([] if plant in RUN_TOO else ["--no-logits"]))
    )


@pytest.mark.parametrize("plant", BESIDE)
def test_a_fault_beside_the_weights_is_noticed(
    cli: Cli, bases: Any, adapters: Any, output: Path, monkeypatch: pytest.MonkeyPatch, plant: str
) -> None:
    planted, words = BESIDE[plant]
    planted(monkeypatch)
    result = cli("merge", "-a", adapters["strong"], "-m", bases(), "-o", output, "--no-logits", env=WIDE)
    assert words in refused(result, output)


# --- in other parts than matrices of layers ---


def keep_tied(patch: pytest.MonkeyPatch) -> None:
    """A head that has become another matrix than the embedding is forgotten."""
    plan_merge = merge.plan_merge

    def plan_wrong(*arguments: Any) -> Any:
        plan = plan_merge(*arguments)
        tensors = {name: tensor for name, tensor in plan.tensors.items() if name != HEAD}
        shards = {file: [info for info in infos if info.name != HEAD] for file, infos in plan.shards.items()}
        return dataclasses.replace(plan, tensors=tensors, shards=shards, is_tied=True)

    patch.setattr(merge, "plan_merge", plan_wrong)


def times(field: str, factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    def change(updates: dict[str, Any]) -> None:
        for update in updates.values():
            if getattr(update, field) is not None:
                setattr(update, field, getattr(update, field) * factor)

    return in_the_updates(change)


OTHERS: dict[str, tuple[dict[str, Any], Callable[[pytest.MonkeyPatch], None]]] = {
    "DoRA's lengths": ({"use_dora": True}, times("magnitude", 1.001)),
    "DoRA left out": (
        {"use_dora": True},
        in_the_updates(lambda updates: [setattr(update, "magnitude", None) for update in updates.values()]),
    ),
    "biases": ({"bias": "all"}, times("replacement", 1.01)),
    "a bias in B": ({"lora_bias": True, "target_modules": ["q_proj"]}, times("shift", 2)),
    "a saved head": ({"modules_to_save": ["lm_head"]}, times("replacement", 1.01)),
    "rows of tokens": ({"trainable_token_indices": [7, 300, 2999]}, times("row_values", 1.01)),
    "other tokens": (
        {"trainable_token_indices": [7, 300, 2999]},
        in_the_updates(lambda updates: setattr(updates[EMBEDDING], "row_numbers", torch.tensor([7, 301, 2999]))),
    ),
    "an embedding's update": ({"target_modules": ["q_proj", "embed_tokens"]}, in_the_updates(scale(1.02, EMBEDDING))),
    "a head that should be apart": ({"target_modules": ["q_proj", "embed_tokens"]}, keep_tied),
    "alpha of a pattern": ({"alpha_pattern": {"down_proj": 17}}, in_the_updates(scale(16 / 17, DOWN))),
}


@pytest.mark.parametrize("plant", OTHERS)
def test_a_fault_in_any_part_of_an_adapter_is_noticed(
    cli: Cli, bases: Any, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: str
) -> None:
    settings, planted = OTHERS[plant]
    adapter = train(bases(), tmp_path / "adapter", STRENGTHS["light"], **settings)
    planted(monkeypatch)
    assert NOTICED.search(merge_refused(cli, bases(), adapter, output, "--no-logits"))


# --- what is right ---

TARGETS = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 1": {"r": 1},
    "rank 64": {"r": 64, "target_modules": TARGETS},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 7}},
    "biases": {"bias": "all", "target_modules": ["q_proj", "v_proj"]},
    "bias in B": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "one layer": {"layers_to_transform": [2], "target_modules": TARGETS},
    "embedding": {"target_modules": [*TARGETS, "embed_tokens"]},
    "head": {"target_modules": [*TARGETS, "lm_head"]},
    "embedding in full": {"modules_to_save": ["embed_tokens"], "target_modules": TARGETS},
    "head in full": {"modules_to_save": ["lm_head"], "target_modules": TARGETS},
    "tokens": {"trainable_token_indices": [7, 300, 2999], "target_modules": TARGETS},
}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
UNTIED = ["plain", "DoRA", "embedding", "head", "tokens"]
CONVERTED = [(F32, None), (F32, "bfloat16"), (F32, "float16"), (BF16, "float32")]
HONEST = [
    *itertools.product(KINDS, STRENGTHS, [True], [(BF16, None)]),
    *itertools.product(
        ["plain", "DoRA", "embedding", "head", "tokens"], ["light"], [False], [(BF16, None), (F16, None)]
    ),
    *itertools.product(
        ["plain", "DoRA"],
        ["light", "strong"],
        [True],
        [(F32, None), (F32, "bfloat16"), (F32, "float16"), (BF16, "float32")],
    ),
]
QUICK = {("DoRA", "light"), ("embedding", "medium"), ("tokens", "light"), ("bias in B", "strong")}


@pytest.mark.parametrize(
    ("kind", "strength", "tied", "dtypes"),
    [
        pytest.param(*case, marks=[] if case[:2] in QUICK and case[3] == (BF16, None) else [pytest.mark.slow])
        for case in HONEST
    ],
)
def test_a_right_merge_is_never_refused(
    cli: Cli, bases: Any, output: Path, tmp_path: Path, kind: str, strength: str, tied: bool, dtypes: Any
) -> None:
    dtype, written = dtypes
    adapter = train(bases(tied, dtype), tmp_path / "adapter", STRENGTHS[strength], **KINDS[kind])
    flags = ["--dtype", written] if written else []
    result = cli("merge", "-a", adapter, "-m", bases(tied, dtype), "-o", output, *flags, env=WIDE)
    assert result.exit_code == 0, result.stderr or result.exception
    back = json.loads((output / "verification.json").read_text())["read_back"]
    assert back["updated"] > 0
    assert back["largest_error_steps"] <= 0.5
    assert back["largest_forward_error"] < 1e-9
