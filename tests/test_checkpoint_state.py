"""Checkpoints whose seal is right and whose states are not: of another step, damaged, or made to run something."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tree
from safetensors.torch import load_file, save_file
from test_run_faults import reseal
from typer.testing import Result

from loratune.errors import Exit, LoratuneError
from loratune.runs.checkpoint import open_checkpoint
from loratune.runs.folder import file_sha256
from loratune.training.checkpoints.states import check_states

STATES = ("optimizer.pt", "scheduler.pt", "trainer_state.json")
PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def four_steps(random_qwen: Path, encoded_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2 and 4; not to be changed."""
    from conftest import ROWS
    from typer.testing import CliRunner

    from loratune.cli.app import app

    folder = tmp_path_factory.mktemp("four")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    os.environ["LORATUNE_CACHE"] = str(encoded_rows)
    flags = ["--model.dtype", "float32", "--data.train", folder / "rows.json", "--data.validation", "0"]
    flags += ["--training.max_steps", "4", "--checkpoints.every_steps", "2", "--training.learning_rate", "5e-3"]
    command = ["sft", "--model.base", random_qwen, "--output", folder / "run", *flags]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0, result.stderr
    return folder / "run"


@pytest.fixture
def run(four_steps: Path, tmp_path: Path) -> Path:
    """A copy of the run, as it was after step 4."""
    run = Path(shutil.copytree(four_steps, tmp_path / "run"))
    shutil.rmtree(run / "adapter")
    return run


@pytest.fixture
def resume(cli: Callable[..., Result]) -> Callable[..., Result]:
    def call(run: Path, *flags: str) -> Result:
        command = ["sft", "--config", run / "recipe.yaml", "--output", run, "--resume", *(flags or ("auto",))]
        return cli(*command, env={"COLUMNS": "20000"})

    return call


def forge(run: Path, change: Callable[[Path], Any], step: int = 4) -> None:
    """Change a checkpoint and compute its seal anew."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    change(folder)
    names = [path.name for path in sorted(folder.iterdir()) if path.name != "checkpoint.json"]
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in names}
    reseal(folder, files=files)
    assert open_checkpoint(folder).step == step


def from_step_2(name: str) -> Callable[[Path], Any]:
    return lambda folder: shutil.copyfile(folder.parent / "step-000002" / name, folder / name)


def test_an_untouched_checkpoint_is_whole(run: Path) -> None:
    for folder in (run / "checkpoints").iterdir():
        check_states(open_checkpoint(folder))


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_another_step_is_taken_for_damage(resume: Callable[..., Result], run: Path, name: str) -> None:
    forge(run, from_step_2(name))
    told = f"{name} is of step 2, the checkpoint of step 4"
    before = tree(run)
    for flags in (("4",), ("auto", "--strict-resume")):
        result = resume(run, *flags)
        assert (result.exit_code, told in result.stderr) == (Exit.MODEL, True), result.stderr
        assert tree(run) == before
    gone_back = resume(run)
    assert gone_back.exit_code == 0, gone_back.stderr
    assert told in gone_back.stderr
    assert "using the previous one" in gone_back.stderr
    assert "resuming after step 2" in gone_back.stderr


def test_going_back_gives_the_adapter_of_a_run_that_nobody_touched(
    resume: Callable[..., Result], run: Path, four_steps: Path
) -> None:
    forge(run, from_step_2("optimizer.pt"))
    assert resume(run).exit_code == 0
    expected, found = (load_file(place / "adapter" / WEIGHTS) for place in (four_steps, run))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Malice:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.canary),)


def as_pickle(name: str, canary: Path) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(pickle.dumps(Malice(canary)))


def as_torch(name: str, value: Any) -> Callable[[Path], Any]:
    return lambda folder: torch.save(value, folder / name)


@pytest.mark.parametrize("form", ["pickle", "torch", "bytes", "empty", "a list", "other keys"])
@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_is_not_a_state_is_one_message_and_is_not_run(
    resume: Callable[..., Result], run: Path, tmp_path: Path, name: str, form: str
) -> None:
    canary = tmp_path / "canary"
    changes: dict[str, Callable[[Path], Any]] = {
        "pickle": as_pickle(name, canary),
        "torch": as_torch(name, Malice(canary)),
        "bytes": lambda folder: (folder / name).write_bytes(b"PK\x03\x04" + bytes(300)),
        "empty": lambda folder: (folder / name).write_bytes(b""),
        "a list": as_torch(name, [1, 2]),
        "other keys": as_torch(name, {"a": 1}),
    }
    forge(run, changes[form])
    result = resume(run, "4")
    assert (result.exit_code, result.stdout) == (Exit.MODEL, ""), repr(result.exception)
    assert result.stderr.count("error: ") == 1
    assert name in result.stderr
    assert "Traceback" not in result.stderr
    assert not canary.exists()
    with pytest.raises(LoratuneError, match=r"damaged"):
        check_states(open_checkpoint(run / "checkpoints" / "step-000004"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"strange": 1}', '{"global_step": "4"}', '{"global_step": 3}'])
def test_a_trainer_s_state_that_is_none_is_one_message(resume: Callable[..., Result], run: Path, content: str) -> None:
    forge(run, lambda folder: (folder / "trainer_state.json").write_text(content))
    result = resume(run, "4")
    assert result.exit_code == Exit.MODEL, repr(result.exception)
    assert "trainer_state.json" in result.stderr


def fewer_groups(folder: Path) -> None:
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    state["param_groups"] = state["param_groups"][:-1]
    torch.save(state, folder / "optimizer.pt")


def without_a_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights.pop(min(weights))
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "told"),
    [(fewer_groups, "do not fit this run"), (without_a_tensor, "1 tensor that this run does not train")],
)
def test_states_of_another_shape_are_one_message(
    resume: Callable[..., Result], run: Path, change: Callable[[Path], Any], told: str
) -> None:
    forge(run, change, step=2)
    shutil.rmtree(run / "checkpoints" / "step-000004")
    result = resume(run, "2")
    assert result.exit_code == Exit.MODEL, repr(result.exception)
    assert told in result.stderr


def test_skipped_updates_of_float16_are_no_damage(run: Path) -> None:
    forge(run, from_step_2("optimizer.pt"))
    forge(run, lambda folder: torch.save({}, folder / "scaler.pt"))
    check_states(open_checkpoint(run / "checkpoints" / "step-000004"))
