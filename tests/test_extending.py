"""What CONTRIBUTING.md says is to be touched together: lists that must name the same things."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from loratune.cli.export import DETAILS, Format
from loratune.data.checks.findings import SENTENCES
from loratune.data.formats.registry import FORMATS
from loratune.delivery.export.export import FROM_ADAPTER, FROM_MODEL
from loratune.delivery.export.rehearsal import CHECKS
from loratune.recipe.data_sections import DataSettings, Finding

ROOT = Path(__file__).resolve().parent.parent
DATA_PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
FOLDER_PAGE = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXPORTS = [*FROM_ADAPTER, *FROM_MODEL]


def test_every_finding_is_told_in_words_listed_and_on_the_data_page() -> None:
    assert set(SENTENCES) == set(get_args(Finding))
    listed = DataSettings.model_fields["remove"].description or ""
    for name in SENTENCES:
        assert f"| `{name}` |" in DATA_PAGE
        assert re.search(rf"\b{name}\b", listed)


@pytest.mark.parametrize("name", [kind.name for kind in FORMATS])
def test_every_format_is_on_the_data_page(name: str) -> None:
    assert f"| {name} |" in DATA_PAGE


def test_every_export_can_be_asked_for_is_rehearsed_and_is_described() -> None:
    (choices, option) = get_args(Format)
    assert set(get_args(choices)) == set(EXPORTS)
    assert option.metavar == "|".join(get_args(choices))
    assert set(CHECKS) == set(FROM_MODEL)
    for name in EXPORTS:
        assert re.search(rf"\b{name}\b", DETAILS)
        assert re.search(rf"\b{name}\b", FOLDER_PAGE)


def test_every_file_and_test_that_the_guide_names_is_there() -> None:
    named = set(re.findall(r"`((?:loratune|tests|docs|scripts|configs)/[\w./-]+?)(?:::(\w+))?`", GUIDE))
    assert len(named) > 20
    for path, test in named:
        assert (ROOT / path).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), test
