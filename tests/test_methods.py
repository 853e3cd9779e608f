"""Full tuning and freezing: the same steps as a plain AdamW loop, and a run folder that every command takes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, TinyModel
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS
from transformers import AutoModelForCausalLM
from typer.testing import Result

from loratune.data.encoding.encoder import Encoder
from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.attach import load_adapter, save_adapter
from loratune.model.adapter.own_parameters import BASE, own_parameters
from loratune.model.adapter.own_weights import in_base_dtype, resolve_weights, train_weights, trained_weights
from loratune.model.architecture.file_layout import parameter_infos
from loratune.model.from_folder import load_plain
from loratune.model.kernels.linear_cross_entropy import add_labelled_loss
from loratune.model.tokenizer import load_tokenizer
from loratune.protocols import AdaptedModel
from loratune.recipe.advice import advise
from loratune.recipe.loading import load_recipe
from loratune.recipe.sections import PromptSettings, Recipe
from loratune.training.probes.gradients import check_gradients
from loratune.training.probes.passes import padded

Cli = Callable[..., Result]
IDS = torch.tensor([[5, 6, 7, 8, 200, 300, 41, 40]])
STEPS, RATE, DECAY = 4, 1e-3, 0.1
TRAINED = {
    "full": (["--method", "full"], lambda name: True),
    "layers": (["--method", "freeze", "--freeze.layers", "last 1"], lambda name: ".layers.1." in name),
    "modules": (
        ["--method", "freeze", "--freeze.layers", "first 1", "--freeze.modules", "mlp,model.norm", "--freeze.modules",
         r".*\.q_proj"],
        lambda name: "model.norm" in name or (".layers.0." in name and (".mlp." in name or ".q_proj." in name)),
    ),
}  # fmt: skip
QUICK = ("qwen3_5", "qwen3_moe", "gpt_oss", "gpt2")
"""Those of the default run: recurrent layers, experts in other layouts, biases of stacks, and transposed matrices."""
KINDS = [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in CONFIGS]


def recipe_of(**settings: Any) -> Recipe:
    return Recipe.model_validate({"model": {"base": "x"}, "data": {"train": ["a.json"]}} | settings)


def in_place(folder: Path, **settings: Any) -> AdaptedModel:
    """A model whose own weights are trained."""
    model = load_plain(folder)
    return train_weights(model, resolve_weights(model, recipe_of(**settings), parameter_infos(folder)), "base")


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def base_of(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


@pytest.fixture
def sft(cli: Cli, random_qwen: Path, rows_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make steps of all rows at a constant rate, into a folder of tmp_path."""

    def run(name: str, *flags: Any) -> Path:
        result = cli(
            "sft", "--model.base", random_qwen, "--model.dtype", "float32", "--data.train", rows_file,
            "--training.learning_rate", RATE, "--training.scheduler", "constant", "--training.warmup", 0,
            "--training.weight_decay", DECAY, "--training.max_steps", STEPS, "--training.batch_size", len(ROWS),
            "--output", tmp_path / name, *(() if "--data.validation" in flags else ("--data.validation", 0)), *flags,
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        return tmp_path / name

    return run


def trained_by_hand(folder: Path, is_trained: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """The weights after the same steps, in a loop of plain torch over one row after another."""
    model = base_of(folder, dtype=torch.float32).train()
    named = {name: weight for name, weight in model.named_parameters() if is_trained(name)}
    groups = [
        {"params": [weight for weight in named.values() if (weight.ndim > 1) == decays], "weight_decay": decay}
        for decays, decay in ((True, DECAY), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    encoder = Encoder(load_tokenizer(folder), PromptSettings())
    examples = []
    for row in ROWS:
        asked = encoder.prompt_ids([{"role": "user", "content": row["instruction"]}])
        answer = encoder.answer_ids(row["output"])
        examples.append((torch.tensor([asked + answer]), len(asked)))
    labelled = sum(ids.shape[1] - start for ids, start in examples)
    for _ in range(STEPS):
        for ids, start in examples:
            logits = model(input_ids=ids).logits[0, start - 1 : -1]
            (torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum") / labelled).backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        model.zero_grad()
    return {name: weight.detach() for name, weight in named.items()}


def norm(tensors: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


@pytest.mark.parametrize("method", ["full", "modules", pytest.param("layers", marks=pytest.mark.slow)])
def test_a_run_takes_the_steps_of_a_plain_loop_and_is_merged_as_peft_reads_it(
    sft: Callable[..., Path], cli: Cli, random_qwen: Path, tmp_path: Path, method: str
) -> None:
    flags, is_trained = TRAINED[method]
    run = sft("run", *flags)
    expected, before = trained_by_hand(random_qwen, is_trained), dict(base_of(random_qwen).named_parameters())
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    found = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    if method == "full":
        assert torch.equal(found.pop("lm_head.weight"), found["model.embed_tokens.weight"])  # tied
    assert found.keys() == expected.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    change = norm(expected[name] - before[name].detach() for name in expected)
    assert norm(found[name] - expected[name] for name in expected) < 1e-5 * change

    assert cli("merge", "--adapter", run, "--output", tmp_path / "merged").exit_code == 0
    merged = dict(base_of(tmp_path / "merged").named_parameters())
    for name, weight in merged.items():
        assert torch.equal(weight, found[name] if is_trained(name) else before[name]), name
    by_peft = PeftModel.from_pretrained(base_of(random_qwen), str(run / "adapter"))
    assert torch.equal(logits_of(by_peft), logits_of(base_of(tmp_path / "merged")))
    card, merged_card = ((folder / "README.md").read_text() for folder in (run / "adapter", tmp_path / "merged"))
    assert "Trained weights for" in card
    assert "- lora\n" not in card
    assert "LoRA adapter" not in card + merged_card
    assert load_recipe(str(run / "recipe.yaml"), {}).method == flags[1]


def test_answers_of_a_run_are_those_of_the_merged_model(
    sft: Callable[..., Path], cli: Cli, random_qwen: Path, tmp_path: Path
) -> None:
    run = sft("run", "--method", "full", "--training.learning_rate", "2e-2", "--training.max_steps", 12)
    assert cli("merge", "--adapter", run, "--output", tmp_path / "merged").exit_code == 0
    asked = ("--prompt", "How much is 3+3?", "--max-new-tokens", 12)
    told, merged, base = (
        cli("infer", *model, *asked).stdout
        for model in (("--adapter", run), ("--model", tmp_path / "merged"), ("--adapter", run, "--base"))
    )
    assert told == merged != base
    health = json.loads((run / "report.json").read_text())["health"]
    assert all(one["has_changed"] for one in health["answers"]["told"])
    assert health["updates"]["q_proj"]["modules"] == 2
    assert health["updates"]["norm"]["unchanged"] == []


def test_masters_are_float32_whatever_the_base_is_in(sft: Callable[..., Path], random_qwen: Path) -> None:
    run = sft(
        "run", "--method", "full", "--model.dtype", "bfloat16", "--training.learning_rate", "1e-6",
        "--training.weight_decay", 0, "--data.validation", "0.2",
    )  # fmt: skip
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    before = base_of(random_qwen, dtype=torch.bfloat16)
    moved = 0
    for name, weight in before.requires_grad_(False).named_parameters():
        found = tensors[f"base_model.model.{name}"]
        assert found.dtype == torch.float32
        assert float((found - weight.float()).abs().max()) <= 1.1e-6 * STEPS
        moved += int((found != weight.float()).sum())
    assert moved > 1000, "steps below the resolution of bfloat16 are kept"


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_every_family_are_trained_saved_and_read_back(
    tiny_model: TinyModel, tmp_path: Path, kind: str
) -> None:
    folder = tiny_model(kind)
    model = in_place(folder, method="full")
    before = logits_of(model)
    add_labelled_loss(model.get_base_model())
    count = check_gradients(model, recipe_of(method="full"), padded(model, [[5, 6, 7, 8, 9, 10, 11, 12] * 4]))
    assert count == len({id(weight) for weight in trained_weights(model).values()})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in {id(weight): weight for weight in trained_weights(model).values()}.values():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    changed = logits_of(model)
    own_parameters(model).select([BASE])
    assert torch.equal(logits_of(model), before)
    own_parameters(model).select(["default"])
    save_adapter(model, tmp_path)
    loaded = load_adapter(load_plain(folder), tmp_path)
    assert torch.equal(logits_of(loaded), changed)
    assert not torch.equal(changed, before)


@pytest.mark.parametrize("planted", ["frozen", "trained too"])
def test_a_weight_that_is_not_trained_as_asked_is_told(random_qwen: Path, planted: str) -> None:
    settings = {"method": "freeze", "freeze": {"layers": "last 1"}}
    model = in_place(random_qwen, **settings)
    add_labelled_loss(model.get_base_model())
    layer = 1 if planted == "frozen" else 0
    weight = model.get_base_model().model.layers[layer].mlp.up_proj.weight  # type: ignore[attr-defined]
    weight.requires_grad_(planted != "frozen")
    told = "gets no gradient" if planted == "frozen" else "would be trained, but was not asked for"
    with pytest.raises(LoratuneError, match=rf"layers\.{layer}\.mlp\.up_proj\.weight {told}"):
        check_gradients(model, recipe_of(**settings), padded(model, [[5, 6, 7, 8]]))


def test_a_file_without_one_of_the_trained_weights_is_refused(random_qwen: Path, tmp_path: Path) -> None:
    save_adapter(in_place(random_qwen, method="freeze", freeze={"layers": "last 1"}), tmp_path)
    path, lost = tmp_path / "adapter_model.safetensors", "model.layers.1.self_attn.q_proj.bias"
    tensors = load_file(path)
    del tensors[f"base_model.model.{lost}"]
    save_file(tensors, path)
    with pytest.raises(LoratuneError, match=f"{lost} was trained and is not in the file"):
        load_adapter(load_plain(random_qwen), tmp_path)


def test_rounding_for_the_closing_questions_is_undone(random_qwen: Path) -> None:
    model = in_place(random_qwen, method="full")
    own = own_parameters(model)
    for values in (own.base_parameters(), own.values("default")):
        for value in values.values():
            value.data = value.data.bfloat16()
    for weight in trained_weights(model).values():
        weight.data = weight.data.float() + 1e-6
    kept = {name: weight.data.clone() for name, weight in trained_weights(model).items()}
    with in_base_dtype(model):
        assert {weight.dtype for weight in trained_weights(model).values()} == {torch.bfloat16}
        assert logits_of(model).isfinite().all()
    assert all(torch.equal(weight, kept[name]) for name, weight in trained_weights(model).items())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "full", "lora": {"rank": 8, "use_dora": True}}, "makes no use of lora.rank, lora.use_dora"),
        ({"method": "full", "freeze": {"layers": "last 1"}}, "makes no use of freeze.layers"),
        ({"freeze": {"modules": ["mlp"]}}, "method lora makes no use of freeze.modules"),
        ({"method": "freeze"}, "needs freeze.layers or freeze.modules"),
        ({"method": "full", "model": {"base": "x", "quantization": "nf4"}}, "needs model.quantization none"),
        ({"method": "full", "model": {"base": "x", "sharding": "fsdp"}}, "needs model.sharding none"),
        ({"method": "freeze", "freeze": {"layers": "last"}}, "write 'last 6'"),
    ],
)
def test_settings_that_a_method_does_not_take_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        recipe_of(**settings)


@pytest.mark.parametrize(
    ("freeze", "told"),
    [
        ({"layers": "last 3"}, "freeze.layers 'last 3': the model has 2 layers"),
        ({"modules": ["mlp", "ffn", "experts"]}, "ffn: no module is called so; there are embed_tokens"),
        ({"modules": ["(", "ffn"]}, "freeze.modules:\n  '\\(' is not a regular expression: .*\n  ffn: no module"),
        ({"layers": "first 1", "modules": [r".*layers\.1\..*"]}, "in freeze.layers 'first 1' or outside"),
    ],
)
def test_modules_and_layers_that_the_model_has_not_are_told(
    random_qwen: Path, freeze: dict[str, Any], told: str
) -> None:
    with pytest.raises(LoratuneError, match=told) as caught:
        in_place(random_qwen, method="freeze", freeze=freeze)
    assert caught.value.exit_code == Exit.USAGE


def test_a_tied_head_is_trained_with_the_embedding(random_qwen: Path) -> None:
    for module in ("lm_head", "embed_tokens"):
        model = in_place(random_qwen, method="freeze", freeze={"modules": [module]})
        assert trained_weights(model).keys() == {"model.embed_tokens.weight", "lm_head.weight"}


def test_what_becomes_of_the_weights_is_told_before_training() -> None:
    assert recipe_of(method="full").training.learning_rate == 2e-5
    assert recipe_of(method="full", training={"learning_rate": 3e-4}).training.learning_rate == 3e-4
    told = " ".join(advise(recipe_of(method="full", training={"learning_rate": 1e-5})))
    assert "loratune merge writes the model folder that other programs need" in told
    assert "learning_rate" not in told
    assert "above 5e-05" in " ".join(advise(recipe_of(method="full", training={"learning_rate": 3e-4})))


def test_a_server_is_given_the_merged_model(sft: Callable[..., Path], cli: Cli, tmp_path: Path) -> None:
    run = sft("run", "--method", "freeze", "--freeze.modules", "mlp")
    done = cli("export", "--adapter", run, "--format", "vllm", "--output", tmp_path / "vllm")
    assert done.exit_code == Exit.MODEL
    assert "model.layers.0.mlp.down_proj" in done.stderr
    assert "loratune merge --adapter" in done.stderr
    done = cli("export", "--adapter", run, "--format", "adapter", "--output", tmp_path / "adapter")
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "qwen3_5" else pytest.mark.slow) for kind in CONFIGS]
)
def test_all_weights_of_every_family_are_trained_in_bfloat16(
    tiny_model: TinyModel, cli: Cli, rows_file: Path, tmp_path: Path, kind: str
) -> None:
    result = cli(
        "sft", "--method", "full", "--model.base", tiny_model(kind), "--model.dtype", "bfloat16",
        "--data.train", rows_file, "--data.validation", "0.2", "--training.max_steps", 2,
        "--training.learning_rate", "1e-3", "--output", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "failed" not in result.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["loss"]["last"] < report["loss"]["first"] + 0.1
    assert report["health"]["answers"]["told"]
