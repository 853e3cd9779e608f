"""The faults of test_merge_plants, planted in merges of adapters that `sft` has trained: for 4, 20 and 200 steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_QWEN
from safetensors.torch import load_file, save_file
from test_merge_plants import BESIDE, PLANTS, RUN_TOO, WIDE, Cli, RoundedTwiceCoarsely, refused, with_arithmetic_of
from typer.testing import CliRunner

from loratune.errors import Exit

STEPS = (4, 20, 200)
"""The first changes less than bfloat16 holds in nearly every place, the last learns its rows by heart."""
TRAINED = [*((steps, "bfloat16") for steps in STEPS), (4, "float16")]
"""Steps, and the type of the base. A CPU computes in float32 instead of float16, and the longest is quicker so."""
PLANTS_BY_TYPE = {
    "bfloat16": PLANTS,
    "float16": PLANTS | {"rounded twice": with_arithmetic_of(RoundedTwiceCoarsely)},
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, encoded_rows: Path) -> Any:
    """Run folders of tiny-qwen by steps and type, trained when first asked for; not to be changed."""
    from loratune.cli.app import app

    folder, made = tmp_path_factory.mktemp("trained"), dict[tuple[int, str], Path]()
    rows = [{"instruction": f"What is {n} times {n}?", "input": "", "output": f"It makes {n * n}."} for n in range(20)]
    (folder / "rows.json").write_text(json.dumps(rows))

    def train(steps: int, dtype: str) -> Path:
        run = folder / f"{dtype}-{steps}"
        base = of_type(folder / f"base-{dtype}", getattr(torch, dtype))
        computed = "bfloat16" if dtype == "bfloat16" and steps < max(STEPS) else "float32"
        flags = ["--model.base", base, "--model.dtype", computed, "--data.train", folder / "rows.json"]
        flags += ["--data.validation", "0.1", "--training.max_steps", steps, "--training.learning_rate", "1e-4"]
        flags += ["--training.batch_size", 2, "--no-training.packing"]
        flags += ["--evaluation.questions_share", 0, "--output", run]
        result = CliRunner().invoke(app, ["sft", *map(str, flags)], env={"LORATUNE_CACHE": str(encoded_rows)})
        assert result.exit_code == 0, result.stderr or result.exception
        return run

    def run_of(steps: int, dtype: str) -> Path:
        if (steps, dtype) not in made:
            made[steps, dtype] = train(steps, dtype)
        return made[steps, dtype]

    return run_of


def of_type(folder: Path, dtype: torch.dtype) -> Path:
    """tiny-qwen in a type."""
    if not folder.is_dir():
        shutil.copytree(TINY_QWEN, folder)
        tensors = load_file(folder / "model.safetensors")
        save_file({name: t.to(dtype) for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    return folder


@pytest.mark.parametrize(("steps", "dtype"), TRAINED)
def test_a_right_merge_of_a_trained_adapter_passes(
    cli: Cli, trained: Any, output: Path, steps: int, dtype: str
) -> None:
    result = cli("merge", "-a", trained(steps, dtype), "-o", output, env=WIDE)
    assert result.exit_code == 0, result.stderr or result.exception
    report = json.loads((output / "verification.json").read_text())
    assert report["read_back"]["updated"] == 28
    assert {str(t.dtype) for t in load_file(output / "model.safetensors").values()} == {f"torch.{dtype}"}


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize(("steps", "dtype"), TRAINED)
def test_a_planted_fault_is_noticed_after_training(
    cli: Cli, trained: Any, output: Path, monkeypatch: pytest.MonkeyPatch, steps: int, dtype: str, plant: str
) -> None:
    run = trained(steps, dtype)
    PLANTS_BY_TYPE[dtype][plant](monkeypatch)
    flags = [] if plant in RUN_TOO else ["--no-logits"]
    told = refused(cli("merge", "-a", run, "-o", output, *flags, env=WIDE), output)
    assert "the written file holds" in told or "not what PEFT makes of this adapter" in told


@pytest.mark.parametrize("plant", BESIDE)
def test_a_fault_beside_the_weights_is_noticed_after_training(
    cli: Cli, trained: Any, output: Path, monkeypatch: pytest.MonkeyPatch, plant: str
) -> None:
    run, (planted, words) = trained(4, "bfloat16"), BESIDE[plant]
    planted(monkeypatch)
    assert words in refused(cli("merge", "-a", run, "-o", output, "--no-logits", env=WIDE), output)


@pytest.mark.parametrize("steps", STEPS)
def test_matrices_that_were_rounded_since_are_refused(
    cli: Cli, trained: Any, output: Path, tmp_path: Path, steps: int
) -> None:
    run = Path(shutil.copytree(trained(steps, "bfloat16"), tmp_path / "run"))
    round_matrices(run / "adapter")
    for command in (("merge", "-a", run, "-o", output), ("verify", run)):
        result = cli(*command, env=WIDE)
        assert result.exit_code == Exit.MODEL, result.stderr or result.exception
        assert "adapter/adapter_model.safetensors" in result.stderr
    assert not output.exists()


def test_a_merge_is_not_proved_with_matrices_that_were_rounded_since(
    cli: Cli, trained: Any, output: Path, tmp_path: Path
) -> None:
    run = trained(4, "bfloat16")
    assert cli("merge", "-a", run, "-o", output, "--no-logits").exit_code == 0
    plain = Path(shutil.copytree(run / "adapter", tmp_path / "plain"))
    round_matrices(plain)
    base = json.loads((run / "manifest.json").read_text())["base"]["path"]
    result = cli("verify", output, "--adapter", plain, "--base-model", base, "--no-logits", env=WIDE)
    assert result.exit_code == Exit.MODEL
    assert "another adapter" in result.stderr


def round_matrices(adapter: Path) -> None:
    """A and B as float16 holds them, in files of the same type and size."""
    path = adapter / "adapter_model.safetensors"
    before = load_file(path)
    after = {name: tensor.half().to(tensor.dtype) for name, tensor in before.items()}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    save_file(after, path, {"format": "pt"})
