"""What a step takes of the memory, what is free, and when activations are computed twice."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Lfm2Config, Lfm2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from typer.testing import Result

from loratune.data.assembly.steps import PassLayout, StepSampler
from loratune.model import memory
from loratune.model.hardware import Hardware, detect_hardware
from loratune.model.kernels.lora_linear import use_fused_lora
from loratune.model.kernels.packed_attention import use_document_attention
from loratune.recipe.sections import TrainingSettings
from loratune.training import activations, session
from loratune.training.activations import SPARE, SPARE_ON_GPU, PassMemory, largest_step, measure_passes, plan_passes
from loratune.training.memory.prediction import FREED, STEP, Prediction

MB = 2**20


@pytest.fixture
def sft(cli: Callable[..., Result], random_qwen: Path, rows_file: Path, tmp_path: Path) -> Callable[..., Result]:
    """Run `loratune sft` for a few steps on the random model."""

    def run(name: str, *flags: Any) -> Result:
        return cli(
            "sft", "--model.base", random_qwen, "--model.dtype", "float32", "--data.train", rows_file,
            "--training.max_steps", "3", "--lora.dropout", "0", "--output", tmp_path / name, *flags,
        )  # fmt: skip

    return run


def group(folder: Path, version: int, limit: str, used: int, cached: int) -> None:
    """The files in which Linux tells a container or a job its memory."""
    folder.mkdir(parents=True, exist_ok=True)
    statistics = f"anon 5\ninactive_file {cached}\n"
    for name, text in zip(
        memory.GROUP_FILES[0 if version == 2 else 1], (limit + "\n", f"{used}\n", statistics), strict=True
    ):
        (folder / name).write_text(text)


def free_in(root: Path, listing: str) -> int:
    (root / "listing").write_text(listing)
    return min(map(memory._free_in_group, memory._own_groups(root, root / "listing")))


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_s_bound_counts_without_the_cache_of_files(tmp_path: Path, version: int) -> None:
    group(tmp_path if version == 2 else tmp_path / "memory", version, str(100 * MB), 70 * MB, 20 * MB)
    assert free_in(tmp_path, "0::/\n5:memory:/\n") == 50 * MB
    assert free_in(tmp_path, "0::/of the host\n5:cpu,memory:/of the host\n") == 50 * MB  # paths that it does not see


@pytest.mark.parametrize("version", [1, 2])
def test_a_job_s_bound_counts_and_those_around_it(tmp_path: Path, version: int) -> None:
    top = tmp_path if version == 2 else tmp_path / "memory"
    listing = "0::/slurm/job_7/step_0\n" if version == 2 else "4:memory:/slurm/job_7/step_0\n0::/\n"
    group(top / "slurm" / "job_7", version, str(100 * MB), 30 * MB, 0)
    assert free_in(tmp_path, listing) == 70 * MB
    group(top / "slurm" / "job_7" / "step_0", version, str(100 * MB), 90 * MB, 0)
    assert free_in(tmp_path, listing) == 10 * MB
    group(top / "slurm" / "job_8", version, str(100 * MB), 99 * MB, 0)  # of somebody else
    assert free_in(tmp_path, listing) == 10 * MB


def test_no_bound_is_none(tmp_path: Path) -> None:
    assert free_in(tmp_path, "0::/\n") == sys.maxsize
    group(tmp_path, 2, "max", 70 * MB, 20 * MB)
    assert free_in(tmp_path, "0::/\n") == sys.maxsize
    (tmp_path / "memory.stat").write_text("a b c\n")
    assert free_in(tmp_path, "0::/\n") == sys.maxsize
    assert list(memory._own_groups(tmp_path, tmp_path / "no listing")) == [tmp_path, tmp_path / "memory"]


RESIDENT = """
import ctypes, psutil, sys
from loratune.model.memory import keep_freed_memory, return_large_blocks

def left():
    before = psutil.Process().memory_info().rss
    blocks = [ctypes.create_string_buffer(1 << 20) for _ in range(64)]
    stays = ctypes.create_string_buffer(1 << 12)  # above the others in the heap, which cannot shrink then
    del blocks
    return psutil.Process().memory_info().rss - before

return_large_blocks()
print(left())
keep_freed_memory()
print(left())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
def test_large_blocks_are_returned_or_kept() -> None:
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    returned, kept = map(int, done.stdout.split())
    assert returned < 8 * MB
    assert kept > 56 * MB


HELD = """
import sys
import torch
from loratune.model.memory import hold_within, keep_freed_memory, resident_bytes

MB = 1 << 20
keep_freed_memory()
model = torch.nn.Identity()
before = resident_bytes()
hold_within(model, before + int(sys.argv[1]) * MB)
blocks = [torch.ones(MB, dtype=torch.uint8) for _ in range(int(sys.argv[2]))]
gaps = [blocks.pop(-2) for _ in range(len(blocks) // 2)]  # every other block stays
del gaps
found = []
for _ in range(2):
    model(torch.ones(1))
    found.append(resident_bytes() - before)
    gaps = [torch.ones(MB, dtype=torch.uint8) for _ in range(32)]
    del gaps
print(*found, len(model._forward_pre_hooks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
@pytest.mark.parametrize(
    ("most", "blocks", "held", "looks"),
    [(100, 128, (64, 96), 1), (200, 128, (128, 128), 1), (20, 128, (64, 96), 0)],
    ids=["too many", "within", "more in use"],
)
def test_freed_blocks_are_returned_where_a_process_would_outgrow_its_bound(
    most: int, blocks: int, held: tuple[int, int], looks: int
) -> None:
    """Half the blocks are freed. With more in use than the bound, nothing is returned a second time."""
    done = subprocess.run(
        [sys.executable, "-c", HELD, str(most), str(blocks)], capture_output=True, text=True, check=True
    )
    first, second, left = map(int, done.stdout.split())
    assert abs(first / MB - held[0]) < 8
    assert abs(second / MB - held[1]) < 8
    assert left == looks


@pytest.mark.parametrize("keeps", [True, False])
def test_a_run_keeps_freed_blocks_if_they_are_expected_to_fit(
    sft: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    called: list[str] = []
    for name in ("return_large_blocks", "keep_freed_memory"):
        monkeypatch.setattr(session, name, lambda name=name: called.append(name))
    expected = Prediction({}, {"all": 7}, {STEP: {FREED: 4}}, 1, False, keeps_freed=keeps)
    monkeypatch.setattr(session, "_predicted", lambda *_: expected)
    bounds: list[int] = []
    monkeypatch.setattr(session, "hold_within", lambda _, most: bounds.append(most))
    assert sft("run").exit_code == 0
    assert bounds == [9] * keeps  # what is expected at the peak, with half the freed blocks
    assert called == ["return_large_blocks", "keep_freed_memory"][: 1 + keeps]


@pytest.mark.skipif(sys.platform != "linux", reason="pages of Linux")
def test_pages_of_files_are_given_up_and_what_was_written_stays(tmp_path: Path) -> None:
    read, written = (tmp_path / name for name in ("read.bin", "written.bin"))
    values = {}
    for path in (read, written):
        path.write_bytes(bytes(range(256)) * (32 * MB // 256))
        storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=32 * MB)
        values[path] = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (32 * MB,), (1,))
        assert int(values[path].sum(dtype=torch.int64)) == 32 * MB // 256 * 32_640
    values[written][5] = 77
    before = psutil.Process().memory_info().rss
    memory.release_file_pages([read, written])
    assert before - psutil.Process().memory_info().rss > 28 * MB
    assert before - psutil.Process().memory_info().rss < 36 * MB  # those of the other one are still there
    assert values[written][5] == 77
    assert int(values[read].sum(dtype=torch.int64)) == 32 * MB // 256 * 32_640


def test_free_memory_is_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = memory.free_memory_bytes(detect_hardware())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_memory_bytes(detect_hardware()) == pytest.approx(alone / 4, rel=0.2)
    assert 0 < alone < 2**44


def test_a_step_takes_what_the_allocator_hands_out(random_qwen: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_qwen, dtype=torch.float32)
    use_document_attention(model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    use_fused_lora(adapted)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = measure_passes(adapted, True, 128, 128, detect_hardware())
    assert torch.equal(torch.get_rng_state(), before)
    inputs = torch.arange(128)[None]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        hidden = adapted.get_base_model().model(inputs, use_cache=False).last_hidden_state
    held = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    assert hidden.requires_grad
    assert found.kept * 128 / SPARE == pytest.approx(held, rel=0.1)
    assert found.needed(128, is_recomputed=False) > found.kept * 128 > found.needed(128, True) - found.fixed


def test_measuring_passes_leaves_no_tensor_behind(random_qwen: Path) -> None:
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(random_qwen, dtype=torch.bfloat16),
        LoraConfig(r=4, target_modules="all-linear"),
    )

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(held), torch.Tensor) for held in gc.get_objects())

    measure_passes(adapted, True, 128, 128, detect_hardware())
    before = tensors()
    measure_passes(adapted, True, 128, 128, detect_hardware())
    assert tensors() == before


def test_on_a_gpu_the_peaks_of_two_passes_give_bytes_per_token_and_what_every_pass_takes(
    random_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(random_qwen), LoraConfig(r=4))
    trained_bytes = 4 * sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    gpu = Hardware(torch.device("cuda", 0), True, "NVIDIA T4", capability=(7, 5))
    seen = []

    def peak(model: Any, is_packed: bool, lengths: list[int], hardware: Hardware) -> int:
        seen.append(lengths)
        return 5000 + 70 * sum(lengths)

    monkeypatch.setattr(activations, "_peak_bytes", peak)
    monkeypatch.setattr(activations, "free_memory_bytes", lambda hardware: 10**9)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    found = measure_passes(adapted, True, 128, 4096, gpu)
    assert seen == [[128], [128] * 4]
    assert found.kept == pytest.approx(SPARE_ON_GPU * 70)
    assert found.fixed == pytest.approx(5000 - 0.1 * 70 * 128 + 3 * trained_bytes, abs=1)
    assert found.free == 10**9


def test_all_processes_plan_with_the_worst_figures_of_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise they would divide a step differently, and rows would be lost or trained on twice."""
    mine, other = PassMemory(1000.5, 90, 50_000, 10**9), PassMemory(900, 100.25, 60_000, 2 * 10**9)
    assert activations._scarcest(mine) == mine
    for of_all in ([mine, other], [other, mine]):
        monkeypatch.setattr(activations, "from_all", lambda _, of_all=of_all: of_all)
        assert activations._scarcest(mine) == PassMemory(1000.5, 100.25, 60_000, 10**9)


def test_borders_of_documents_are_passed_only_where_rows_are_packed() -> None:
    """transformers refuses them where a layer with a state cannot keep documents apart, as here without its kernel."""
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False,
    )  # fmt: skip
    adapted = get_peft_model(Lfm2ForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"))
    assert measure_passes(adapted, False, 70, 128, detect_hardware()).kept > 0
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        measure_passes(adapted, True, 70, 128, detect_hardware())


@contextmanager
def counted_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """Has a line for every time that an attention layer computes."""
    calls: list[None] = []
    plain = Qwen2Attention.forward

    def forward(self: Any, *arguments: Any, **settings: Any) -> Any:
        calls.append(None)
        return plain(self, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Qwen2Attention, "forward", forward)
        yield calls


MEMORY = PassMemory(kept=1000, recomputed=100, fixed=50_000, free=1_050_000)


def training(**settings: Any) -> TrainingSettings:
    return TrainingSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "memory", "longest", "step", "expected"),
    [
        # 1,000 tokens fit; a pass of 512 is fast enough, so nothing is recomputed.
        ({}, MEMORY, 200, 5000, (512, 512, False)),
        ({}, MEMORY, 200, 300, (512, 300, False)),
        # The longest row decides where it is longer than what fits.
        ({}, MEMORY, 600, 5000, (600, 600, False)),
        ({}, MEMORY, 1500, 5000, (2048, 2048, True)),
        ({"gradient_checkpointing": False}, MEMORY, 1500, 5000, (1500, 1500, False)),
        ({"gradient_checkpointing": True}, MEMORY, 200, 5000, (2048, 2048, True)),
        ({"tokens_per_pass": 900}, MEMORY, 200, 5000, (900, 900, False)),
        ({"tokens_per_pass": 2000}, MEMORY, 200, 5000, (2000, 2000, True)),
        ({"tokens_per_pass": 2000}, MEMORY, 200, 700, (2000, 700, False)),
        ({"tokens_per_pass": 2000, "gradient_checkpointing": False}, None, 200, 5000, (2000, 2000, False)),
        ({}, PassMemory(1000, 100, 50_000, 0), 200, 5000, (200, 200, True)),
    ],
    ids=str,
)
def test_a_pass_is_as_large_as_fits_and_is_fast(
    settings: dict[str, Any], memory: PassMemory | None, longest: int, step: int, expected: tuple[int, int, bool]
) -> None:
    plan = plan_passes(training(**settings), memory, longest, step, "cpu")
    assert (plan.tokens, plan.largest, plan.gradient_checkpointing) == expected


def test_a_small_pass_is_recomputed_on_a_gpu_where_launches_take_the_time() -> None:
    plan = plan_passes(training(), MEMORY, 200, 5000, "cuda")
    assert (plan.tokens, plan.gradient_checkpointing) == (8192, True)


def test_a_resumed_run_keeps_its_passes_if_they_fit() -> None:
    assert plan_passes(training(), MEMORY, 200, 5000, "cpu", begun=256).tokens == 256
    assert plan_passes(training(), MEMORY, 200, 5000, "cpu", begun=2048).tokens == 2048
    assert plan_passes(training(gradient_checkpointing=False), MEMORY, 200, 5000, "cpu", begun=2048).tokens == 512
    assert plan_passes(training(tokens_per_pass=900), MEMORY, 200, 5000, "cpu", begun=256).tokens == 900


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=60),
    st.integers(1, 20),
    st.booleans(),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_no_step_has_more_tokens_than_the_bound(
    lengths: list[int], batch_size: int, packing: bool, processes: int, seed: int
) -> None:
    bound = largest_step(np.array(lengths), training(batch_size=batch_size, packing=packing), processes)
    for process in range(processes):
        layout = PassLayout(10**6, 10**6, packing, processes, process)
        for passes in StepSampler(lengths, batch_size, seed, layout):
            sizes = [[lengths[row] for row in one] for one in passes]
            assert sum(sum(one) if packing else max(one, default=0) * len(one) for one in sizes) <= bound


def test_activations_are_computed_again_only_where_they_do_not_fit(
    sft: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ("--training.tokens_per_pass", "4096")
    with counted_attention(monkeypatch) as roomy_calls:
        assert sft("roomy", *whole).exit_code == 0
    monkeypatch.setattr("loratune.training.activations.free_memory_bytes", lambda hardware: 10_000)
    with counted_attention(monkeypatch) as tight_calls:
        tight = sft("tight", *whole)
    assert tight.exit_code == 0
    assert "gradient checkpointing" in " ".join(tight.stderr.split())
    with counted_attention(monkeypatch) as forced_calls:
        forced = sft("forced", *whole, "--no-training.gradient_checkpointing")
    assert " about " in tight.stderr
    assert " about " not in forced.stderr
    # Two layers in three steps are gone through a second time; the look beforehand once more.
    assert len(tight_calls) >= len(roomy_calls) + 2 * 3
    assert len(forced_calls) == len(roomy_calls) - 2
    reports = {name: json.loads((tmp_path / name / "report.json").read_text()) for name in ("roomy", "tight", "forced")}
    assert {name: report["gradient_checkpointing"] for name, report in reports.items()} == {
        "roomy": False, "tight": True, "forced": False,
    }  # fmt: skip
    weights = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in reports]
    for name, values in weights[0].items():
        for other in weights[1:]:
            torch.testing.assert_close(values, other[name], atol=1e-6, rtol=1e-5)
