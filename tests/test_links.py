"""Links and neighbours: nothing is written or removed outside the named folder, nor what others have put beside it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tree
from typer.testing import Result

from loratune.errors import Exit, LoratuneError
from loratune.recipe.loading import load_recipe
from loratune.runs.folder import CONTENTS, LOCK_OWNER, TRACKER_LOGS
from loratune.runs.lock import run_lock
from loratune.runs.manifest import Manifest
from loratune.runs.output import begin_run, prepare_output
from loratune.training.checkpoints.keeper import CheckpointKeeper
from loratune.writing import append_text, folder_in_one_step, remove, remove_unfinished, write_json, write_text

Sft = Callable[..., Result]


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A folder of somebody else's, with a file."""
    folder = tmp_path / "precious"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "file").write_text("mine")
    return folder


@pytest.fixture
def sft(cli: Callable[..., Result], random_qwen: Path, rows_file: Path, tmp_path: Path) -> Sft:
    """Train into tmp_path / "run"."""

    def train(*flags: Any) -> Result:
        given = ["--model.base", random_qwen, "--data.train", rows_file, "--training.max_steps", 3, "--model.dtype"]
        given += ["float32", "--checkpoints.every_steps", 1, "--evaluation.questions_share", 0]
        return cli("sft", *given, "--output", tmp_path / "run", *flags)

    return train


# --- the mechanism ---


def test_no_writer_follows_a_link(tmp_path: Path, precious: Path) -> None:
    before = tree(precious)
    for name in ("text", "json", "lock"):
        (tmp_path / name).symlink_to(precious / "below" / "file")
    write_text(tmp_path / "text", "new")
    write_json(tmp_path / "json", {})
    assert (tmp_path / "text").read_text() == "new"
    assert not (tmp_path / "json").is_symlink()
    with pytest.raises(OSError, match="symbolic links"):
        append_text(tmp_path / "lock", "more")
    for target in (precious, precious / "below" / "file", tmp_path / "nothing"):
        (tmp_path / "link").symlink_to(target)
        with folder_in_one_step(tmp_path / "link") as folder:
            (folder / "new").write_text("new")
        assert tree(tmp_path / "link") == tree(tmp_path / "link")
        assert [path.name for path in (tmp_path / "link").iterdir()] == ["new"]
        remove(tmp_path / "link")
    (tmp_path / "link").symlink_to(precious)
    remove(tmp_path / "link")
    assert tree(precious) == before


def test_a_name_that_is_no_utf8_can_be_written_as_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff")
    write_json(tmp_path / "file", {"é": name})
    assert json.loads((tmp_path / "file").read_text()) == {"é": name}


# --- a run ---


@pytest.mark.parametrize("name", [LOCK_OWNER, ".tmp-adapter", "adapter", "checkpoints", "metrics.jsonl", "status.json"])
def test_a_new_run_replaces_links_and_leaves_what_they_lead_to(
    sft: Sft, short_run: Path, tmp_path: Path, precious: Path, name: str
) -> None:
    shutil.copytree(short_run, tmp_path / "run")
    place = tmp_path / "run" / name
    if name == "status.json":  # without it the folder would not be known for a run's
        shutil.copy(place, precious / "below" / "file")
    before = tree(precious)
    remove(place)
    place.symlink_to(precious if name in (".tmp-adapter", "adapter", "checkpoints") else precious / "below" / "file")
    done = sft("--overwrite")
    assert done.exit_code == 0, done.stderr
    assert tree(precious) == before
    assert place.is_symlink() == (name == ".tmp-adapter")  # which is nothing of loratune's
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["checkpoints", TRACKER_LOGS])
def test_a_run_whose_folders_lie_elsewhere_is_not_gone_on_with(
    sft: Sft, short_run: Path, tmp_path: Path, name: str
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(short_run, run)
    (run / TRACKER_LOGS).mkdir()
    shutil.move(run / name, elsewhere)
    (run / name).symlink_to(elsewhere)
    before = tree(elsewhere), tree(run)
    done = sft("--resume", "--training.max_steps", 9, "--checkpoints.keep", 1)
    assert done.exit_code == Exit.IO
    told = " ".join(done.stderr.split())
    assert f"error: {run / name}: a link; a run writes and removes files in its own folder alone" in told
    assert (tree(elsewhere), tree(run)) == before


def test_a_checkpoint_that_is_a_link_is_removed_as_one(tmp_path: Path, short_run: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(short_run, run)
    shutil.copytree(run / "checkpoints" / "step-000004", elsewhere)
    link = run / "checkpoints" / "step-000001"
    link.symlink_to(elsewhere)
    recipe = load_recipe(str(run / "recipe.yaml"), {"checkpoints.keep": "1", "checkpoints.keep_best": False})
    state: Any = type("State", (), {"is_world_process_zero": True, "global_step": 4})
    CheckpointKeeper(run, recipe.checkpoints, recipe.evaluation).on_save(None, state, None)
    assert not os.path.lexists(link)
    assert tree(elsewhere) == tree(run / "checkpoints" / "step-000004")


def test_the_lock_s_owner_is_written_into_the_folder(tmp_path: Path, precious: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_OWNER).symlink_to(precious / "below" / "file")
    with run_lock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK_OWNER).read_text())["pid"] == os.getpid()
    assert (precious / "below" / "file").read_text() == "mine"


@pytest.mark.parametrize("name", CONTENTS)
def test_whatever_of_an_earlier_run_is_a_link_stays_as_it_is(tmp_path: Path, precious: Path, name: str) -> None:
    before, run = tree(precious), tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(precious)
    begin_run(run, load_recipe("quickstart", {}), Manifest())
    assert tree(precious) == before
    assert not (run / name).is_symlink()


# --- neighbours ---


def test_neighbours_of_an_output_stay(tmp_path: Path, precious: Path) -> None:
    """Whatever they are called, but for what a dead process of loratune is known to have left."""
    names = (".tmp-made", ".old-made", ".made.tmp", ".loratune-mine", f".loratune-{'0' * 32}", ".loratune-1")
    for name in names:
        shutil.copytree(precious, tmp_path / "out" / name)
    (tmp_path / "out" / f".loratune-{'1' * 32}").symlink_to(precious)
    foreign = tmp_path / "out" / f".loratune-{'2' * 32}"
    foreign.mkdir()
    for told in ('{"program": "other", "target": "made"}', '{"program": "loratune", "target": "../made"}', "{", "[]"):
        (foreign / "owner.json").write_text(told)
        before = tree(tmp_path / "out")
        with folder_in_one_step(tmp_path / "out" / "made") as folder:
            (folder / "file").write_text("new")
        remove(tmp_path / "out" / "made")
        assert remove_unfinished(tmp_path / "out") == []
        assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("name", [".tmp-merged", ".old-merged"])
@pytest.mark.parametrize("is_link", [False, True])
def test_a_merge_leaves_its_neighbours_alone(
    cli: Callable[..., Result], short_run: Path, output: Path, precious: Path, name: str, is_link: bool
) -> None:
    if is_link:
        output.with_name(name).symlink_to(precious)
    else:
        shutil.copytree(precious, output.with_name(name))
    before = tree(precious)
    done = cli("merge", "--adapter", short_run, "--output", output, "--no-logits")
    assert done.exit_code == 0, done.stderr
    assert tree(output.with_name(name)) == tree(precious) == before
    assert {path.name for path in output.parent.iterdir()} == {name, "merged"}


def test_a_folder_that_holds_a_file_of_the_user_s_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".mine.tmp").write_text("mine")
    with pytest.raises(LoratuneError, match="holds something that is not a run"):
        prepare_output(tmp_path / "out", overwrite=True)


MAKING = """\
import os, signal, sys
from pathlib import Path
from loratune import writing
target, when = Path(sys.argv[1]), sys.argv[2]
rename = Path.rename
def renamed(self, to):
    if when == "between the renames" and self.name == "made":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, to)
Path.rename = renamed
with writing.folder_in_one_step(target) as folder:
    (folder / "file").write_text("new")
    if when == "alive":
        print("ready", flush=True)
        sys.stdin.read()
    elif when == "while it is filled":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_has_left_goes_and_what_it_put_aside_comes_back(tmp_path: Path) -> None:
    for when in ("while it is filled", "between the renames"):
        target = tmp_path / "out" / "target"
        target.mkdir(parents=True)
        (target / "file").write_text("earlier")
        done = subprocess.run([sys.executable, "-c", MAKING, str(target), when], check=False)
        assert done.returncode == -signal.SIGKILL
        assert len(list(target.parent.glob(".loratune-*"))) == 1
        assert target.exists() == (when == "while it is filled")
        with pytest.raises(KeyboardInterrupt), folder_in_one_step(target):
            raise KeyboardInterrupt
        assert (target / "file").read_text() == "earlier"
        assert list(target.parent.iterdir()) == [target]
        shutil.rmtree(target)


def test_what_a_living_process_is_making_is_left_to_it(tmp_path: Path) -> None:
    target = tmp_path / "out" / "made"
    command = [sys.executable, "-c", MAKING, str(target), "alive"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with folder_in_one_step(target) as folder:
            (folder / "mine").write_text("mine")
        assert remove_unfinished(target.parent) == []
        other.communicate("")
    assert other.returncode == 0
    assert (target / "file").read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_answers_are_not_written_through_a_link(
    cli: Callable[..., Result], short_run: Path, rows_file: Path, tmp_path: Path, precious: Path
) -> None:
    (tmp_path / "answers.jsonl.part").symlink_to(precious / "below" / "file")
    asked = ("infer", "--adapter", short_run, "--input", rows_file, "--output", tmp_path / "answers.jsonl")
    done = cli(*asked, "--overwrite", "--max-new-tokens", 1)
    assert done.exit_code == Exit.IO
    assert "answers.jsonl.part: cannot be written: it is a link" in done.stderr.replace("\n", "")
    assert (precious / "below" / "file").read_text() == "mine"
