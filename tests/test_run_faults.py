"""What can happen to a run from outside: odd names, other versions, unreadable files, several programs at once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROWS, tree
from processes import Program, comes_true
from safetensors.torch import load_file
from typer.testing import Result

from loratune.data.assembly.batches import PassRows
from loratune.errors import Exit, LoratuneError
from loratune.model.hardware import detect_hardware
from loratune.recipe.sections import Recipe
from loratune.runs import lock
from loratune.runs.checkpoint import Checkpoint, open_checkpoint, step_folder
from loratune.runs.folder import CHECKPOINTS, read_metrics
from loratune.runs.lock import lock_holder, run_lock
from loratune.runs.manifest import Manifest, TrainedBase, TrainedTemplate
from loratune.runs.output import begin_run, prepare_output
from loratune.runs.status import set_status
from loratune.training.checkpoints.keeper import CheckpointKeeper
from loratune.training.checkpoints.resuming import BEST_EXACT, check_identity, find_start, identity_of
from loratune.training.trainer import AdapterTrainer
from loratune.writing import folder_in_one_step

Sft = Callable[..., Result]
WEIGHTS = "adapter_model.safetensors"


def slow(*values: Any) -> Any:
    """A case that costs a training and says little more than the one before it."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def sft(cli: Callable[..., Result], random_qwen: Path, rows_file: Path, tmp_path: Path) -> Sft:
    """Train four steps, with a checkpoint after every second; more flags may be given."""

    def run(*flags: Any, output: Any = tmp_path / "run") -> Result:
        validation = () if "--data.validation" in flags else ("--data.validation", "0")
        steps = () if "--training.max_steps" in flags else ("--training.max_steps", "4")
        return cli(
            "sft", "--model.base", random_qwen, "--model.dtype", "float32", "--data.train", rows_file, *validation,
            "--training.batch_size", "4", *steps, "--checkpoints.every_steps", "2", "--output", output,
            *flags,
        )  # fmt: skip

    return run


@pytest.fixture
def finished(short_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(short_run, tmp_path / "finished")


def words(text: str) -> str:
    return " ".join(text.split())


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(run / "adapter" / WEIGHTS))


def reseal(checkpoint: Path, **changes: Any) -> None:
    """Write a checkpoint's seal anew, as a program would have that differs in some values."""
    values = json.loads((checkpoint / "checkpoint.json").read_text())
    del values["sha256"]
    values |= changes
    sha256 = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    (checkpoint / "checkpoint.json").write_text(json.dumps(values | {"sha256": sha256}))


# --- where it goes ---


@pytest.mark.parametrize("name", ["with space/deep", "new\nline", "模型 é", "-dash", "'quoted\"$HOME", "x" * 255])
def test_any_folder_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.model_validate({"model": {"base": "x"}, "data": {"train": ["a.json"]}, "output": name})
    prepare_output(Path(name), overwrite=False)
    with run_lock(Path(name)):
        begin_run(Path(name), recipe, Manifest())
        with folder_in_one_step(Path(name) / "adapter") as folder:
            (folder / "weights").write_text("w")
    prepare_output(Path(name), overwrite=True)
    assert (Path(name) / "adapter" / "weights").read_text() == "w"


def test_a_run_in_an_odd_folder_goes_all_the_way(
    sft: Sft, cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "-a 模\n'型\"$HOME"
    assert sft(output=name).exit_code == 0
    assert sft("--resume", output=name).exit_code == 0
    shown = cli("runs", "show", f"./{name}", "--json")
    assert json.loads(shown.stdout)["state"] == "finished"
    assert cli("merge", "--adapter", name, "--output", f"{name}2", "--no-logits").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{name}2", "rows.json"}


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("file", Exit.IO),
        ("file/below", Exit.IO),
        ("fifo", Exit.IO),
        ("dangling", Exit.IO),
        ("dangling/below", Exit.IO),
        ("loop", Exit.IO),
        ("/proc/nowhere/run", Exit.IO),
        ("/dev/null", Exit.IO),
        ("n" * 256, Exit.USAGE),
        ("n/" * 3000 + "n", Exit.USAGE),
        ("zero\0byte", Exit.USAGE),
        (".", Exit.USAGE),
        ("mine", Exit.USAGE),
        ("/", Exit.USAGE),
    ],
    ids=lambda value: str(value)[:20].replace("\0", "0"),
)
def test_a_folder_that_cannot_be_had_is_refused_before_anything_is_read(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, code: Exit
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    os.mkfifo("fifo")
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    Path("mine").mkdir()
    Path("mine/manifest.json").write_text("{}")
    before = tree(tmp_path)
    result = cli(
        "sft", "--model.base", "no/model", "--data.train", "missing.json", "--output", place, "--overwrite",
        env={"COLUMNS": "20000"},
    )  # fmt: skip
    assert (result.exit_code, result.stdout) == (code, ""), repr(result.exception)[:300]
    assert result.stderr.count("error: ") == 1
    assert "missing.json" not in result.stderr
    assert place.replace("\0", "") in result.stderr
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_a_link_to_a_folder_is_followed(sft: Sft, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to("elsewhere")
    assert sft("--training.max_steps", "1").exit_code == 0
    assert (tmp_path / "run").is_symlink()
    assert (tmp_path / "elsewhere" / "adapter" / WEIGHTS).is_file()


def test_the_home_folder_may_be_written_as_in_a_shell(
    sft: Sft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    result = sft("--training.max_steps", "1", output="~/out/run")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "home" / "out" / "run" / "checkpoints" / "step-000001").is_dir()
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize(("mask", "file_mode"), [(0o077, 0o600), slow(0o022, 0o644), slow(0o002, 0o664)])
def test_every_file_and_folder_obeys_the_umask_and_the_folder_s_group(
    sft: Sft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: int, file_mode: int
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_hidden")
    monkeypatch.setenv("WANDB_API_KEY", "hf_hidden")
    others = [group for group in os.getgroups() if group != os.getegid()] or [54321] * (os.geteuid() == 0)
    (tmp_path / "shared").mkdir()
    if others:
        os.chown(tmp_path / "shared", -1, others[0])
    (tmp_path / "shared").chmod(0o2770)
    before = os.umask(mask)
    try:
        result = sft("--tracking.report_to", "tensorboard", output=tmp_path / "shared" / "run")
    finally:
        os.umask(before)
    assert result.exit_code == 0, result.stderr
    run = tmp_path / "shared" / "run"
    paths = [run, *run.rglob("*")]
    assert {"events", "optimizer", "adapter_model", "loss"} <= {path.name.split(".")[0] for path in paths}
    for path in paths:
        about = path.stat()
        wanted = file_mode if path.is_file() else 0o2777 & ~mask
        assert (stat.S_IMODE(about.st_mode), path) == (wanted, path)
        assert about.st_gid == (tmp_path / "shared").stat().st_gid
        assert path.is_dir() or b"hf_hidden" not in path.read_bytes()  # a secret of the environment


# --- several at once ---


def test_of_many_that_start_together_one_gets_the_folder(tmp_path: Path) -> None:
    for attempt in range(5):
        output, together, held = tmp_path / f"run{attempt}", threading.Barrier(16), threading.Event()
        results: list[str] = []

        def start(
            output: Path = output,
            together: threading.Barrier = together,
            held: threading.Event = held,
            results: list[str] = results,
        ) -> None:
            together.wait()
            try:
                prepare_output(output, overwrite=False)
                with run_lock(output):
                    results.append("got it")
                    held.wait(60)
            except LoratuneError as error:
                results.append(f"{int(error.exit_code)} {error}")

        threads = [threading.Thread(target=start) for _ in range(16)]
        for thread in threads:
            thread.start()
        while len(results) < 16:
            time.sleep(0.01)
        held.set()
        for thread in threads:
            thread.join()
        assert results.count("got it") == 1
        assert sum(text.startswith("2 ") and "is in use by" in text for text in results) == 15
        assert not output.exists()


@pytest.mark.slow
def test_two_programs_started_in_the_same_second_do_not_mix(
    start: Callable[..., Program], random_qwen: Path, rows_file: Path, tmp_path: Path
) -> None:
    command = (
        "sft", "--model.base", random_qwen, "--data.train", rows_file, "--training.max_steps", "1000000",
        "--checkpoints.every_steps", "1000000", "--output", tmp_path / "run", "--overwrite",
    )  # fmt: skip
    both = [start(*command) for _ in range(2)]
    assert comes_true(lambda: any(program.has_ended() for program in both))
    refused, training = sorted(both, key=lambda program: not program.has_ended())
    assert refused.exit_code() == Exit.USAGE
    assert f"process {training.pid} on" in words(refused.stderr)
    records = tmp_path / "run" / "metrics.jsonl"
    assert comes_true(lambda: records.is_file() and records.read_text().count("\n") > 3), training.stderr
    training.send(signal.SIGTERM)
    assert training.exit_code() == 128 + signal.SIGTERM, training.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "interrupted"
    steps = [json.loads(line)["step"] for line in records.read_text().splitlines() if "loss" in json.loads(line)]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("part", [".", "adapter", "checkpoints/step-000004"])
@pytest.mark.parametrize(
    "command", [["merge"], ["export", "--format", "gguf"], ["export", "--format", "adapter"]], ids=str
)
def test_nothing_is_made_of_a_run_while_it_trains(
    cli: Callable[..., Result], finished: Path, output: Path, part: str, command: list[str]
) -> None:
    before = tree(finished)
    with run_lock(finished):
        result = cli(*command, "--adapter", finished / part, "--output", output, env={"COLUMNS": "400"})
    assert (result.exit_code, result.stdout) == (Exit.USAGE, "")
    assert f"in use by process {os.getpid()} on {socket.gethostname()}" in result.stderr
    assert tree(finished) == before
    assert list(output.parent.iterdir()) == []


def test_nor_of_several_of_which_one_trains(
    cli: Callable[..., Result], finished: Path, short_run: Path, output: Path
) -> None:
    adapters = ["--adapter", f"a={short_run}", "--adapter", f"b={finished}", "--weights", "0.5,0.5"]
    with run_lock(finished):
        assert cli("merge", *adapters, "--output", output).exit_code == Exit.USAGE
    assert cli("merge", *adapters, "--output", output, "--no-logits").exit_code == 0


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_still_trains_is_told_as_such(tmp_path: Path, overwrite: bool) -> None:
    output = tmp_path / "run"
    with run_lock(output):
        set_status(output, "running")
        step_folder(output / CHECKPOINTS, 1).mkdir(parents=True)
        with pytest.raises(LoratuneError, match=f"is in use by process {os.getpid()} on .*; wait for it"):
            prepare_output(output, overwrite)
    with nullcontext() if overwrite else pytest.raises(LoratuneError, match="go on with it with --resume"):
        prepare_output(output, overwrite)


def test_a_lock_that_may_not_be_taken_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ReadOnly:
        def __init__(self, path: Path) -> None:
            assert path.name == ".lock"

        def acquire(self, timeout: float) -> None:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lock, "FileLock", ReadOnly)
    assert lock_holder(tmp_path) is None
    (tmp_path / ".lock").touch()
    assert lock_holder(tmp_path) is None
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        ended.wait()
    here = socket.gethostname()
    for owner, holder in [
        ({"pid": os.getpid(), "host": here}, f"process {os.getpid()} on {here}"),
        ({"pid": ended.pid, "host": here}, None),
        ({"pid": 1, "host": "another"}, "process 1 on another"),
        ({"pid": "x", "host": here}, None),
        ({"pid": -(10**30), "host": here}, None),
        ([], None),
    ]:
        (tmp_path / ".lock-owner.json").write_text(json.dumps(owner))
        assert lock_holder(tmp_path) == holder


# --- other versions ---


def test_a_checkpoint_of_other_versions_goes_on_with_a_warning_that_names_both(
    cli: Callable[..., Result], finished: Path
) -> None:
    checkpoint = finished / "checkpoints" / "step-000004"
    identity = open_checkpoint(checkpoint).identity
    own = identity["versions"]["torch"]
    identity["versions"] |= {"torch": "1.2.3", "peft": "0.0.1"}
    reseal(checkpoint, identity=identity)
    result = cli(
        "sft", "--config", finished / "recipe.yaml", "--output", finished, "--resume", "--training.max_steps", "6",
        "--training.scheduler", "cosine",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    said = words(result.stderr)
    assert f"torch: 1.2.3 → {own}" in said
    assert "peft: 0.0.1 →" in said
    assert "training.max_steps: 4 → 6" in said
    assert "steps after 4 follow the learning rate schedule of the longer run" in said


def test_an_int8_run_of_an_earlier_version_says_that_its_bits_may_differ(sft: Sft, tmp_path: Path) -> None:
    flags = ("--model.quantization", "int8", "--evaluation.questions_share", "0", "--lora.dropout", "0")
    assert sft(*flags).exit_code == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    shutil.rmtree(tmp_path / "run" / "adapter")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    progress = open_checkpoint(checkpoint).progress
    assert progress.pop("packed") is True
    (tmp_path / "run" / "status.json").write_text('{"program": "loratune", "state": "running"}')
    reseal(checkpoint, progress=progress)
    resumed = sft(*flags, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert "which computed LoRA beside int8 in other steps and may have padded rows" in words(resumed.stderr)


def test_a_checkpoint_of_another_format_is_refused_and_never_gone_back_behind(
    cli: Callable[..., Result], finished: Path
) -> None:
    checkpoints = finished / "checkpoints"
    shutil.copytree(checkpoints / "step-000004", checkpoints / "step-000006")
    reseal(checkpoints / "step-000006", format_version=2, step=6)
    before = tree(finished)
    for flags in (["--resume"], ["--resume", "auto"], ["--resume", "6"]):
        result = cli("sft", "--config", finished / "recipe.yaml", "--output", finished, *flags)
        assert result.exit_code == Exit.MODEL
        assert "step-000006: written in format 2, this loratune reads 1" in words(result.stderr)
        assert tree(finished) == before
    earlier = cli("sft", "--config", finished / "recipe.yaml", "--output", finished, "--resume", "4")
    assert "is complete: step 4 of 4" in words(earlier.stderr)


def test_any_setting_that_an_adapter_hangs_on_keeps_a_run_from_going_on(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"model": {"base": "x"}, "data": {"train": ["a.json"]}})
    manifest = Manifest(TrainedBase("x", "/x", {"weights_sha256": "0"}), TrainedTemplate("1"))
    identity = identity_of(recipe, manifest, detect_hardware())
    assert {"model.base", "training.packing", "training.max_length", "prompt.template", "lora.layers"} <= set(
        identity["settings"]
    )
    for part in ("settings", "rest"):
        for name in identity[part].keys() - {"evaluation.early_stopping"}:
            shorter = name in ("training.epochs", "training.max_steps")
            other = {**identity, part: identity[part] | {name: 1000 if shorter else "another"}}
            with pytest.raises(LoratuneError, match=re.escape(name)) as caught:
                check_identity(Checkpoint(tmp_path, 2, other, {BEST_EXACT: None}), identity, allow_changes=False)
            assert caught.value.exit_code == Exit.USAGE
    check_identity(Checkpoint(tmp_path, 2, identity, {BEST_EXACT: None}), identity, allow_changes=False)


# --- numbers that go bad, rows that cannot be read ---


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, happens: Callable[[Any], None]) -> None:
    """Let something happen after a step's backward pass."""
    plain = AdapterTrainer.training_step

    def training_step(self: Any, *arguments: Any, **settings: Any) -> Any:
        loss = plain(self, *arguments, **settings)
        if self.state.global_step == step - 1:
            happens(self.model)
        return loss

    monkeypatch.setattr(AdapterTrainer, "training_step", training_step)


@pytest.mark.parametrize("value", [float("nan"), slow(float("inf"))])
@pytest.mark.parametrize(
    ("flags", "told"),
    [slow([], "diverged at step 4: loss"), (["--training.max_grad_norm", "0"], "weights are not finite")],
    ids=["clipped", "not clipped"],
)
def test_a_gradient_that_is_no_number_ends_the_run_even_in_its_last_step(
    sft: Sft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], told: str, value: float
) -> None:
    def spoil(model: Any) -> None:
        next(weight for weight in model.parameters() if weight.grad is not None).grad.fill_(value)

    at_step(monkeypatch, 4, spoil)
    result = sft(*flags)
    assert result.exit_code == Exit.DIVERGED
    assert told in words(result.stderr)
    assert not (tmp_path / "run" / "adapter").exists()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]


def test_a_signal_saves_no_step_whose_weights_are_no_numbers(
    sft: Sft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil_and_stop(model: Any) -> None:
        next(weight for weight in model.parameters() if weight.grad is not None).grad.fill_(float("nan"))
        os.kill(os.getpid(), signal.SIGTERM)

    at_step(monkeypatch, 3, spoil_and_stop)
    result = sft("--tracking.every_steps", "50")  # which would tell of the loss first
    assert result.exit_code == Exit.DIVERGED, result.stderr
    assert "at or before step 3: the adapter's weights are not finite" in words(result.stderr)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), slow(ValueError("bad"))], ids=repr)
def test_rows_that_can_no_longer_be_read_end_the_run_with_one_message(
    sft: Sft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    plain, broken = PassRows.__getitem__, threading.Event()

    def read(self: PassRows, numbers: list[int]) -> Any:
        if broken.is_set():
            raise error
        return plain(self, numbers)

    monkeypatch.setattr(PassRows, "__getitem__", read)
    at_step(monkeypatch, 3, lambda _: broken.set())
    result = sft()
    assert result.exit_code == Exit.DATA, result.stderr
    said = words(result.stderr)
    assert str(error) in said
    assert "--resume" in said
    assert "Traceback" not in said
    broken.clear()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    monkeypatch.undo()
    assert sft("--resume").exit_code == 0


def test_metrics_that_a_crash_has_cut_off_are_mended(sft: Sft, tmp_path: Path) -> None:
    assert sft(output=tmp_path / "whole").exit_code == 0
    assert sft().exit_code == 0
    run = tmp_path / "run"
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for end in (lines[-1][: len(lines[-1]) // 2], b'{"step": "x"}\n[1]\n\n{"loss": 1}\n', b"\xff\x00\x00{"):
        (run / "metrics.jsonl").write_bytes(b"".join(lines[:-1]) + end)
        assert [record["step"] for record in read_metrics(run)] == [1, 2, 3]
    (run / "status.json").write_text('{"program": "loratune", "state": "running"}')
    shutil.rmtree(run / "checkpoints" / "step-000004")
    resumed = sft("--resume")
    assert resumed.exit_code == 0, resumed.stderr
    mine, other = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, tmp_path / "whole")
    )
    assert [(one["step"], one["loss"]) for one in mine] == [(one["step"], one["loss"]) for one in other]


@pytest.mark.slow
def test_packed_rows_keep_apart_whatever_computes_attention(
    cli: Callable[..., Result], rows_file: Path, tmp_path: Path
) -> None:
    losses = []
    for number, flags in enumerate(
        (
            ["--no-training.packing"],
            [],
            ["--model.attn_implementation", "sdpa"],
            ["--model.attn_implementation", "eager"],
        )
    ):
        run = tmp_path / f"run{number}"
        result = cli(
            "sft", "--model.base", "tiny-qwen", "--model.dtype", "float32", "--data.train", rows_file,
            "--data.validation", "0", "--training.max_steps", "1", "--training.batch_size", "12",
            "--training.batch_size", "4", "--output", run, *flags,
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        losses.append(json.loads((run / "metrics.jsonl").read_text())["loss"])
    assert losses == pytest.approx(losses[:1] * 4, rel=1e-5)


# --- stopped, and no more to do ---


def test_a_signal_while_a_model_is_read_leaves_nothing(
    sft: Sft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratune.training.session.load_base", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert sft().exit_code == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["trainer", "run"])
def test_a_signal_while_something_is_saved_leaves_it_whole_or_not_at_all(
    sft: Sft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    assert sft(output=tmp_path / "whole").exit_code == 0
    place = f"loratune.training.{module}.save_adapter"
    plain = getattr(sys.modules[f"loratune.training.{module}"], "save_adapter")  # noqa: B009 - imported there, not public

    signals = [signal.SIGTERM]

    def save(model: Any, folder: Path) -> None:
        if signals:
            os.kill(os.getpid(), signals.pop())
        plain(model, folder)

    monkeypatch.setattr(place, save)
    assert sft().exit_code == 128 + signal.SIGTERM
    monkeypatch.undo()
    run = tmp_path / "run"
    assert not (run / "adapter").exists()
    assert [path.name for path in run.rglob("*") if "tmp" in path.name] == []
    steps = [open_checkpoint(folder).step for folder in sorted((run / "checkpoints").iterdir())]
    # A checkpoint's save is finished and the step after it saved; the adapter, which loses nothing, is given up.
    assert steps == ([2, 3] if module == "trainer" else [2, 4])
    assert sft("--resume").exit_code == 0
    for name, weight in adapter(run).items():
        assert torch.equal(weight, adapter(tmp_path / "whole")[name])


def test_a_run_that_stopped_early_says_so_and_goes_on_only_with_more_patience(sft: Sft, tmp_path: Path) -> None:
    (tmp_path / "misleading.json").write_text(json.dumps([row | {"output": "狐狸 zebra!"} for row in ROWS[:4]]))
    flags = [
        "--training.learning_rate", "2e-2", "--evaluation.every_steps", "1", "--data.validation",
        tmp_path / "misleading.json", "--no-checkpoints.keep_best", "--training.max_steps",
    ]  # fmt: skip
    patience = "--evaluation.early_stopping"
    assert sft(*flags, "16", output=tmp_path / "whole").exit_code == 0
    assert sft(*flags, "16", patience, "2").exit_code == 0
    stopped = json.loads((tmp_path / "run" / "status.json").read_text())
    assert stopped["stopped_early"]
    assert stopped["step"] < 16
    before = tree(tmp_path / "run")
    longer = sft(*flags, "40", patience, "2", "--resume")
    assert longer.exit_code == 0
    assert f"it stopped early at step {stopped['step']} of 40" in words(longer.stderr)
    assert "after 2 validations without a better one" in words(longer.stderr)
    assert f"{patience} null" in words(longer.stderr)
    assert tree(tmp_path / "run") == before
    assert sft(*flags, "16", patience, "1", "--resume").exit_code == Exit.USAGE
    assert sft(*flags, "16", patience, "null", "--resume").exit_code == 0
    for name, weight in adapter(tmp_path / "run").items():
        assert torch.equal(weight, adapter(tmp_path / "whole")[name])


# --- what is on the disk when ---


def test_a_folder_s_files_are_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, rename = os.fsync, Path.rename

    def synced(handle: int) -> None:
        events.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        sync(handle)

    def renamed(self: Path, target: Path) -> Path:
        events.append(f"→ {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    with folder_in_one_step(tmp_path / "target") as folder:
        (folder / "below").mkdir()
        for name in ("a", "b", "below/c"):
            (folder / name).write_text(name)
    assert set(events[:3]) == {"a", "b", "c"}
    assert events[3:] == ["made", "→ target", tmp_path.name]


def test_a_checkpoint_that_does_not_read_back_costs_no_other(tmp_path: Path, finished: Path) -> None:
    checkpoints = finished / "checkpoints"
    shutil.copytree(checkpoints / "step-000004", checkpoints / "step-000006")
    (checkpoints / "step-000006" / "optimizer.pt").write_bytes(b"")
    recipe = Recipe.model_validate({"model": {"base": "x"}, "data": {"train": ["a"]}, "checkpoints": {"keep": 1}})
    keeper = CheckpointKeeper(finished, recipe.checkpoints, recipe.evaluation)
    state = SimpleNamespace(is_world_process_zero=True, global_step=6)
    with pytest.raises(LoratuneError, match=r"optimizer\.pt"):
        keeper.on_save(None, state, None)
    assert open_checkpoint(checkpoints / "step-000004").step == 4
    found = find_start(finished, SimpleNamespace(checkpoint="newest", strict=False))  # type: ignore[arg-type]
    assert found is not None
    assert found.step == 4


# --- without a network ---

OFFLINE = """\
import os, sys
def refuse(event, details):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        os.write(2, f"NETWORK {event} {details}".encode())
        os._exit(77)
sys.addaudithook(refuse)
from loratune.cli.app import main
sys.argv[0] = "loratune"
main()
"""


@pytest.mark.slow
def test_a_local_model_is_trained_merged_and_exported_without_a_look_at_the_network(
    random_qwen: Path, rows_file: Path, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    run = tmp_path / "run"
    for command in (
        ["sft", "--model.base", random_qwen, "--data.train", rows_file, "--training.max_steps", "2", "--output", run],
        ["merge", "--adapter", run, "--output", tmp_path / "merged"],
        ["export", "--adapter", run, "--format", "adapter", "--output", tmp_path / "exported"],
        ["infer", "--adapter", run, "--prompt", "hi", "--max-new-tokens", "2"],
    ):
        line = [sys.executable, "-c", OFFLINE, *map(str, command)]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_one_message(rows_file: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    with socket.socket() as nobody:  # listens to nothing: every connection is refused
        nobody.bind(("127.0.0.1", 0))
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{nobody.getsockname()[1]}", "HF_HOME": str(tmp_path / "hf")}
        line = ["-m", "loratune", "sft", "--model.base", "nobody/nothing", "--data.train", rows_file]
        done = subprocess.run(
            [sys.executable, *map(str, line), "--output", str(tmp_path / "run")],
            env=environment, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
    assert done.returncode == Exit.MODEL
    assert "give its folder" in words(done.stderr)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


KILLED_AT_EACH_FILE = """
import os, shutil, signal, sys
from pathlib import Path
from loratune.recipe.loading import load_recipe
from loratune.runs.manifest import Manifest
from loratune.runs.output import begin_run, prepare_output
from loratune.runs.status import set_status

earlier, place = map(Path, sys.argv[1:])
recipe = load_recipe("quickstart", {})

def die_at(number):
    seen = 0
    def count(event, details):
        nonlocal seen
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        seen += bool(writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"))
        if seen == number:
            seen = -1000  # killing is an event too
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)

for kind in ("new", "again", "resumed"):
    number, ended = 0, None
    while ended != 0:
        number += 1
        run = place / f"{kind}{number}"
        if kind != "new":
            shutil.copytree(earlier, run)
        child = os.fork()
        if not child:
            die_at(number)
            begin_run(run, recipe, Manifest(), keep=kind == "resumed")
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert ended in (0, -signal.SIGKILL)
        prepare_output(run, overwrite=True)
        if kind == "resumed":
            assert (run / "adapter" / "adapter_model.safetensors").is_file()
    print(kind, number)
"""


def test_a_run_killed_while_it_begins_still_owns_its_folder(short_run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_AT_EACH_FILE, str(short_run), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = dict(line.split() for line in done.stdout.splitlines())
    assert all(int(counts[kind]) > 6 for kind in ("new", "again", "resumed"))
