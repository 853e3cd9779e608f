"""What docs/contributing.md says is to be touched together: lists that must name the same things."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from loratune.choices import ExportFormat
from loratune.cli.export import DETAILS
from loratune.data.checks.inspection import FLAGS
from loratune.data.formats.conversation import Conversation
from loratune.data.formats.registry import FORMATS, ConversationReader, Format, detect_format
from loratune.data.template.thinking import VALUES
from loratune.delivery.export.export import FROM_ADAPTER, FROM_MODEL
from loratune.delivery.export.rehearsal import CHECKS
from loratune.errors import SINGULAR
from loratune.recipe.findings import FINDINGS, Finding
from loratune.recipe.sections import TEMPLATE_ARGUMENTS

ROOT = Path(__file__).resolve().parent.parent
DATA_PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
FOLDER_PAGE = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
EXPORTS = [*FROM_ADAPTER, *FROM_MODEL]
# The table of formats: a name, and a row whose tools are left to be imagined.
EXAMPLES: dict[str, dict[str, Any]] = {
    name: json.loads(re.sub(r', "tools": (\[…\]|"…")', "", row))
    for name, row in re.findall(r"^\| ([\w ]+) \| `(\{.*\})` \|$", DATA_PAGE, re.MULTILINE)
}


def test_every_finding_is_told_in_words_and_every_flag_is_a_finding() -> None:
    assert list(FINDINGS) == list(get_args(Finding))
    assert set(FLAGS) <= set(FINDINGS)
    verbs = {text.split()[0] for about in FINDINGS.values() for text in (about.sentence, about.of_removed) if text}
    assert verbs <= SINGULAR.keys()  # a sentence is said of one row too


def test_every_format_is_on_the_data_page_with_a_row_that_is_in_it() -> None:
    assert set(EXAMPLES) == {kind.name for kind in FORMATS}
    for name, row in EXAMPLES.items():
        assert detect_format([row], {}).name == name


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_a_row_of_every_format_can_be_asked_without_its_answer(kind: Format) -> None:
    """`infer --input` must not hold a list of formats of its own, nor a new one be trained on alone."""
    row = EXAMPLES[kind.name]
    read = ConversationReader(kind, {}, {}).read(row)
    assert isinstance(read, Conversation)
    shortened = [{name: value for name, value in row.items() if name != left_out} for left_out in row]
    shortened += [row | {name: turns[:-1]} for name, turns in row.items() if isinstance(turns, list)]
    questions = [
        ConversationReader(kind, {}, {}, are_questions=True).read(one)
        for one in shortened
        if detect_format([one], {}, are_questions=True) is kind
    ]
    assert (*read.messages[:-1], {"role": "assistant", "content": ""}) in [
        asked.messages for asked in questions if isinstance(asked, Conversation)
    ]


def test_every_argument_of_chat_templates_has_values_to_try() -> None:
    assert set(TEMPLATE_ARGUMENTS) == set(VALUES)


def test_every_export_can_be_asked_for_is_rehearsed_and_is_described() -> None:
    assert set(get_args(ExportFormat)) == set(EXPORTS)
    assert set(CHECKS) == set(FROM_MODEL)
    for name in EXPORTS:
        assert re.search(rf"\b{name}\b", DETAILS)
        assert re.search(rf"\b{name}\b", FOLDER_PAGE)
        assert f'"{name}", ' in GUIDE  # in the example of a new one


def test_every_file_and_test_that_the_guide_names_is_there() -> None:
    named = set(re.findall(r"`((?:loratune|tests|docs|scripts|configs)/[\w./-]+?)(?:::(\w+))?`", GUIDE))
    assert len(named) > 20
    for path, test in named:
        assert (ROOT / path).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), test
