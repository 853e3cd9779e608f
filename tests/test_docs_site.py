"""The documentation: the site, and the commands that its pages name."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import typer

from loratune.cli.app import app
from loratune.errors import LoratuneError

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
USAGE_ERROR: Any = typer.BadParameter.__base__
"""Click's, which typer has a copy of."""
COMMANDS = {"README.md": 15, "first-steps.md": 8, "several-gpus.md": 5, "evaluation.md": 3, "sweep.md": 3}
"""Least numbers of commands that are found on some pages."""


def shell_blocks(page: Path) -> list[str]:
    """The bash blocks of a page, with continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [block.replace("\\\n", " ") for block in blocks]


def words_of(lines: Iterable[str]) -> list[list[str]]:
    """The words behind `loratune` of each command."""
    parts = (part for line in lines for part in re.split(r"&&|\||;", line.partition(" #")[0]))
    return [shlex.split(re.sub(r"\d?>.*", "", part))[1:] for part in parts if part.strip().startswith("loratune ")]


def commands(page: Path) -> list[list[str]]:
    """The words of each command in the bash blocks of a page."""
    return words_of("\n".join(shell_blocks(page)).splitlines())


def mentioned(page: Path) -> list[list[str]]:
    """The words of each command in the text of a page, which may leave out what does not matter there."""
    return words_of(re.findall(r"(?<!`)`(loratune [^`…]*)`", page.read_text(encoding="utf-8")))


def fault(words: list[str], whole: bool = True) -> str:
    """What the command line finds wrong with a command, without running it; "" for nothing.

    Args:
        words: the words behind `loratune`.
        whole: whether a missing argument is a fault.
    """
    command: Any = typer.main.get_command(app)
    left = words
    try:
        while left and hasattr(command, "resolve_command"):
            context = command.context_class(command, info_name=command.name)
            _, command, left = command.resolve_command(context, left)
        if not hasattr(command, "resolve_command"):
            command.make_context(command.name, left)
    except (USAGE_ERROR, LoratuneError) as error:
        incomplete = re.search("the command needs:|requires an argument", str(error))
        return "" if incomplete and not whole else f"loratune {shlex.join(words)}: {error}"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_have_the_flags_that_they_name(page: Path) -> None:
    whole, parts = commands(page), mentioned(page)
    assert len(whole + parts) >= COMMANDS.get(page.name, 0)
    found = [fault(list(words)) for words in whole] + [fault(list(words), whole=False) for words in parts]
    assert not any(found), "\n".join(filter(None, found))


def test_a_command_with_a_flag_that_does_not_exist_is_found() -> None:
    assert "--adaptor" in fault(["merge", "--adaptor", "out/faq", "--output", "out/merged"])
    assert fault(["merge", "--output", "out/merged"])
    assert "trian" in fault(["trian"])


def test_the_chinese_pages_give_the_commands_of_the_english_ones() -> None:
    english, chinese = (commands(ROOT / "docs" / name) for name in ("first-steps.md", "zh/first-steps.md"))
    assert chinese == english


def test_the_site_has_no_dead_link_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))
    loaded = re.compile(
        r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//|<link[^>]* rel="(?:stylesheet|preload)"[^>]*//'
    )
    assert [page.name for page in pages if loaded.search(page.read_text(encoding="utf-8"))] == []


def test_the_links_of_the_readme_lead_to_files_and_headings() -> None:
    links = re.findall(r"\]\(([^)#:]+)(#[^)]*)?\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 30
    for path, anchor in links:
        assert (ROOT / path).exists(), path
        if anchor:
            titles = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor[1:] in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, anchor


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.slow
def test_the_first_steps_do_what_the_page_says(tmp_path: Path) -> None:
    script = "\n".join(["set -euo pipefail", *shell_blocks(ROOT / "docs" / "first-steps.md")])
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Two years from the day of delivery." in done.stdout
    assert "Better: better on 7 of 7 rows, worse on 0" in done.stdout + done.stderr
    assert (tmp_path / "out/faq-merged/verification.json").exists()
