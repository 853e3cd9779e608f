"""docs/defaults.md says what the code does and what the results say."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from loratune.recipe.sections import default_settings

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "defaults.md").read_text(encoding="utf-8")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module behind `scripts/benchmark defaults`."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("benchmarks.defaults")


def test_the_tables_are_those_of_the_results(program: Any) -> None:
    def missing(results: list[dict[str, Any]]) -> list[str]:
        return [line for line in program.table_lines(results) if line.strip() not in PAGE]

    results = program.read(ROOT / "docs" / "defaults.jsonl")
    assert missing(results) == []
    changed = [*results[:-1], results[-1] | {"unseen": results[-1]["unseen"] + 1e-3}]
    assert len(missing(changed)) == 1


def test_the_defaults_are_those_of_the_recipe() -> None:
    told = dict(re.findall(r"^\| `([a-z]+\.[a-z_]+)` \| (\S+) \|", PAGE, flags=re.MULTILINE))
    assert len(told) == 7
    defaults = default_settings()
    assert {name: float(value) for name, value in told.items()} == {name: defaults[name] for name in told}


def test_a_change_is_the_mean_of_the_seeds_less_the_untrained_model(program: Any) -> None:
    def result(cell: str, seed: str, *losses: float) -> dict[str, Any]:
        return {"model": "m", "cell": cell, "seed": seed, **dict(zip(program.TEXTS, losses, strict=True))}

    cell = "alpha=8,rate=1e-3"
    results = [result("untrained", "", 2, 3, 4), result(cell, "1", 1, 3.5, 4), result(cell, "2", 1.2, 3.5, 4)]
    assert [*program.table_lines(results)][-1] == (
        "| alpha=8 rate=1e-3 | 8.0e-03 | 2 | -0.9000 ± 0.1000 | +0.5000 ± 0.0000 | +0.0000 ± 0.0000 |"
    )
