"""What a user's files and environment can be: each of them ends a command with one message, never with a traceback."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from typer.testing import Result

from loratune.errors import Exit
from loratune.plain_files import read_json_object
from loratune.recipe.loading import MOST_BYTES

Cli = Callable[..., Result]


def words(text: str) -> str:
    return " ".join(text.split())


def told(result: Result, code: int) -> str:
    """What a command says that has failed as it should."""
    assert result.exit_code == code, (result.stderr, result.exception)
    assert isinstance(result.exception, SystemExit)
    return words(result.stderr)


@pytest.fixture
def base(random_qwen: Path, tmp_path: Path) -> Path:
    """A model's folder that may be changed."""
    return Path(shutil.copytree(random_qwen, tmp_path / "base"))


@pytest.fixture
def run(short_run: Path, tmp_path: Path) -> Path:
    """A run that may be changed."""
    return Path(shutil.copytree(short_run, tmp_path / "run"))


@pytest.fixture
def check(cli: Cli, rows_file: Path) -> Callable[..., Result]:
    """`data check` of a base and some flags."""

    def checked(base: Any, *flags: Any, **options: Any) -> Result:
        return cli("data", "check", "--model.base", base, "--data.train", rows_file, *flags, **options)

    return checked


def make_special(path: Path, kind: str) -> None:
    """Put a pipe, a socket or a device in a file's place."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        before = Path.cwd()
        os.chdir(path.parent)  # the names of sockets are short
        try:
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(path.name)
        finally:
            os.chdir(before)


# --- what is no plain file ---


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "added_tokens.json"])
def test_nothing_waits_for_a_pipe_in_a_model_s_folder(
    cli: Cli, check: Callable[..., Result], base: Path, kind: str, name: str
) -> None:
    make_special(base / name, kind)
    for result in (check(base), cli("infer", "--model", base, "--prompt", "x")):
        assert name in told(result, Exit.MODEL)


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    "name", ["manifest.json", "recipe.yaml", "adapter/adapter_config.json", "adapter/tokenizer.json"]
)
def test_nothing_waits_for_a_pipe_in_a_run(cli: Cli, run: Path, tmp_path: Path, kind: str, name: str) -> None:
    make_special(run / name, kind)
    into = ("--output", tmp_path / "out")
    for command in (
        ("infer", "--adapter", run, "--prompt", "x"),
        ("merge", "--adapter", run, *into),
        ("export", "--format", "adapter", "--adapter", run, *into),
    ):
        told(cli(*command), Exit.MODEL)
    assert cli("runs", "show", run).exit_code == 0


def test_a_path_that_is_a_pipe_is_refused(cli: Cli, short_run: Path, rows_file: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    given = ("--adapter", short_run)
    for code, command in (
        (Exit.MODEL, ("runs", "show", pipe)),
        (Exit.MODEL, ("infer", "--adapter", pipe, "--prompt", "x")),
        (Exit.MODEL, ("infer", "--model", pipe, "--prompt", "x")),
        (Exit.USAGE, ("infer", *given, "--input", rows_file, "--output", pipe)),
        (Exit.MODEL, ("merge", "--adapter", pipe, "--output", tmp_path / "out")),
        (Exit.IO, ("merge", *given, "--output", pipe)),
        (Exit.MODEL, ("export", "--format", "adapter", "--adapter", pipe, "--output", tmp_path / "out")),
        (Exit.MODEL, ("export", "--format", "gguf", "--model", pipe, "--output", tmp_path / "out")),
        (Exit.USAGE, ("data", "check", "--config", pipe)),
        (Exit.DATA, ("data", "check", "--model.base", "tiny-qwen", "--data.train", pipe)),
    ):
        told(cli(*command), code)
    for ending in (".part", ".report.json"):
        os.mkfifo(tmp_path / f"answers{ending}")
        asked = ("infer", *given, "--input", rows_file, "--output", tmp_path / "answers")
        assert f"answers{ending}isnotaregularfile" in told(cli(*asked), Exit.USAGE).replace(" ", "")
        (tmp_path / f"answers{ending}").unlink()


def test_a_file_larger_than_memory_is_meant_for_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.touch()
    os.truncate(path, 2**36)
    started = time.monotonic()
    with pytest.raises(Exception, match=r"file\.json: cannot be read: it has 68,719,476,736 bytes"):
        read_json_object(path)
    assert time.monotonic() - started < 1


def test_a_template_larger_than_memory_is_not_given_to_a_library(check: Callable[..., Result], base: Path) -> None:
    os.truncate(base / "chat_template.jinja", 2**36)
    assert "chat_template.jinja" in told(check(base), Exit.MODEL)


# --- recipes and flags ---


@pytest.mark.parametrize("size", [MOST_BYTES + 1, 2**36])
def test_a_recipe_is_not_parsed_beyond_its_size(cli: Cli, tmp_path: Path, size: int) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {base: tiny-qwen}\n# ")
    os.truncate(path, size)
    started = time.monotonic()
    assert "larger than 1,048,576 bytes, too large for a recipe" in told(cli("sft", "--config", path), Exit.USAGE)
    assert time.monotonic() - started < 5


def test_a_recipe_of_that_size_is_read(cli: Cli, tmp_path: Path) -> None:
    path, recipe = tmp_path / "recipe.yaml", "model: {base: tiny-qwen}\ndata: {train: [a.json]}\n# "
    path.write_text(recipe + "x" * (MOST_BYTES - len(recipe)))
    assert cli("sft", "--config", path, "--show").exit_code == 0


@pytest.mark.parametrize(
    "command",
    [
        ("data", "check", "--model.base", "tiny-qwen", "--data.train", ""),
        ("data", "check", "--model.base", "tiny-qwen", "--data.train", "a.json", "--data.validation", ""),
        ("infer", "--model", "", "--prompt", "x"),
        ("serve", "--model", ""),
        ("merge", "--adapter", "run", "--base-model", "", "--output", "out"),
        ("export", "--format", "gguf", "--model", "", "--output", "out"),
        ("infer", "--model", "tiny-qwen", "--input", "ROWS", "--output", ""),
    ],
    ids=" ".join,
)
def test_a_flag_that_is_left_empty_is_wrong_usage(cli: Cli, rows_file: Path, command: tuple[str, ...]) -> None:
    said = told(cli(*(str(rows_file) if word == "ROWS" else word for word in command)), Exit.USAGE)
    assert "empty" in said or "is a folder" in said


# --- folders and permissions ---


@pytest.mark.parametrize("place", ["a file", "/proc/nothing", "/dev/null"])
def test_a_cache_that_cannot_be_made_is_named_with_its_variable(
    check: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / place))
    assert "cannot be written" in (said := told(check("tiny-qwen"), Exit.IO))
    assert "set LORATUNE_CACHE to another folder" in said


def test_a_home_that_is_a_file_is_told_like_such_a_cache(
    check: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").touch()
    monkeypatch.delenv("LORATUNE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert "set LORATUNE_CACHE to another folder" in told(check("tiny-qwen"), Exit.IO)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert "there is no home folder" in told(check("tiny-qwen"), Exit.IO)


def test_weights_that_may_not_be_read_are_named(
    cli: Cli, base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, opened = base / "model.safetensors", Path.open

    def refuse(self: Path, *arguments: Any, **settings: Any) -> BinaryIO:
        if self == weights:  # chmod would not keep root from it
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **settings)  # type: ignore[return-value]

    monkeypatch.setattr(Path, "open", refuse)
    train = ("sft", "--model.base", base, "--data.train", rows_file, "--output", tmp_path / "run")
    for command in (train, ("infer", "--model", base, "--prompt", "x")):
        said = told(cli(*command), Exit.IO)
        assert f"{weights}:Permissiondenied" in said.replace(" ", "")
        assert "written" not in said


def test_a_working_folder_that_is_gone_is_told(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for command in (("data", "check", "--config", "quickstart"), ("infer", "--model", "tiny-qwen", "--prompt", "x")):
        assert "the working folder is gone" in told(cli(*command), Exit.IO)


# --- environment variables ---


def test_a_variable_that_a_library_cannot_read_is_no_traceback(rows_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loratune", "data", "check", "--model.base", "tiny-qwen", "--data.train"]
    environment = {**os.environ, "HF_HUB_DOWNLOAD_TIMEOUT": "soon", "LORATUNE_CACHE": str(tmp_path)}
    done = subprocess.run([*command, rows_file], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == Exit.IO, done.stderr
    assert "huggingface_hub cannot be loaded: ValueError: invalid literal" in words(done.stderr)
    assert "Traceback" not in done.stderr


def test_a_notebook_s_backend_for_pictures_is_not_needed() -> None:
    program = "import sys; sys.argv = ['loratune', '--version']; from loratune.cli.app import main\n"
    program += "try: main()\nexcept SystemExit: pass\nimport loratune.training.reporting.plot"
    environment = {**os.environ, "MPLBACKEND": "module://no_such_notebook"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
