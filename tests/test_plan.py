"""`loratune plan`: its terms are those of tensors counted otherwise, and what it says to fit does."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from serving import benchmark_figures
from typer.testing import Result

from loratune import progress
from loratune.errors import Exit
from loratune.model.adapter.attach import attach_adapter, save_adapter
from loratune.model.architecture.structure import causal_model
from loratune.model.base import load_base
from loratune.model.hardware import Hardware, cpu_hardware
from loratune.model.kernels.linear_cross_entropy import add_labelled_loss
from loratune.model.kernels.lora_linear import use_fused_lora
from loratune.model.kernels.norm_mlp import use_fused_elementwise
from loratune.model.kernels.packed_attention import use_document_attention
from loratune.recipe.loading import load_recipe
from loratune.recipe.sections import Recipe
from loratune.sizes import parse_size
from loratune.training.activations import PassPlan, measure_passes
from loratune.training.memory import trace as tracing
from loratune.training.memory.expecting import ProcessMemory, Workload, expect_passes, optimizer_bytes, pass_memory
from loratune.training.memory.live import LiveBytes
from loratune.training.memory.planned import PlannedModel, planned_model
from loratune.training.memory.prediction import (
    ADAPTER,
    FREED,
    GRADIENTS,
    KEPT,
    LOADING,
    OPTIMIZER,
    STEP,
    WORKSPACE,
    Prediction,
)
from loratune.training.memory.trace import Setting, trace
from loratune.training.probes.passes import packed

pytestmark = pytest.mark.predicts_memory
GPU = Hardware(torch.device("cuda", 0), True, "a GPU", 1, (8, 0))
LENGTHS = [70, 33, 9]
ROWS = [{"instruction": f"Count to {number}.", "output": "one two three " * 60} for number in range(24)]


def recipe_of(base: Path, **flags: Any) -> Recipe:
    settings = {name.replace("__", "."): str(value) for name, value in flags.items()}
    return load_recipe(
        None, {"model.base": str(base), "data.train": ["rows.json"], "model.dtype": "float32"} | settings
    )


def planned(base: Path, **flags: Any) -> tuple[PlannedModel, Recipe]:
    recipe = recipe_of(base, **flags)
    return planned_model(recipe, base, cpu_hardware()), recipe


def loaded(recipe: Recipe, base: Path) -> Any:
    model = load_base(recipe.model, base, cpu_hardware())
    adapted = attach_adapter(model, recipe.lora, "base", 0)
    use_fused_lora(adapted)
    use_fused_elementwise(model)
    use_document_attention(model)
    add_labelled_loss(model)
    return adapted.train()


def test_what_is_kept_is_what_autograd_saves_with_values(random_qwen: Path) -> None:
    it, recipe = planned(random_qwen)
    found = trace(it.model, packed(it.model, [[0] * length for length in LENGTHS]), Setting())
    model, saved = loaded(recipe, random_qwen), dict[int, torch.UntypedStorage]()
    held = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in held:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    batch = packed(model, [[0] * length for length in LENGTHS])
    del batch["labels"]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        states = causal_model(model).model(**batch, use_cache=False).last_hidden_state
    kept = sum(storage.nbytes() for storage in {id(one): one for one in saved.values()}.values())
    # The states themselves, positions and masks are held too.
    assert kept <= found.kept <= kept + 4 * states.nbytes


@pytest.mark.parametrize(
    ("flags", "off"),
    [
        ({}, 0.01),
        # Codes are dequantised in other steps.
        ({"model__quantization": "int8", "lora__use_dora": "true"}, 0.02),
        ({"model__quantization": "nf4", "lora__use_dora": "true"}, 0.02),
    ],
    ids=["lora", "dora on int8", "dora on nf4"],
)
def test_a_pass_without_values_takes_what_one_with_values_does(
    random_qwen: Path, flags: dict[str, str], off: float
) -> None:
    it, recipe = planned(random_qwen, **flags)
    batch = packed(it.model, [[0] * length for length in LENGTHS])
    found = trace(it.model, batch, Setting())
    model = loaded(recipe, random_qwen)
    own = packed(model, [[0] * length for length in LENGTHS])
    tensors = (value for value in own.values() if isinstance(value, torch.Tensor))
    live = LiveBytes([*model.parameters(), *model.buffers(), *tensors])
    with live:
        causal_model(model)(**own, summed_loss=True).loss_sum.backward()
    assert found.peak == pytest.approx(live.peak, rel=off)


def test_layers_of_one_kind_stand_for_each_other(tiny_model: Callable[[str], Path]) -> None:
    for kind in ("qwen2", "qwen3_5", "qwen3_moe"):
        it, _ = planned(tiny_model(kind))
        batch = packed(it.model, [[0] * length for length in LENGTHS])
        whole = trace(it.model, batch, Setting())
        with tracing._ready(it.model, Setting()):
            assert tracing._traced(it.model, batch, Setting()) == whole


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_5_moe", "gemma2", "lfm2", "gpt_oss"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_other_families_are_planned(
    tiny_model: Callable[[str], Path], kind: str, dtype: str, quantization: str
) -> None:
    it, _ = planned(tiny_model(kind), model__quantization=quantization, model__dtype=dtype)
    assert trace(it.model, it.batch(LENGTHS, 1), Setting()).peak > 0
    if kind == "qwen3_moe" and quantization == "int8":
        assert it.weights["experts, not quantised"] > 0  # which int8 leaves in 16 bits


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_weights_and_adapter_are_those_of_a_loaded_model(random_qwen: Path, tmp_path: Path, quantization: str) -> None:
    it, recipe = planned(random_qwen, model__quantization=quantization)
    model = loaded(recipe, random_qwen)
    held = dict(model.named_parameters())
    base = [one for name, one in held.items() if "lora_" not in name]
    bytes_held = sum(one.nbytes for one in base)
    assert bytes_held <= sum(it.weights.values()) <= 1.1 * bytes_held + 100_000  # scales are no parameters
    save_adapter(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert it.adapter_bytes == sum(4 * one.numel() for one in saved.values())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_kernels_are_those_of_a_loaded_model(random_qwen: Path, quantization: str) -> None:
    """They are chosen by comparing results, which must not come from memory beside the tensors without values."""
    it, recipe = planned(random_qwen, model__quantization=quantization)
    model = loaded(recipe, random_qwen)
    own, real = (
        Counter(type(module).__name__ for module in one.modules() if "forward" in vars(module))
        for one in (it.model, model)
    )
    assert own["Qwen2MLP"] == real["Qwen2MLP"] > 0
    assert own["Qwen2RMSNorm"] == real["Qwen2RMSNorm"] > 0


@pytest.mark.parametrize(("dtype", "quantization"), [("float32", "none"), ("bfloat16", "none"), ("bfloat16", "nf4")])
def test_pages_of_files_are_those_of_what_is_converted(random_qwen: Path, dtype: str, quantization: str) -> None:
    it, recipe = planned(random_qwen, model__quantization=quantization, model__dtype=dtype)
    stored = load_file(random_qwen / "model.safetensors")
    model = load_base(recipe.model, random_qwen, cpu_hardware())
    in_place = {name for name, one in model.named_parameters() if name in stored and one.dtype == stored[name].dtype}
    assert it.file_bytes == sum(one.nbytes for name, one in stored.items() if name not in in_place)


def test_freed_blocks_are_kept_where_there_is_room(random_qwen: Path) -> None:
    it, recipe = planned(random_qwen)
    work, passes = Workload(np.array([64] * 8), 0.5), PassPlan(128, 128, False, None)

    def expected(room: int) -> Prediction:
        return expect_passes(it, recipe, work, cpu_hardware(), passes, ProcessMemory(5_000, room))

    fast = expected(10**12)
    assert fast.keeps_freed
    assert fast.moments[STEP][FREED] > 0
    assert expected(fast.peak_bytes).keeps_freed
    small = expected(fast.peak_bytes - 1)
    assert not small.keeps_freed
    assert fast.peak_bytes == small.peak_bytes + fast.moments[STEP][FREED]
    on_gpu = expect_passes(it, recipe, work, GPU, passes, ProcessMemory(0, 10**12))
    assert not on_gpu.keeps_freed
    assert LOADING not in on_gpu.moments


@pytest.mark.parametrize(("lengths", "share"), [([60, 61, 62, 63] * 8, 0.5), (list(range(20, 52)), 0.9)], ids=str)
def test_more_freed_blocks_stay_beside_a_quantised_base_if_passes_have_many_sizes(
    random_qwen: Path, lengths: list[int], share: float
) -> None:
    passes, found = PassPlan(64, 64, False, None), {}
    for held in ("none", "nf4"):
        it, recipe = planned(random_qwen, model__dtype="bfloat16", model__quantization=held, training__batch_size=8)
        memory = ProcessMemory(5_000, 10**12)
        terms = expect_passes(it, recipe, Workload(np.array(lengths), 0.5), cpu_hardware(), passes, memory).moments[
            STEP
        ]
        found[held] = terms[FREED] / sum(terms[name] for name in (GRADIENTS, KEPT, WORKSPACE))
    assert found == {"none": pytest.approx(0.4, abs=0.01), "nf4": pytest.approx(share, abs=0.01)}


def test_the_optimizer_s_bytes_are_those_of_its_states(random_qwen: Path) -> None:
    it, recipe = planned(random_qwen)
    trained = [one for one in loaded(recipe, random_qwen).parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for one in trained:
        one.grad = torch.ones_like(one)
    optimizer.step()
    states = sum(one.nbytes for state in optimizer.state.values() for one in state.values() if one.ndim)
    assert optimizer_bytes(it, recipe, cpu_hardware()) == states


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen3_moe"])
def test_a_pass_is_not_chosen_larger_than_by_measuring(tiny_model: Callable[[str], Path], kind: str) -> None:
    it, recipe = planned(tiny_model(kind))
    model, work = loaded(recipe, tiny_model(kind)), Workload(np.array([256] * 16), 1)
    found = pass_memory(it, recipe, work, cpu_hardware(), 0)
    measured = measure_passes(model, True, 256, 16 * 256, cpu_hardware())
    for tokens in (256, 1024, 4096):
        for is_recomputed in (False, True):
            assert found.needed(tokens, is_recomputed) >= measured.needed(tokens, is_recomputed)


def test_a_term_that_is_left_out_is_seen(random_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: tensors that an operator makes are not followed, so the comparison above fails."""
    plain = LiveBytes._follow
    it, _ = planned(random_qwen)
    batch = packed(it.model, [[0] * length for length in LENGTHS])
    right = trace(it.model, batch, Setting())
    monkeypatch.setattr(LiveBytes, "_follow", lambda self, one: plain(self, one) if one.nbytes() < 20_000 else None)
    assert trace(it.model, batch, Setting()).peak < 0.9 * right.peak


def test_the_peak_is_the_sum_of_its_terms(random_qwen: Path) -> None:
    it, recipe = planned(random_qwen)
    work, passes = Workload(np.array([64] * 8), 0.5), PassPlan(128, 128, False, None)
    found = expect_passes(it, recipe, work, cpu_hardware(), passes, ProcessMemory(5_000, 10**12))
    assert found.peak_bytes == sum(found.terms.values())
    assert found.terms[ADAPTER] == it.adapter_bytes
    assert found.terms[OPTIMIZER] == 2 * it.adapter_bytes
    shared = expect_passes(it, recipe, work, cpu_hardware(2), passes, ProcessMemory(5_000, 10**12))
    assert shared.processes == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("80 GiB", 80 * 2**30), ("1.5mb", 1_500_000), ("5G", 5 * 10**9), ("7Mi", 7 * 2**20)],
)
def test_a_size_has_a_unit(text: str, size: int) -> None:
    assert parse_size(text, "--gpu", 10**6, 10**13, "a size") == size


@pytest.mark.parametrize("size", ["4090", "24", "24 GBit", "GB", "99999999TB", "0.9MB", "9" * 400 + "GB", "-24GB", ""])
def test_a_card_without_a_size_is_refused_before_anything_is_planned(cli: Callable[..., Result], size: str) -> None:
    done = cli("plan", "--config", "quickstart", "--gpu", size)
    assert done.exit_code == Exit.USAGE
    told = "".join(done.stderr.split())
    assert told.endswith("".join(f"error: --gpu {size!r}: give the memory of a card, such as 24GB or 80GiB".split()))
    assert told.startswith("error:")


def test_a_recipe_that_does_not_fit_is_changed_until_it_does(
    cli: Callable[..., Result], random_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_line_for_each = {"FIRST_LINE_SECONDS": -1, "LINE_SECONDS": -1, "MOST_LINES": math.inf}
    for name, value in a_line_for_each.items():
        monkeypatch.setattr(progress, name, value)
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(ROWS))
    line = ("--model.base", random_qwen, "--data.train", rows, "--data.validation", 0, "--model.dtype", "float32")
    line = (*line, "--training.tokens_per_pass", 4096, "--no-training.gradient_checkpointing")
    whole = cli("plan", *line, "--gpu", "80GB", "--json")
    assert whole.exit_code == 0, whole.stderr
    told = json.loads(whole.stdout)
    assert told["fits"]
    assert told["changes"] == []
    assert told["peak_bytes"] == sum(told["terms"].values())
    assert told["room_bytes"] - told["spare_bytes"] == told["peak_bytes"]
    tight = f"{0.99 * told['peak_bytes'] / 1e6:.3f}MB"
    small = cli("plan", *line, "--gpu", tight, "--json")
    assert small.exit_code == Exit.IO
    told = json.loads(small.stdout)
    assert not told["fits"]
    assert told["fit"]
    assert told["fitted_bytes"] <= told["room_bytes"]
    assert all(one["peak_bytes"] < told["peak_bytes"] for one in told["changes"])
    tried = re.findall(r"(\d+)/(\d+) changes tried  --", small.stderr)
    assert [int(number) for number, _ in tried] == list(range(len(tried)))
    assert len(told["changes"]) <= len(tried) == int(tried[0][1])
    recipe = tmp_path / "fits.yaml"
    assert cli("plan", *line, "--gpu", tight, "--fit", recipe).exit_code == 0
    refused = cli("plan", *line, "--gpu", tight, "--fit", recipe)
    assert refused.exit_code == Exit.USAGE
    assert "exists; --fit writes a new file" in " ".join(refused.stderr.split())
    assert "planning" not in refused.stderr
    again = cli("plan", "--config", recipe, "--gpu", tight, "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["peak_bytes"] == told["fitted_bytes"]
    assert cli("plan", *line, "--gpu", "10MB", "--fit", tmp_path / "none.yaml").exit_code == Exit.IO
    assert not (tmp_path / "none.yaml").exists()


def test_a_config_alone_suffices(cli: Callable[..., Result], random_qwen: Path, tmp_path: Path) -> None:
    folder = tmp_path / "config only"
    folder.mkdir()
    (folder / "config.json").write_text((random_qwen / "config.json").read_text())
    line = ["--model.base", folder, "--data.train", "no.json", "--data.train", "nor this.json"]
    done = cli("plan", *line, "--training.max_length", 64, "--no-training.packing", "--gpu", "8GB")
    assert done.exit_code == 0, done.stderr
    shown = " ".join(done.stderr.split())
    assert "every row is taken to have 64 tokens" in shown
    assert "it fits into 8.0 GB" in shown
    assert "--data.train no.json --data.train 'nor this.json'" in shown
    assert "--no-training.packing" in shown.partition("loratune sft")[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="plan's constants are those of glibc")
@pytest.mark.parametrize("held", ["bfloat16", "nf4", "int8"])
def test_the_peak_of_a_run_is_as_predicted(held: str, tmp_path: Path) -> None:
    """A real run in a process of its own, with rows of many lengths: freed blocks do not fit the next pass."""
    rows, draw = tmp_path / "rows.json", random.Random(0)
    texts = [
        " ".join(draw.choices(["the", "river", "has", "many", "names"], k=draw.randrange(5, 350))) for _ in range(400)
    ]
    rows.write_text(json.dumps([{"instruction": f"Text {at}", "output": text} for at, text in enumerate(texts)]))
    told = benchmark_figures(
        tmp_path, "memory", "--shapes", "deep", "--held", held, "--rows", str(rows), "--lengths", "512",
        "--passes", "1024", "--steps", "8", "--checkpointing", "no",
    )  # fmt: skip
    assert told["plan"]["keeps_freed"]
    assert 0.9 < told["plan"]["peak_bytes"] / told["peak_bytes"] < 1.1
