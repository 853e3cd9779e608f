"""Every `loratune` command in the bash blocks of the documentation, run as it stands there.

A folder holds what the pages name: rows, recipes, runs, and a hub cache in which the practice model stands for the
models of the recipes.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY_QWEN
from rich.cells import cell_len
from test_docs_site import PAGES, commands, shell_blocks

DOCS = Path(__file__).resolve().parent.parent / "docs"
OWN_TEST = {"first-steps.md"}
"""Pages that are run whole, with what stands between the commands."""
GIVEN = {"/mnt/runs": "runs"}
"""Paths that no test may write to, and those that are given instead."""
REFUSED = {
    "--gpus auto": (2, "torch sees no GPU"),
    "--gpus 4 --model.sharding": (2, "torch sees no GPU"),
    "--tasks gsm8k": (3, "Couldn't"),
}
"""Exit code and message of commands that need a GPU or the hub."""
REVISION = "0" * 40
COLUMNS = 80
LONGEST_WORD = 60
"""A line with a longer one, which is a path or an address, may be wider than the terminal: neither can be broken."""
OF_TEXTS = {"agents-md", "data preview", "import", "infer", "launch", "schema"}
"""Commands whose stdout is a document, or the text of rows and models, of which no line is broken."""


def is_lasting(words: list[str]) -> bool:
    return words[:1] == ["serve"] or words[:2] == ["runs", "serve"]


def run(folder: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loratune", *words], cwd=folder, input="Who are you?\n", text=True, check=False,
        capture_output=True, timeout=500,
    )  # fmt: skip


def block(page: str, language: str, containing: str) -> str:
    """The one block of a page that holds a text."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (only,) = [text for text in found if containing in text]
    return only


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    files = "\n".join(part for part in shell_blocks(DOCS / "first-steps.md") if "cat >" in part)
    subprocess.run(["bash", "-c", re.sub(r"^loratune .*$", "", files, flags=re.MULTILINE)], cwd=folder, check=True)
    rows = json.loads((folder / "faq.json").read_text(encoding="utf-8"))
    for name in ("identity.json", "test.json"):
        shutil.copy(folder / "faq.json", folder / name)
    shutil.copy(folder / "tests.jsonl", folder / "rows.jsonl")
    with (folder / "faq.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["frage", "antwort"], *([row["instruction"], row["output"]] for row in rows)])
    recipe = {
        "model": {"base": "tiny-qwen"},
        "data": {"train": ["faq.json"], "validation": 0.2},
        "training": {"max_steps": 2},
    }
    for name in ("recipe.yaml", "my-recipe.yaml"):
        (folder / name).write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks/ours.yaml").write_text(block("evaluation.md", "yaml", "task: ours"), encoding="utf-8")
    question = {"question": "How long is the warranty?", "choices": ["Two years", "A day"], "answer": 0}
    (folder / "benchmarks/rows.json").write_text(json.dumps([question] * 4), encoding="utf-8")
    for name in ("faq", "faq-2", "tone", "run"):
        done = run(folder, ["sft", "--config", "recipe.yaml", "--seed", str(len(name)), "--output", f"out/{name}"])
        assert done.returncode == 0, done.stderr
    shutil.copytree(folder / "out", folder / "runs")
    cached = folder / "hub" / "models--Qwen--Qwen2.5-7B-Instruct"
    shutil.copytree(TINY_QWEN, cached / "snapshots" / REVISION)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(REVISION)
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy for the commands of one page."""
    monkeypatch.setenv("HF_HUB_CACHE", str(prepared / "hub"))
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    return shutil.copytree(prepared, tmp_path / "place", symlinks=True)


def made_by(words: list[str]) -> str:
    """The file or folder that a command writes, and refuses to write over."""
    flags = dict(itertools.pairwise(words))
    training = words[0] == "sft" and not {"--show", "--resume"}.intersection(words)
    return flags.get("--output") or flags.get("--fit") or ("out/qwen7b" if training else "")


def too_wide(words: list[str], printed: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of a command's output that are wider than the terminal, though they could be broken."""
    is_document = OF_TEXTS & {words[0], " ".join(words[:2])} or {"--json", "--show"} & {*words}
    lines = (printed.stderr + ("" if is_document else printed.stdout)).splitlines()
    return [line for line in lines if cell_len(line) > COLUMNS and max(map(len, line.split())) <= LONGEST_WORD]


def fault(folder: Path, words: list[str]) -> str:
    """How a command ends or prints other than it should; "" for nothing. What it makes is not there before."""
    if made := made_by(words):
        shutil.rmtree(folder / made, ignore_errors=True)
        (folder / made).unlink(missing_ok=True)
    line = shlex.join(words)
    expected, message = next((end for part, end in REFUSED.items() if part in line), (0, ""))
    done = run(folder, [GIVEN.get(word, word) for word in words])
    if done.returncode == expected and message in done.stderr:
        wide = too_wide(words, done)
        return "\n".join(("", f"loratune {line}: lines of over {COLUMNS} columns:", *wide)) if wide else ""
    return f"loratune {line}\nexit code {done.returncode}\n{done.stderr[-1500:]}"


PAGES_WITH_COMMANDS = [page for page in PAGES if commands(page) and page.name not in OWN_TEST]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=lambda page: page.relative_to(DOCS.parent).as_posix())
def test_the_commands_of_a_page_work(page: Path, folder: Path) -> None:
    found = [fault(folder, words) for words in commands(page) if not is_lasting(words)]
    assert not any(found), "\n\n".join(filter(None, found))


@pytest.mark.slow
def test_a_command_that_does_not_work_or_fit_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no shipped recipe" in fault(folder, ["data", "check", "--config", "my-recipe"])
    listing = ["runs", "list"]
    assert fault(folder, listing) == ""
    monkeypatch.setenv("COLUMNS", "300")
    shutil.copytree(folder / "out" / "run", folder / "out" / "-".join(["run"] * 15))
    assert "lines of over 80 columns" in fault(folder, listing)


@contextmanager
def started(folder: Path, words: list[str]) -> Iterator[dict[str, Any]]:
    """A server, and the document that it prints when it accepts requests. It has to end by itself on a signal."""
    line = [sys.executable, "-m", "loratune", *words, "--port", "0", "--json"]
    with subprocess.Popen(line, cwd=folder, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            yield json.loads("".join([*iter(process.stdout.readline, "}\n"), "}"]))
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 128 + signal.SIGTERM
        finally:
            process.kill()


LASTING = sorted({shlex.join(words) for page in PAGES for words in commands(page) if is_lasting(words)})


@pytest.mark.slow
@pytest.mark.parametrize("line", LASTING)
def test_a_command_that_serves_shows_its_page_until_it_is_stopped(line: str, folder: Path) -> None:
    with started(folder, shlex.split(line)) as ready, urllib.request.urlopen(ready["url"]) as page:
        assert "<title>" in page.read().decode()


@pytest.mark.slow
def test_the_requests_of_the_page_on_the_server_are_answered(folder: Path) -> None:
    text = "\n".join(shell_blocks(DOCS / "chat-and-server.md"))
    requests = [line for line in text.splitlines() if line.startswith("curl ")]
    assert len(requests) == 3
    with started(folder, ["serve", "--adapter", "faq=out/faq"]) as ready:
        for line in requests:
            given = line.replace("http://127.0.0.1:8000", ready["url"]).replace("API_KEY", ready["api_key"])
            command = ["bash", "-c", f"{given} --silent --show-error --fail"]
            answer = subprocess.run(command, capture_output=True, text=True, check=True)
            assert '"choices"' in answer.stdout
            assert ("data: [DONE]" in answer.stdout) == ('"stream": true' in line)
