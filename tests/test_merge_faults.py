"""`loratune merge` where things go wrong: killed, interrupted, out of disk, and outputs of every kind."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import tree
from typer.testing import Result

from loratune.cli.app import main
from loratune.delivery.merge import merge, merged_weights
from loratune.delivery.verification import verify
from loratune.errors import Exit
from loratune.writing import TEMPORARY_NAME

WEIGHTS = "model.safetensors"
WIDE = {"COLUMNS": "20000"}
# Forks where everything is imported but nothing computed: children start at once and inherit no threads.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "typer.testing", "loratune.cli.merge", "loratune.delivery.verification.verify"])

Merge = Callable[..., Result]
Child = Callable[..., multiprocessing.process.BaseProcess]


@pytest.fixture(scope="module")
def run(short_run: Path) -> Path:
    return short_run


@pytest.fixture(autouse=True)
def inputs_stay_as_they_are(run: Path, random_qwen: Path) -> Any:
    """No merge, however it ends, may touch the run or the base."""
    before = tree(run), tree(random_qwen)
    yield
    assert (tree(run), tree(random_qwen)) == before


@pytest.fixture
def merged(cli: Callable[..., Result], run: Path, output: Path) -> Merge:
    """Merge the run into `output`."""
    return lambda *arguments: cli("merge", "--adapter", run, "--output", output, *arguments, env=WIDE)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failed(result: Result, code: Exit, output: Path) -> str:
    """The message of a merge that failed as it should, and left nothing."""
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr or result.exception
    assert result.stderr.count("error: ") == 1
    assert names(output.parent) == []
    return str(result.stderr.partition("error: ")[2])


# --- killed ---


def start(arguments: list[str], fault: Callable[[], None], log: Path) -> None:
    """In a process of its own: the command line, after a fault has been put in place."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    fault()
    sys.argv = ["loratune", *arguments]
    main()


@pytest.fixture
def child(run: Path, output: Path, tmp_path: Path) -> Any:
    """Start a merge with a fault in a process of its own."""
    started = []

    def merge_with(fault: Callable[[], None], *arguments: str) -> multiprocessing.process.BaseProcess:
        words = ["merge", "--adapter", str(run), "--output", str(output), *arguments]
        process = FORKS.Process(target=start, args=(words, fault, tmp_path / "log"))
        process.start()
        started.append(process)
        return process

    yield merge_with
    for process in started:
        process.kill()
        process.join()
        process.close()


def exit_code(process: multiprocessing.process.BaseProcess) -> int | None:
    process.join(300)
    return process.exitcode


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_writing() -> None:
    pieces = merged_weights.merged_pieces
    written = []

    def some(*arguments: Any) -> Any:
        for piece in pieces(*arguments):
            written.append(piece)
            yield piece if len(written) < 9 else die()

    merged_weights.merged_pieces = some


def die_before_writing() -> None:
    merge.write_merged = die


def die_before_reading_back() -> None:
    merge.read_back = die


def die_before_comparing() -> None:
    verify.compare_models = die


def die_before_renaming() -> None:
    Path.rename = die  # type: ignore[method-assign]


@dataclasses.dataclass
class DieAtChange:
    """Kill the process before its n-th folder is made or removed, file removed, or thing under `place` renamed."""

    number: int
    place: str

    def __call__(self) -> None:
        sys.addaudithook(self.see)

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count an event."""
        is_move = event == "os.rename" and str(arguments[0]).startswith(self.place)
        self.number -= is_move or event in ("os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")
        if self.number == 0:
            self.number = -1  # the kill is an event too
            die()


@pytest.mark.parametrize(
    "fault",
    [die_before_writing, die_while_writing, die_before_reading_back, die_before_comparing, die_before_renaming],
)
def test_a_killed_merge_leaves_nothing_under_the_name_and_does_not_stop_the_next(
    child: Child, merged: Merge, output: Path, fault: Callable[[], None]
) -> None:
    assert exit_code(child(fault)) == -signal.SIGKILL
    (left,) = names(output.parent)
    assert TEMPORARY_NAME.fullmatch(left)
    assert merged().exit_code == 0
    assert names(output.parent) == ["merged"]


def test_whenever_it_is_killed_an_earlier_merged_model_is_whole_until_the_new_one_takes_its_place(
    child: Child, merged: Merge, output: Path, tmp_path: Path
) -> None:
    def state(folder: Path) -> dict[str, str]:
        # verification.json has its seconds; .loratune-….tmp is the trial whether the folder can be written to.
        return {name: digest for name, digest in tree(folder).items() if not name.startswith(("verif", ".loratune-"))}

    assert merged("--dtype", "bfloat16").exit_code == 0
    shutil.copytree(output, tmp_path / "old")
    assert merged("--overwrite", "--no-logits").exit_code == 0
    whole = [state(tmp_path / "old"), state(output)]
    for number in range(1, 100):
        for path in output.parent.iterdir():
            shutil.rmtree(path)
        shutil.copytree(tmp_path / "old", output)
        code = exit_code(child(DieAtChange(number, str(output.parent)), "--overwrite", "--no-logits"))
        if output.exists():
            assert state(output) in whole, f"broken by the end before change {number}"
            assert json.loads((output / "verification.json").read_text())["program"] == "loratune"
        assert any(state(path) in whole for path in [output, *output.parent.glob("*/earlier")])
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert number > 5
    assert names(output.parent) == ["merged"]
    assert state(output) == whole[1]


@dataclasses.dataclass
class Wait:
    """Stand still with the weights written, and say so."""

    mark: Path

    def __call__(self) -> None:
        def wait(*_: Any) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
            self.mark.touch()
            time.sleep(60)

        merge.read_back = wait


@pytest.mark.parametrize(("sent", "code", "left"), [(signal.SIGINT, 130, 0), (signal.SIGTERM, -signal.SIGTERM, 1)])
def test_an_interrupted_merge_leaves_nothing_under_the_name(
    child: Child, merged: Merge, output: Path, tmp_path: Path, sent: signal.Signals, code: int, left: int
) -> None:
    process = child(Wait(tmp_path / "mark"))
    end = time.monotonic() + 300
    while not (tmp_path / "mark").exists() and process.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    assert process.pid
    os.kill(process.pid, sent)
    assert exit_code(process) == code
    assert len(names(output.parent)) == left
    assert not output.exists()
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said
    assert said.endswith("interrupted\n") == (sent == signal.SIGINT)
    assert merged("--no-logits").exit_code == 0
    assert names(output.parent) == ["merged"]


# --- the disk ---


def test_too_little_room_is_noticed_before_anything_is_written(
    merged: Merge, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, used=0, free=12_345_678))
    monkeypatch.setattr(merge, "write_merged", lambda *_: pytest.fail("it has been written"))
    told = failed(merged(), Exit.IO, output)
    assert f"{output}: the merged model needs 30.4 MB of disk and 12.3 MB are free; make room, or" in told


@dataclasses.dataclass
class SmallDisk:
    """No file may become larger."""

    size: int

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


@pytest.mark.parametrize(("size", "shards"), [(200_000, "5GB"), (190_000, "100kB")])  # the weights; the tokenizer
def test_a_disk_that_is_full_is_one_message(child: Child, output: Path, tmp_path: Path, size: int, shards: str) -> None:
    assert exit_code(child(SmallDisk(size), "--shard-size", shards)) == Exit.IO
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said
    assert said.count("error: ") == 1
    assert "File too large" in said
    assert names(output.parent) == []


# --- where it goes ---


def test_an_output_that_something_else_lies_at_is_refused(
    cli: Callable[..., Result], run: Path, random_qwen: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "verification.json").write_text('{"program": "another"}')
    before = tree(tmp_path)
    cases = [
        (tmp_path / "file", Exit.IO, "file is a file"),
        (tmp_path / "file" / "merged", Exit.IO, f"cannot write to {tmp_path / 'file'}: Not a directory"),
        (tmp_path / "full", Exit.USAGE, "holds something that is not a merged model"),
        (random_qwen, Exit.USAGE, "holds something"),
        (random_qwen.parent, Exit.USAGE, "holds something"),
        (random_qwen / "merged", Exit.USAGE, f"the base model at {random_qwen} overlap"),
        (run, Exit.USAGE, "holds something"),
        (run / "adapter", Exit.USAGE, "holds something"),
        (run / "adapter" / "merged", Exit.USAGE, f"the adapter at {run / 'adapter'} overlap"),
    ]
    for place, code, words in cases:
        result = cli("merge", "--adapter", run, "--output", place, "--overwrite", env=WIDE)
        assert (result.exit_code, result.stdout) == (code, ""), place
        assert words in result.stderr
        assert str(place) in result.stderr
        assert "--output" in result.stderr or code == Exit.IO
    assert tree(tmp_path) == before


def test_an_earlier_merged_model_is_replaced_only_if_asked_and_never_while_it_is_the_base(
    merged: Merge, cli: Callable[..., Result], run: Path, output: Path
) -> None:
    assert merged().exit_code == 0
    first = tree(output)
    again = merged()
    assert again.exit_code == Exit.USAGE
    assert "already holds a merged model" in again.stderr
    assert "--overwrite" in again.stderr
    onto_itself = merged("--base-model", str(output), "--overwrite", "--force")
    assert onto_itself.exit_code == Exit.USAGE
    assert "overlap" in onto_itself.stderr
    assert tree(output) == first
    assert merged("--overwrite", "--dtype", "bfloat16").exit_code == 0
    assert tree(output)[WEIGHTS] != first[WEIGHTS]
    assert names(output.parent) == ["merged"]


@pytest.mark.parametrize("place", [".", "link", "dangling", "n" * 255, "n" * 256, "n" * 5000])
def test_an_odd_output_works_or_is_refused_before_anything_is_written(
    cli: Callable[..., Result], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "real").mkdir()
    if place != ".":
        Path("link").symlink_to(tmp_path / "real")
        Path("dangling").symlink_to(tmp_path / "nowhere")
    before = tree(tmp_path)
    result = cli("merge", "--adapter", run, "--output", place, "--no-logits")
    if result.exit_code == 0:
        assert (Path(place) / WEIGHTS).is_file()
    else:
        assert result.exit_code in (Exit.USAGE, Exit.IO), repr(result.exception)[:200]
        assert "merging" not in result.stderr
        assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["with space", "new\nline", "模型 é", "-dash", "a=b", "'quoted\"", "%s {}", "[red]"])
def test_any_path_will_do(
    cli: Callable[..., Result], run: Path, random_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind, source in (("adapter", run / "adapter"), ("base", random_qwen)):
        shutil.copytree(source, Path(kind) / name)
    monkeypatch.chdir("adapter")
    base = f"../base/{name}"
    result = cli("merge", "--adapter", name, "--base-model", base, "--output", f"{name}/../{name}2", env=WIDE)
    assert result.exit_code == 0, result.stderr
    assert (Path(f"{name}2") / WEIGHTS).is_file()
    pasted = shlex.split(result.stderr.partition("try it: ")[2])
    assert pasted[:4] == ["loratune", "infer", "--model", f"{name}/../{name}2"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_files_get_the_mode_that_the_umask_asks_for(merged: Merge, output: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        assert merged("--no-logits").exit_code == 0
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in output.iterdir()} == {mode}
    assert stat.S_IMODE(output.stat().st_mode) == 0o777 & ~mask
