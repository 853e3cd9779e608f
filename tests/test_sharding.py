"""A base that is sharded over the processes of a run: what is loaded, what is computed, what is sent and held."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import ROWS, TINY_QWEN, TinyModel
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from tiny_models import make_tiny_model
from torch import distributed
from torch.distributed.tensor import DTensor
from typer.testing import Result

from loratune.data.assembly.steps import PassLayout
from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.file_layout import file_layout
from loratune.model.architecture.head import OwnHead
from loratune.model.architecture.roles import Role
from loratune.model.base import load_base
from loratune.model.files import weight_files
from loratune.model.from_folder import load_from_folder
from loratune.model.hardware import detect_hardware
from loratune.model.kernels.linear_cross_entropy import summed_loss
from loratune.model.sharding.gathering import base_norms, gathered, is_sharded
from loratune.model.sharding.sharded_base import (
    _own_rows,
    load_sharded,
    require_apart_from_vocabulary,
    require_shardable,
    with_same_shards,
)
from loratune.model.weights.held import bytes_by_group, value_count
from loratune.model.weights.tensor_files import TensorFiles
from loratune.model.weights.unpacked import keep_unpacked
from loratune.recipe.method_sections import LoraSettings
from loratune.recipe.sections import ModelSettings
from loratune.runs.folder import read_metrics
from loratune.training.checkpoints.resuming import FREE

SHARDED_PASS = Path(__file__).with_name("sharded_pass.py")


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def tensors_of(model: Any) -> dict[str, Any]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers()])


@pytest.mark.parametrize("kind", ["qwen2", "deepseek_v3", "qwen3_moe", "qwen3_vl"])
def test_a_sharded_base_is_the_base(alone: None, tmp_path: Path, kind: str) -> None:
    """With a tied head, weights that stay in float32, stacks, and layers beside the decoder."""
    folder = make_tiny_model(kind, tmp_path / kind, torch.bfloat16)
    expected = load_from_folder(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = load_sharded(folder, detect_hardware(), torch.bfloat16, "sdpa")
    copied = with_same_shards(model, folder, "sdpa")
    assert is_sharded(model)
    assert not is_sharded(expected)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        logits = expected(input_ids=ids, use_cache=False).logits
        for one in (model, copied):
            held = {name: whole(tensor) for name, tensor in tensors_of(one).items()}
            torch.testing.assert_close(held, tensors_of(expected), rtol=0, atol=0)
            assert torch.equal(one(input_ids=ids, use_cache=False).logits, logits)
    norms = {name: float(weight.float().norm()) for name, weight in expected.named_parameters()}
    found = base_norms(model)
    assert found == pytest.approx({name: norms[name] for name in found}, rel=1e-5)
    assert not any(isinstance(weight, DTensor) for name, weight in model.named_parameters() if "visual" in name)


WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""Rows of whole blocks, with which nf4 is sharded."""


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("kind", "sizes"), [("qwen2", WIDE), ("qwen3_moe", WIDE | {"moe_intermediate_size": 64, "num_experts": 5})]
)
def test_a_sharded_nf4_base_is_bitsandbytes(
    alone: None, tmp_path: Path, kind: str, sizes: dict[str, int], double: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratune.model.base.is_to_be_sharded", lambda settings, _: settings.sharding == "fsdp")
    folder = make_tiny_model(kind, tmp_path / kind, torch.bfloat16, **sizes)
    settings = ModelSettings(base=str(folder), quantization="nf4", double_quantization=double, compute_dtype="bfloat16")
    hardware = detect_hardware()
    expected = load_base(settings, folder, hardware)
    keep_unpacked(expected)
    model = load_base(settings.model_copy(update={"sharding": "fsdp"}), folder, hardware)
    copied = with_same_shards(model, folder, "sdpa")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        logits = expected(input_ids=ids, use_cache=False).logits
        for one in (model, copied):
            assert torch.equal(one(input_ids=ids, use_cache=False).logits, logits)
    assert bytes_by_group(model) == bytes_by_group(expected)
    values = sum(value_count(weight) for weight in model.parameters())
    assert values == sum(value_count(weight) for weight in expected.parameters())
    found = base_norms(model)
    for name, module in expected.named_modules():
        if isinstance(module, Linear4bit):
            assert found[f"{name}.weight"] == pytest.approx(float(dequantize_module_weight(module).float().norm()))


def test_rows_that_share_a_block_are_refused(alone: None, tmp_path: Path) -> None:
    folder = make_tiny_model("qwen2", tmp_path / "narrow")
    settings = ModelSettings(base=str(folder), quantization="nf4", sharding="fsdp")
    with pytest.raises(LoratuneError, match=r"multiple of 64 values(?s:.*)q_proj.weight: \[32, 32\]"):
        load_base(settings, folder, replace(detect_hardware(), processes=2))


def test_a_model_that_reads_weights_elsewhere_is_refused(alone: None, tiny_model: TinyModel) -> None:
    with pytest.raises(LoratuneError, match="reads weights outside the layer") as refused:
        load_sharded(tiny_model("gemma4"), detect_hardware(), torch.float32, "sdpa")
    assert refused.value.exit_code == Exit.USAGE


@given(rows=st.integers(0, 40), processes=st.integers(1, 9))
def test_rows_are_divided_as_torch_divides_them(rows: int, processes: int) -> None:
    class Mesh:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def size(self) -> int:
            return processes

        def get_local_rank(self) -> int:
            return self.rank

    parts = [torch.arange(rows)[_own_rows(rows, Mesh(rank))] for rank in range(processes)]  # type: ignore[arg-type]
    expected = list(torch.arange(rows).chunk(processes)) if rows else []
    expected += [torch.arange(0)] * (processes - len(expected))
    assert [part.tolist() for part in parts] == [part.tolist() for part in expected]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe"])
def test_rows_of_a_parameter_are_those_of_the_whole(tiny_model: TinyModel, kind: str) -> None:
    """Stacks consist of a tensor for each expert in these files."""
    folder = tiny_model(kind)
    files = TensorFiles(weight_files(folder))
    layout = file_layout(load_from_folder(folder), files.infos)
    assert any(len(parts) > 1 for parts in layout.parts.values()) == (kind == "qwen3_moe")
    for name in layout.parts:
        assert torch.equal(layout.rows(name, slice(1, 3), files), layout.read(name, files)[1:3])


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    processes=st.integers(1, 5),
    kind=st.sampled_from([(True, False), (False, False), (False, True)]),
)
def test_all_processes_make_as_many_passes(lengths: list[int], processes: int, kind: tuple[bool, bool]) -> None:
    is_packed, is_single = kind
    layouts = [
        [PassLayout(60, 20, is_packed, processes, number, is_single, is_even=even) for number in range(processes)]
        for even in (True, False)
    ]
    even, uneven = ([layout.passes(np.array(lengths)) for layout in each] for each in layouts)
    assert len({len(passes) for passes in even}) == 1
    assert max(map(len, uneven)) == len(even[0])
    for filled, own in zip(even, uneven, strict=True):
        assert filled == own + [[]] * (len(filled) - len(own))


def test_the_loss_of_a_gathered_head_is_the_loss(alone: None, tiny_model: TinyModel) -> None:
    """Its gradient is computed at once, for a head that caps its logits too."""
    folder = tiny_model("gemma2")
    sharded = load_sharded(folder, detect_hardware(), torch.float32, "eager")
    plain = load_from_folder(folder, dtype=torch.float32, attn_implementation="eager")
    states = torch.randn(5, sharded.config.hidden_size, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3, 1, 4, 1, 5])
    given_states = states.clone().requires_grad_()
    with gathered(sharded.get_output_embeddings()) as is_gathered:
        assert is_gathered
        total, losses, _ = summed_loss(given_states, targets, OwnHead(sharded), is_settled=True)
    (2 * total).backward()
    expected = states.clone().requires_grad_()
    separate = torch.nn.functional.cross_entropy(OwnHead(plain)(expected), targets, reduction="none")
    (2 * separate.sum()).backward()
    torch.testing.assert_close(losses, separate.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(given_states.grad, expected.grad, rtol=1e-5, atol=1e-7)
    assert isinstance(sharded.get_output_embeddings().weight, DTensor), "it is sharded again"


@pytest.mark.parametrize(
    ("model", "lora", "named"),
    [
        ({"quantization": "int8"}, {}, "model.quantization int8"),
        (
            {"quantization": "int8"},
            {"modules_to_save": ["lm_head"]},
            "model.quantization int8 and lora.modules_to_save",
        ),
        ({}, {"bias": "all", "use_dora": True}, "lora.bias all and lora.use_dora"),
    ],
)
def test_what_cannot_be_sharded_is_refused(model: dict[str, Any], lora: dict[str, Any], named: str) -> None:
    require_shardable(ModelSettings(base="x"), LoraSettings())
    with pytest.raises(LoratuneError, match=f"model.sharding fsdp does not go with {named}: leave") as refused:
        require_shardable(ModelSettings(base="x", **model), LoraSettings(**lora))
    assert refused.value.exit_code == Exit.USAGE


def test_the_vocabulary_is_not_adapted() -> None:
    require_apart_from_vocabulary({"model.layers.0.mlp.up_proj": Role.MLP})
    with pytest.raises(LoratuneError, match="lm_head cannot be adapted"):
        require_apart_from_vocabulary({"model.layers.0.mlp.up_proj": Role.MLP, "lm_head": Role.HEAD})


def test_one_process_says_that_nothing_is_sharded(
    cli: Callable[..., Result], random_qwen: Path, rows_file: Path, tmp_path: Path
) -> None:
    done = cli(
        "sft", "--model.base", random_qwen, "--data.train", rows_file, "--output", tmp_path / "run", "--model.sharding",
        "fsdp", "--training.max_steps", "2",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "model.sharding fsdp has no effect, since there is one process" in done.stderr


def in_processes(number: int, *command: Any) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *map(str, command)], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def sft(tmp_path: Path, rows_file: Path) -> Callable[..., tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Train in some processes; return the figures of each step, and the adapter."""
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps(ROWS[:1]))  # nothing is left for a second process

    def train(
        name: str, processes: int, base: Path, *flags: str, questions: str = "0"
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        settings = [
            "--model.base", base, "--model.dtype", "float32", "--data.train", rows_file, "--data.validation", odd,
            "--training.max_steps", "4", "--training.batch_size", "11", "--lora.dropout", "0",
            "--training.learning_rate", "5e-3", "--checkpoints.every_steps", "2", "--evaluation.every_steps", "2",
            "--evaluation.questions_share", questions, "--output", tmp_path / name, *flags,
        ]  # fmt: skip
        if processes == 1:
            command = [sys.executable, "-m", "loratune", "sft", *map(str, settings)]
            subprocess.run(command, capture_output=True, timeout=300, check=True)
        else:
            in_processes(processes, "-m", "loratune", "sft", *settings)
        lines = read_metrics(tmp_path / name)
        figures = {f"{key} {line['step']}": line[key] for line in lines for key in FIGURES if key in line}
        return figures, load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")

    return train


FIGURES = ("loss", "validation_loss", "exact_answers", "answers", "gradient_norm", "learning_rate", "tokens")
SHORT_PASSES = ("--training.tokens_per_pass", "80")
"""The processes have unequal numbers of passes then."""


NF4 = ("--model.quantization", "nf4", "--model.compute_dtype", "float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("qwen2", ("--training.gradient_checkpointing",)),
        ("qwen2", ("--no-training.packing",)),
        ("qwen2", NF4),
        ("qwen3_moe", ("--lora.target_modules", "attention,experts")),
        ("qwen3_moe", (*NF4, "--training.gradient_checkpointing")),
        ("gemma2", ()),
    ],
)
def test_a_sharded_base_trains_what_one_process_trains(
    sft: Callable[..., Any], tmp_path: Path, kind: str, flags: tuple[str, ...]
) -> None:
    sizes = WIDE | {"moe_intermediate_size": 64} if set(NF4) <= set(flags) else {}
    base = with_tokenizer(make_tiny_model(kind, tmp_path / kind, **sizes))
    figures, adapter = sft("one", 1, base, *flags, questions="9")
    sharded, own = sft("sharded", 2, base, *flags, *SHORT_PASSES, "--model.sharding", "fsdp", questions="9")
    assert {name.split()[0] for name in figures} >= {"loss", "validation_loss"}
    assert sharded == pytest.approx(figures, rel=1e-5)
    torch.testing.assert_close(own, adapter, rtol=1e-4, atol=1e-5)
    health, expected = (
        json.loads((tmp_path / name / "report.json").read_text())["health"] for name in ("sharded", "one")
    )
    assert health["answers"] == expected["answers"]
    assert expected["answers"]["told"]
    assert all(0 < updates["largest"] < 1 for updates in health["updates"].values())


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), NF4])
def test_a_process_may_have_no_expert(sft: Callable[..., Any], tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Of five, four processes have two, two, one, and none."""
    sizes = WIDE | {"moe_intermediate_size": 64, "num_experts": 5}
    base = with_tokenizer(make_tiny_model("qwen3_moe", tmp_path / "base", **sizes))
    figures, adapter = sft("one", 1, base, *flags)
    sharded, own = sft("sharded", 4, base, *flags, "--model.sharding", "fsdp")
    assert sharded == pytest.approx(figures, rel=1e-5)
    torch.testing.assert_close(own, adapter, rtol=1e-4, atol=1e-5)


FAILING_QUESTIONS = """
from contextlib import suppress
import torch
from loratune.cli.app import main
from loratune.training.reporting import closing

def fail_in_a_pass(model, *_):
    ids = torch.zeros(1, 2, dtype=torch.long)
    with suppress(ValueError):
        model(input_ids=ids, inputs_embeds=torch.zeros(1, 2, 4))
    model(input_ids=ids)  # as where a decoder is tried after another one

closing.ask_questions = fail_in_a_pass
main()
"""


@pytest.mark.slow
def test_failing_questions_do_not_keep_the_others(tmp_path: Path, random_qwen: Path, rows_file: Path) -> None:
    """Where the first process fails within a pass, another one waits in it."""
    script, output = tmp_path / "failing.py", tmp_path / "run"
    script.write_text(FAILING_QUESTIONS)
    in_processes(
        2, script, "sft", "--model.base", random_qwen, "--data.train", rows_file, "--training.max_steps", "1",
        "--output", output, "--model.sharding", "fsdp",
    )  # fmt: skip
    report = json.loads((output / "report.json").read_text())
    assert any("an earlier pass has failed" in warning for warning in report["warnings"])
    assert any("the closing questions" in warning for warning in report["warnings"])
    assert json.loads((output / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_a_sharded_run_resumes_to_the_same_bits(sft: Callable[..., Any], tmp_path: Path, random_qwen: Path) -> None:
    """Four processes, where the order of sums counts, without and with shards; then the second half again."""
    flags = (*SHORT_PASSES, "--training.gradient_checkpointing")
    whole_figures, whole_adapter = sft("whole", 4, random_qwen, *flags)
    figures, adapter = sft("sharded", 4, random_qwen, *flags, "--model.sharding", "fsdp")
    assert figures == pytest.approx(whole_figures, rel=1e-5)
    torch.testing.assert_close(adapter, whole_adapter, rtol=1e-4, atol=1e-5)
    for name, processes, changes in (("same", 4, ()), ("fewer", 2, ("--allow-changes",))):
        shutil.copytree(tmp_path / "sharded", tmp_path / name)
        shutil.rmtree(tmp_path / name / "adapter")
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-000004")
        status = json.loads((tmp_path / name / "status.json").read_text()) | {"state": "interrupted"}
        (tmp_path / name / "status.json").write_text(json.dumps(status))
        again, resumed = sft(
            name, processes, random_qwen, *flags, "--model.sharding", "fsdp", "--resume", "2", *changes
        )
        if processes == 4:
            assert again == figures
            torch.testing.assert_close(resumed, adapter, rtol=0, atol=0)
        else:
            assert again == pytest.approx(figures, rel=1e-5)
            torch.testing.assert_close(resumed, adapter, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the memory is read from /proc")
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_bytes_sent_and_memory_follow_from_the_shards(tmp_path: Path, quantization: str) -> None:
    """A base of 530 MB in two processes, or of 68 MB in 4 bits."""
    small = make_tiny_model("qwen2", tmp_path / "small", **WIDE)
    base = make_tiny_model(
        "qwen2", tmp_path / "base", hidden_size=512, intermediate_size=2048, num_hidden_layers=34,
        num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip
    in_processes(2, SHARDED_PASS, quantization, small, base, tmp_path)
    for number in (0, 1):
        found = json.loads((tmp_path / f"{number}.json").read_text())
        # Layers and the last norm in forward and backward pass, the tied vocabulary as embedding and as head.
        assert found["sent"] == 2 * (found["layers"] + found["norm"] + found["embedding"])
        # On a CPU, gathered weights exist as they were received, and as they are used. Of 4-bit weights, a matrix is
        # dequantised at a time; what does not depend on the base, such as buffers of the connections, counts there. It
        # stays below half of the layers in 16 bits.
        if quantization == "none":
            assert found["peak"] == pytest.approx(found["own"] + 2 * found["gathered"], rel=0.15)
        else:
            assert found["own"] + 2 * found["gathered"] < found["peak"] < found["layers"] * 2


def test_a_run_may_go_on_with_and_without_shards() -> None:
    assert "model.sharding" in FREE


def with_tokenizer(folder: Path) -> Path:
    for file in TINY_QWEN.iterdir():
        if file.suffix != ".safetensors" and not (folder / file.name).exists():
            shutil.copy(file, folder)
    return folder
