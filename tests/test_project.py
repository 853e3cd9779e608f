"""What the project says of itself: the generated pages, the shipped recipes and rows."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from loratune.errors import agreeing, counted
from loratune.recipe.loading import load_recipe, shipped_recipes

ROOT = Path(__file__).resolve().parent.parent


def test_every_shipped_recipe_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [path.stem for path in shipped_recipes() if f"`{path.stem}`" not in readme] == []


def test_the_generated_pages_are_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "docs", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_installation_ends_with_a_line_that_makes_loratune_a_command(tmp_path: Path) -> None:
    checkout = tmp_path / "my checkout"
    (checkout / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "install", checkout / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        (checkout / name).touch()
    venv = checkout / ".venv"
    (venv / "bin").mkdir(parents=True)
    for name in ("python", "loratune"):
        (venv / "bin" / name).write_text('#!/bin/sh\necho "$0" here\n')
        (venv / "bin" / name).chmod(0o755)
    (venv / "bin" / "activate").write_text(f"PATH='{venv / 'bin'}':$PATH\n")
    plain = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    for place in (checkout, tmp_path):
        install = ["bash", str(checkout / "scripts" / "install")]
        done = subprocess.run(install, cwd=place, env=plain, capture_output=True, text=True, check=True)
        line = done.stdout.splitlines()[-1]
        run = ["bash", "-c", f"{line}\nloratune"]
        assert subprocess.run(run, cwd=place, capture_output=True, text=True, check=True).stdout.endswith("here\n"), (
            line
        )
    active = {**plain, "VIRTUAL_ENV": str(venv)}
    done = subprocess.run(install, cwd=checkout, env=active, capture_output=True, text=True, check=True)
    assert "source" not in done.stdout


@pytest.mark.parametrize("name", ["identity", "company_faq"])
def test_shipped_rows_are_enough_and_in_both_languages(name: str) -> None:
    rows = json.loads((ROOT / "data" / f"{name}.json").read_text(encoding="utf-8"))
    chinese = [row for row in rows if re.search("[一-鿿]", row["instruction"])]
    assert len(rows) >= 60
    assert 0.3 <= len(chinese) / len(rows) <= 0.7
    assert len({row["instruction"] for row in rows}) == len(rows)


def test_identity_rows_hold_both_placeholders_and_faq_rows_no_input() -> None:
    identity = (ROOT / "data" / "identity.json").read_text(encoding="utf-8")
    assert identity.count("{{name}}") > 20
    assert identity.count("{{author}}") > 20
    faq = json.loads((ROOT / "data" / "company_faq.json").read_text(encoding="utf-8"))
    assert not any("input" in row for row in faq)


def test_no_function_is_longer_than_sixty_lines_and_no_module_than_three_hundred() -> None:
    for path in (ROOT / "loratune").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


BARE_COUNT = re.compile(
    r" (?:training |more )?(?:rows|steps|epochs|tensors|trials|fields|sequences|checkpoints|cores)\b"
)
"""A noun in the plural behind a number that may be one."""


def bare_counts(code: str) -> list[str]:
    """The numbers in front of such a noun that `counted` does not format; constants and decimals are none."""
    found = []
    for node in ast.walk(ast.parse(code)):
        for value, after in itertools.pairwise(node.values if isinstance(node, ast.JoinedStr) else ()):
            if isinstance(value, ast.FormattedValue) and isinstance(after, ast.Constant):
                told, is_decimal = ast.unparse(value.value), "." in ast.unparse(value.format_spec or ast.Constant(""))
                if BARE_COUNT.match(str(after.value)) and not told.isupper() and not is_decimal:
                    found.append(told)
    return found


def test_a_number_that_may_be_one_agrees_with_its_noun() -> None:
    assert bare_counts('f"of {n:,} training rows"; f"{MOST} rows"; f"{counted(n, \'row\')} of"') == ["n"]
    code = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "loratune").rglob("*.py")}
    bare = {name: found for name, text in code.items() if (found := bare_counts(text))}
    of_vocabularies = {"base_check": ["rows", "rows"], "tensors": ["' or '.join(map(str, sizes))"]}
    assert bare == of_vocabularies | {"resuming": ["use.rows"]}  # which checkpoints hold word for word
    assert [counted(n, "row of data.train") for n in (0, 1, 2000)] == [
        *("0 rows of data.train", "1 row of data.train", "2,000 rows of data.train"),
    ]
    assert [counted(n, "epoch") for n in (0.5, 1.0, 3.0)] == ["0.5 epochs", "1 epoch", "3 epochs"]
    assert [agreeing(n, "are short") for n in (0, 1, 2)] == ["are short", "is short", "are short"]
    assert agreeing(1, "cannot be read") == "cannot be read"


def test_recipes_named_by_the_user_s_data_run_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in shipped_recipes():
        assert all(Path(name).is_file() for name in load_recipe(path.stem, {}).data.train)


def test_every_extra_that_an_error_names_is_one_of_the_package_s() -> None:
    import re

    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    known = re.findall(r"^([\w-]+) = \[", declared.partition("\n\n[")[0], re.MULTILINE)
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "loratune").rglob("*.py"))
    named = re.findall(r'required\([^()]*?(?:\([^()]*\))?, "([\w-]+)"', code)
    assert {"serve", "metrics", "export", "modelscope", "near-duplicates"} <= set(named) <= set(known)
    assert code.count("pip install") == 1, "what to install is said in loratune/extras.py alone"


def test_every_choice_of_a_flag_has_something_behind_it() -> None:
    from loratune.choices import Combination, ExportFormat, GgufType
    from loratune.delivery.export.comparison import GGUF_BOUNDS
    from loratune.delivery.export.export import FROM_ADAPTER, FROM_MODEL
    from loratune.delivery.export.gguf.file import FILE_TYPES
    from loratune.model.adapter.combination import PEFT_NAMES

    assert {*FROM_MODEL, *FROM_ADAPTER} == {*get_args(ExportFormat)}
    assert {*GGUF_BOUNDS} == {*FILE_TYPES} == {*get_args(GgufType)}
    assert {*PEFT_NAMES} == {*get_args(Combination)}
