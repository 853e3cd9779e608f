"""Output that goes away: a terminal that is closed, full, or cannot show a letter ends nothing and costs no result."""

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

from loratune.errors import Exit
from loratune.recipe.yaml_reader import read_yaml
from loratune.runs.folder import ADAPTER, METRICS, REPORT, STATUS

LORATUNE = f"{sys.executable} -m loratune"
NOT_UTF8 = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1:strict"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]
HARD = "小李 né 😀\n- x"
"""Letters outside of ASCII, of Latin-1, and of the plane that four hexadecimal digits name."""
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")

Shell = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Run a line of bash, where LORATUNE is this program; pipefail is on."""

    def run(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
        known = {**os.environ, "LORATUNE": LORATUNE, "HF_HUB_OFFLINE": "1", **environment}
        command = ["bash", "-o", "pipefail", "-c", line]
        return subprocess.run(command, cwd=tmp_path, env=known, capture_output=True, check=False, timeout=300)

    return run


def words(stderr: bytes) -> str:
    return " ".join(stderr.decode().split())


# --- a training ---


@pytest.mark.parametrize(
    ("redirection", "code", "told"),
    [
        pytest.param("2>&1 | (read -r line)", 0, "", id="the reader has gone"),
        pytest.param("2>/dev/full", 0, "", id="full", marks=[needs_dev_full, pytest.mark.slow]),
        pytest.param("2>&- >&- <&-", 0, "", id="all closed", marks=pytest.mark.slow),
        pytest.param(
            "--json >&-",
            6,
            "error: standard output: the result cannot be written: it is closed",
            id="json",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--json >/dev/full",
            6,
            "error: standard output: the result cannot be written: No space left on device",
            id="json full",
            marks=needs_dev_full,
        ),
    ],
)
def test_a_training_outlives_its_terminal(
    shell: Shell, random_qwen: Path, rows_file: Path, tmp_path: Path, redirection: str, code: int, told: str
) -> None:
    train = f"$LORATUNE sft --model.base {random_qwen} --data.train {rows_file} --training.max_steps 3 --output run"
    done = shell(f"{train} --data.validation 0.0 --evaluation.questions_share 0 {redirection}")
    assert done.returncode == code, done.stderr
    assert told in words(done.stderr)
    assert b"Traceback" not in done.stderr
    run = tmp_path / "run"
    assert json.loads((run / STATUS).read_text())["state"] == "finished"
    assert json.loads((run / REPORT).read_text())["steps"] == 3
    assert len((run / METRICS).read_text().splitlines()) == 3
    assert (run / ADAPTER / "adapter_model.safetensors").is_file()


LIBRARIES = """\
import logging, os, sys, time, warnings
from loratune.streams import make_steady
make_steady()
time.sleep(float(sys.argv[1]))  # until the reader has gone
import tqdm
from transformers.utils import logging as transformers_logging
for _ in tqdm.tqdm(range(3), mininterval=0):
    transformers_logging.get_logger("transformers").error("x" * 20000)
    warnings.warn("a word")
    logging.getLogger("trl").error("a word")
    print("y" * 20000, flush=True)
    print("z" * 20000, file=sys.__stderr__, flush=True)
open("done", "w").write("whole")
"""


@pytest.mark.parametrize(
    "redirection", ["2>&1 | true", pytest.param(">/dev/full 2>&1", marks=needs_dev_full), "<&- >&- 2>&-"]
)
def test_what_libraries_print_ends_nothing(shell: Shell, tmp_path: Path, redirection: str) -> None:
    (tmp_path / "program.py").write_text(LIBRARIES)
    done = shell(f"{sys.executable} program.py 0.2 {redirection}")
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "done").read_text() == "whole"


def test_no_file_takes_the_place_of_a_closed_stream(shell: Shell, tmp_path: Path) -> None:
    program = (
        "import os, sys; from loratune.streams import make_steady; make_steady(); file = open('file', 'w')\n"
        "print('lost'); print('lost', file=sys.stderr); os.system('echo lost; echo lost >&2')\n"
        "from loratune.console import interject; interject('lost'); file.write(repr(sys.stdin.read()))"
    )
    (tmp_path / "program.py").write_text(program)
    assert shell(f"{sys.executable} program.py <&- >&- 2>&-").returncode == 0
    assert (tmp_path / "file").read_text() == "''"


# --- results ---

RESULTS = [
    "infer --adapter run --prompt hello --max-new-tokens 4",
    "infer --adapter run --prompt hello --max-new-tokens 4 --json",
    "runs show run --json",
    "sft --config run/recipe.yaml --show",
    "data preview --config run/recipe.yaml",
    "data check --config run/recipe.yaml --json",
    "--version",
    "sft --help",
    "runs show run",
    "runs list . --json",
]


@pytest.fixture
def run_here(short_run: Path, tmp_path: Path) -> None:
    shutil.copytree(short_run, tmp_path / "run")


def slow_but(commands: list[str], *quick: int) -> list[Any]:
    return [
        command if place in quick else pytest.param(command, marks=pytest.mark.slow)
        for place, command in enumerate(commands)
    ]


@pytest.mark.usefixtures("run_here")
@pytest.mark.parametrize("command", slow_but(RESULTS, 2, 6, 7, 8))
def test_a_lost_result_is_told_and_is_exit_code_6(shell: Shell, command: str) -> None:
    for place in ("/dev/full", "&-"):
        if place == "/dev/full" and not Path(place).exists():
            continue
        done = shell(f"$LORATUNE {command} >{place}")
        assert done.returncode == Exit.IO, done.stderr
        assert "error: standard output: the result cannot be written: " in words(done.stderr)
        assert b"Traceback" not in done.stderr


@pytest.mark.usefixtures("run_here")
@pytest.mark.parametrize("command", slow_but(RESULTS, 7))
def test_a_reader_that_has_read_enough_ends_the_command_in_silence(shell: Shell, command: str) -> None:
    done = shell(f"($LORATUNE {command}; echo $? >code) | true; cat code")
    assert int(done.stdout) == 128 + signal.SIGPIPE
    assert b"error" not in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.usefixtures("run_here")
@needs_dev_full
@pytest.mark.parametrize("command", slow_but(RESULTS, 2))
def test_results_come_whatever_happens_to_progress(shell: Shell, command: str) -> None:
    lost, kept = shell(f"$LORATUNE {command} 2>/dev/full"), shell(f"$LORATUNE {command} 2>&-")
    assert lost.returncode == kept.returncode == 0
    assert lost.stdout == kept.stdout != b""


# --- letters ---

ANSWER = f"""\
import sys
from loratune.streams import make_steady
make_steady()
from loratune import console
if sys.argv[1] == "json":
    console.write_json({{"answer": {HARD!r}}})
else:
    console.write_result({HARD!r})
    console.warn({HARD!r})
    console.write_spans([({HARD!r}, "plain")])
"""


@pytest.mark.parametrize("environment", NOT_UTF8, ids=str)
def test_letters_that_a_terminal_cannot_show_are_escaped(
    shell: Shell, tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "answer.py").write_text(ANSWER, encoding="utf-8")
    text = shell(f"{sys.executable} answer.py text", **environment)
    assert text.returncode == 0, text.stderr
    encoding = environment.get("PYTHONIOENCODING", "ascii").partition(":")[0]
    assert text.stdout.startswith(f"{HARD}\n".encode(encoding, "backslashreplace"))
    assert f"warning: {HARD}".encode(encoding, "backslashreplace") in text.stderr
    assert json.loads(shell(f"{sys.executable} answer.py json", **environment).stdout) == {"answer": HARD}


@pytest.mark.parametrize("environment", NOT_UTF8, ids=str)
def test_a_recipe_is_shown_so_that_it_reads_back(shell: Shell, tmp_path: Path, environment: dict[str, str]) -> None:
    system = json.dumps(HARD, ensure_ascii=False)
    recipe = f"model: {{base: tiny-qwen}}\ndata: {{train: [a.json]}}\nprompt:\n  system: {system}\n"
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    shown = shell("$LORATUNE sft --config recipe.yaml --show", **environment)
    assert shown.returncode == 0, shown.stderr
    assert read_yaml(shown.stdout.decode("ascii")).values["prompt"]["system"] == HARD


@pytest.mark.parametrize("environment", NOT_UTF8, ids=str)
def test_help_and_usage_errors_are_shown_anywhere(shell: Shell, environment: dict[str, str]) -> None:
    assert shell("$LORATUNE --help", **environment).returncode == 0
    wrong = shell("$LORATUNE sft --no-such-flag", **environment)
    assert (wrong.returncode, b"Traceback" in wrong.stderr) == (2, False)
