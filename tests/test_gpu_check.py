"""The program that measures loratune on a GPU, with planted checks, and one real check on the CPU."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLANTED = """
import os, subprocess, sys, time
from pathlib import Path

def passes(place): return {"figure": 2, "note": "of a planted check"}
def fails(place): return {"figure": 4, "other": 1}
def breaks(place): raise ValueError("no such card")
def dies(place): os._exit(9)
def hangs(place):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    (place.folder / "child").write_text(str(child.pid))
    time.sleep(60)
"""
CARD = {"card": "a card", "torch": "1"}


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, imported as the program does it."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("gpu_checks.runner")


@pytest.fixture
def planted(checks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run planted checks by name; returns the exit code and what the file says of each."""
    table = importlib.import_module("gpu_checks.table")
    package = tmp_path / "planted"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "checks.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    bounds = (table.Bound("figure", "≤", 3), table.Bound("other", "≥", 1, "gpu"))

    def run(*names: str, is_gpu: bool = False, needs_gpu: bool = False, machine: Any = CARD) -> Any:
        limits = {"hangs": 3}
        rows = [table.Check(name, f"planted.checks:{name}", limits.get(name, 60), needs_gpu, bounds) for name in names]
        code = checks.run_checks(rows, table.Workplace(tmp_path, is_gpu), machine, tmp_path / "out" / "figures.json")
        return code, json.loads((tmp_path / "out" / "figures.json").read_text())

    return run


def test_the_table_is_the_whole_plan_and_every_function_is_there(checks: Any) -> None:
    table = importlib.import_module("gpu_checks.table")
    assert len(table.CHECKS) == 22
    assert len({check.name for check in table.CHECKS}) == 22
    for check in table.CHECKS:
        module, _, name = check.function.partition(":")
        source = (ROOT / "scripts" / "gpu_checks" / f"{module}.py").read_text(encoding="utf-8")
        assert f"def {name}(place: Workplace) -> Figures:" in source
        assert check.bounds
        for bound in check.bounds:
            parts = bound.figure.split(": ")
            assert all(part in source or part.partition(" ")[0] in source for part in parts), bound.figure
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert [check.name for check in table.CHECKS if f"| `{check.name}` |" not in page] == []
    # No stage of the plan may be dropped on a GPU, and what runs on a CPU is bounded there or measured only.
    assert [check.name for check in table.CHECKS if check.needs_gpu] == [
        "step_profile", "training_speed", "other_types", "small_card", "out_of_memory", "cache_memory",
        "family_speed",
    ]  # fmt: skip
    assert all(bound.on == "gpu" for check in table.CHECKS if check.needs_gpu for bound in check.bounds)


def test_a_bound_that_holds_is_ok_and_the_file_is_read_back(planted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = planted("passes")
    assert code == 0
    assert found["machine"] == CARD
    assert found["checks"]["passes"]["status"] == "ok"
    assert found["checks"]["passes"]["figures"] == {"figure": 2, "note": "of a planted check"}
    assert "figure 2 ≤ 3  ok" in capsys.readouterr().out


def test_a_missed_bound_fails_and_so_does_a_figure_that_is_missing(
    planted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = planted("fails", "passes", is_gpu=True)
    assert code == 1
    assert found["checks"]["fails"]["missed"] == ["figure 4 ≤ 3"]
    assert found["checks"]["passes"]["missed"] == ["other missing ≥ 1"]
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("figure 4 ≤ 3, other 1 ≥ 1  FAIL")
    assert second.endswith("other missing ≥ 1, figure 2 ≤ 3  FAIL")


@pytest.mark.parametrize("value", [float("nan"), None, "1"])
def test_what_is_no_number_is_within_no_bound(checks: Any, value: Any) -> None:
    table = importlib.import_module("gpu_checks.table")
    assert not any(table.Bound("figure", relation, 1).holds({"figure": value}) for relation in ("≤", "≥", "="))


def test_an_exception_and_a_death_are_failures_with_their_reason(
    planted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = planted("breaks", "dies")
    assert code == 1
    assert found["checks"]["breaks"]["reason"] == "ValueError: no such card"
    assert "ended with 9" in found["checks"]["dies"]["reason"]
    assert "ValueError: no such card  FAIL" in capsys.readouterr().out


def test_a_check_that_hangs_is_ended_with_all_that_it_has_started(planted: Any, tmp_path: Path) -> None:
    code, found = planted("hangs")
    assert code == 1
    assert "not done after 3 s" in found["checks"]["hangs"]["reason"]
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_without_a_gpu_its_checks_are_skipped_with_the_reason(planted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = planted("fails", needs_gpu=True)
    assert code == 0
    assert (found["checks"]["fails"]["status"], found["checks"]["fails"]["reason"]) == ("skipped", "needs a GPU")
    assert capsys.readouterr().out.rstrip().endswith("skipped (needs a GPU)")


def test_a_later_call_adds_to_the_file_unless_it_is_of_another_machine(planted: Any) -> None:
    planted("fails")
    assert {*planted("passes")[1]["checks"]} == {"fails", "passes"}
    assert {*planted("passes", machine={"card": "another"})[1]["checks"]} == {"passes"}


def program(*words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / "gpu_check", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, **settings)


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        ((), range(22)),
        (("6-7",), range(6, 8)),
        (("merge", "0"), (0, 13)),
        (("--from", "decoding"), range(11, 22)),
        (("--from", "3", "0-4"), (3, 4)),
    ],
)
def test_stages_are_chosen_by_name_number_and_range(checks: Any, words: tuple[str, ...], numbers: Any) -> None:
    stages = [word for word in words if word != "--from"]
    start = stages.pop(0) if "--from" in words else None
    chosen = script().chosen(stages, start)
    table = importlib.import_module("gpu_checks.table")
    assert [table.CHECKS.index(check) for check in chosen] == list(numbers)


def script() -> Any:
    """The program as a module."""
    from importlib.machinery import SourceFileLoader
    from importlib.util import module_from_spec, spec_from_loader

    loader = SourceFileLoader("gpu_check", str(ROOT / "scripts" / "gpu_check"))
    spec = spec_from_loader("gpu_check", loader)
    assert spec
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_an_unknown_stage_is_refused_with_the_names(checks: Any) -> None:
    with pytest.raises(SystemExit, match="no check is called speeds; there are environment"):
        script().chosen(["speeds"], None)


def test_without_a_gpu_the_program_says_so_and_a_real_check_runs(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}
    words = (
        "environment",
        "training_speed",
        "--json",
        str(tmp_path / "figures.json"),
        "--work",
        str(tmp_path / "work"),
    )
    done = program(*words, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    first, environment_line, speed_line, last = done.stdout.splitlines()
    assert "no GPU" in first
    assert environment_line.endswith("ok")
    assert speed_line.endswith("skipped (needs a GPU)")
    assert last.endswith("figures.json")
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["machine"]["card"] is None
    assert found["checks"]["environment"]["figures"]["versions"]["torch"]


def test_kernels_that_are_wrong_are_found(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from loratune.model.kernels import lora_linear

    kernels = importlib.import_module("gpu_checks.kernels")
    layer = kernels.dense_layer(64, torch.float32, torch.device("cpu"))
    right = kernels.linear_errors(layer, torch.float32, kernels.DROPOUT)
    assert all(own < 1e-5 and plain < 1e-5 for own, plain in right.values()), right
    add = lora_linear._add_branch
    monkeypatch.setattr(lora_linear, "_add_branch", lambda grad, through_b, *rest: add(grad, through_b * 1.01, *rest))
    wrong = kernels.linear_errors(kernels.dense_layer(64, torch.float32, torch.device("cpu")), torch.float32, 0.0)
    assert wrong["linear dx"][0] > 1e-5 > wrong["linear dx"][1]
    found = kernels.summary({"float32": wrong, "bfloat16": {"linear y": (3e-3, 2e-3), "linear dA": (4e-3, 1e-7)}})
    assert found["float32 error"] == wrong["linear dx"][0]
    assert found["bfloat16 error / plain"] == pytest.approx(1.5)
    assert found["error of dA and dB"] == 4e-3


def test_documents_that_see_each_other_are_found(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from loratune.model.kernels import packed_attention

    kernels = importlib.import_module("gpu_checks.kernels")
    monkeypatch.setattr(kernels, "DOCUMENTS", (1, 7, 40))
    device = torch.device("cpu")
    right = kernels.attention_errors(False, torch.float32, device)
    assert all(own < 1e-5 for own, _ in right.values()), right
    monkeypatch.setattr(packed_attention, "_document_lengths", lambda query, settings: [query.shape[2]])
    wrong = kernels.attention_errors(False, torch.float32, device)
    assert all(own > 1e-3 for own, _ in wrong.values()), wrong


def test_a_profile_counts_launches_waits_and_the_busy_share(checks: Any) -> None:
    from types import SimpleNamespace

    from torch.autograd import DeviceType

    profiles = importlib.import_module("gpu_checks.profiles")

    def event(name: str, start: float = 0, end: float = 0, device: Any = DeviceType.CPU) -> Any:
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end))

    gpu = DeviceType.CUDA
    events = [
        event("cudaLaunchKernel"), event("cudaLaunchKernelExC"), event("cudaMemcpyAsync"), event("aten::mm"),
        event("cudaStreamSynchronize"), event("cudaDeviceSynchronize"),
        event("gemm", 10, 20, gpu), event("norm", 15, 30, gpu), event("Memcpy HtoD (Pageable -> Device)", 40, 50, gpu),
    ]  # fmt: skip
    assert profiles.summary(events, own_waits=1) == {"launches": 2, "waits": 1, "copies": 1, "GPU busy": 0.75}
    assert profiles.busy_share([]) == 0


def test_rows_have_about_the_lengths_that_are_asked_for(checks: Any) -> None:
    from transformers import AutoTokenizer

    models = importlib.import_module("gpu_checks.models")
    tokenizer = AutoTokenizer.from_pretrained(models.TINY_QWEN)
    wanted = [40, 90, 400, 1000]
    rows = models.rows_of(wanted)
    for row, length in zip(rows, wanted, strict=True):
        turns = [("user", row["instruction"]), ("assistant", row["output"])]
        messages = [{"role": role, "content": text} for role, text in turns]
        assert length - 12 <= len(tokenizer.apply_chat_template(messages, return_dict=False)) <= length
    assert len({row["instruction"] for row in rows}) == len(rows)


def test_a_speed_counts_tokens_without_the_warm_up(
    checks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = importlib.import_module("gpu_checks.commands")
    seen = {"seconds": [9.0, 1.0, 4.0], "tokens": [10, 10, 20], "losses": [3.0, 2.0, 1.0]}
    seen |= {"allocated": 1, "reserved": 2, "profile": {}}

    def run(command: list[Any]) -> Any:
        command[3].write_text(json.dumps(seen))
        return commands.Finished(0, "", "", 0.0)

    monkeypatch.setattr(commands, "run", run)
    found = commands.clocked(tmp_path, ["-m", "loratune"], warm_up=1)
    assert found.tokens_per_second == pytest.approx(6)
    assert found.token_seconds == pytest.approx([0.1, 0.2])
    with pytest.raises(RuntimeError, match="of which 3 are warm-up"):
        commands.clocked(tmp_path, ["-m", "loratune"], warm_up=3)


def test_no_function_of_a_check_is_longer_than_a_screen(checks: Any) -> None:
    for path in (ROOT / "scripts" / "gpu_checks").glob("*.py"):
        module = path.stem
        if module in ("clocked", "child"):  # programs
            continue
        found = inspect.getmembers(importlib.import_module(f"gpu_checks.{module}"), inspect.isfunction)
        for name, function in found:
            if function.__module__ == f"gpu_checks.{module}":
                assert len(inspect.getsourcelines(function)[0]) < 60, f"{module}.{name}"


@pytest.fixture
def place(tmp_path: Path) -> Any:
    return importlib.import_module("gpu_checks.table").Workplace(tmp_path, is_gpu=False)


def missed(name: str, figures: dict[str, Any]) -> list[str]:
    """The figures of a check that are out of their bounds."""
    (check,) = (check for check in importlib.import_module("gpu_checks.table").CHECKS if check.name == name)
    return [bound.figure for bound in check.bounds if bound.is_required(is_gpu=False) and not bound.holds(figures)]


def whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recurrent layers compute a row as one document, and the probe that would see it is off."""
    from loratune.model.kernels import packed_rows
    from loratune.training.probes import isolation

    monkeypatch.setattr(packed_rows, "_by_document", lambda forward, row, documents: forward(row))
    monkeypatch.setattr(isolation, "why_not_apart", lambda model: "")


def blind_control(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without boundaries no document sees another either."""
    families = importlib.import_module("gpu_checks.families")
    leak = families.leak
    monkeypatch.setattr(families, "leak", lambda model, rows, has_boundaries=True: leak(model, rows))


def twice_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    from loratune.model.kernels import linear_cross_entropy

    plain = linear_cross_entropy.summed_loss

    def doubled(*given: Any, **settings: Any) -> Any:
        losses = plain(*given, **settings)
        return losses._replace(total=2 * losses.total)

    monkeypatch.setattr(linear_cross_entropy, "summed_loss", doubled)


@pytest.mark.parametrize(
    ("kind", "fault", "expected"),
    [
        ("lfm2", None, []),
        ("lfm2", whole_rows, ["leaking", "float32 error", "packed beside padded", "error / plain"]),
        ("lfm2", blind_control, ["blind controls"]),
        ("qwen3_moe", twice_the_loss, ["float32 error", "error / plain"]),
    ],
    ids=["right", "leak", "blind", "gradient"],
)
def test_packed_passes_of_a_family_that_are_wrong_are_found(
    checks: Any, place: Any, monkeypatch: pytest.MonkeyPatch, kind: str, fault: Any, expected: list[str]
) -> None:
    families = importlib.import_module("gpu_checks.families")
    monkeypatch.setattr(families, "KINDS", (kind,))
    monkeypatch.setattr(families, "ATTENTIONS", ("auto",))
    if fault:
        fault(monkeypatch)
    found = families.families(place)
    assert missed("families", found) == expected, found


def test_kernels_of_recurrent_layers_can_be_left_out(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_kernels import Kernels
    from transformers.models.lfm2 import modeling_lfm2

    families = importlib.import_module("gpu_checks.families")
    plain = modeling_lfm2.causal_conv1d_fn.__wrapped__
    Kernels(monkeypatch, "lfm2", "causal_conv1d_fn")
    with_kernel = modeling_lfm2.causal_conv1d_fn
    with families.without_kernels("lfm2"):
        assert modeling_lfm2.causal_conv1d_fn is plain
    assert modeling_lfm2.causal_conv1d_fn is with_kernel


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_quantised_stack_that_is_wrong_is_found(
    checks: Any, place: Any, monkeypatch: pytest.MonkeyPatch, is_wrong: bool
) -> None:
    from loratune.model.weights import quantized_stack

    if is_wrong:
        dequantised = quantized_stack.QuantizedMatrix.dequantised
        monkeypatch.setattr(quantized_stack.QuantizedMatrix, "dequantised", lambda self: 1.01 * dequantised(self))
    nf4_mixture = importlib.import_module("gpu_checks.nf4_mixture")
    found = nf4_mixture.nf4_mixture(place)
    assert missed("nf4_mixture", found) == (["float32 error"] if is_wrong else []), found


@pytest.mark.parametrize("is_wrong", [False, True])
def test_scales_of_other_rows_are_found(
    checks: Any, place: Any, monkeypatch: pytest.MonkeyPatch, is_wrong: bool
) -> None:
    from loratune.model import base
    from loratune.model.sharding import quantized_shards

    monkeypatch.setattr(base, "is_to_be_sharded", base.is_to_be_sharded)  # which the check replaces
    if is_wrong:
        state = quantized_shards.state_of_scales
        monkeypatch.setattr(quantized_shards, "state_of_scales", lambda scales, *rest: state(scales.flip(0), *rest))
    sharding = importlib.import_module("gpu_checks.sharding")
    assert missed("sharding", sharding.sharding(place)) == (["largest error"] if is_wrong else [])


def test_a_stack_with_wide_scales_is_found(checks: Any, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratune.model.weights import quantizer

    quantize = quantizer.quantize_stack
    monkeypatch.setattr(quantizer, "quantize_stack", lambda values, double: quantize(values, False))
    nf4_mixture = importlib.import_module("gpu_checks.nf4_mixture")
    assert "stack bytes / bfloat16" in missed("nf4_mixture", nf4_mixture.nf4_mixture(place))


@pytest.mark.parametrize("is_wrong", [False, True])
def test_states_that_are_not_cleared_are_found(
    checks: Any, place: Any, monkeypatch: pytest.MonkeyPatch, is_wrong: bool
) -> None:
    from loratune.engine.slot_states import SlotStates

    slots = importlib.import_module("gpu_checks.slots")
    monkeypatch.setattr(slots, "KINDS", ("lfm2",))
    if is_wrong:
        begin = SlotStates.begin
        monkeypatch.setattr(SlotStates, "begin", lambda self, slot, source: begin(self, slot, slot))
    assert missed("slots", slots.slots(place)) == (["lowest share of equal tokens"] if is_wrong else [])


def test_a_hybrid_s_run_that_fails_is_found(checks: Any, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid_run = importlib.import_module("gpu_checks.hybrid_run")
    commands = importlib.import_module("gpu_checks.commands")
    monkeypatch.setattr(hybrid_run, "loratune", lambda *words: commands.Finished(1, "", "no memory", 0.0))
    expected = ["wrong exit codes", "highest last loss / first", "highest mean KL of a proof"]
    assert missed("hybrid_run", hybrid_run.hybrid_run(place)) == expected
