"""junit.xml, which continuous integration shows: a test for each decision, and for each row with asserts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from loratune.evaluation.evidence import Sample
from loratune.evaluation.result import Evaluation
from loratune.printable import printable, shortened
from loratune.writing import write_pieces

JUNIT = "junit.xml"
NAME_LENGTH = 80


def write_junit(folder: Path, evaluation: Evaluation, samples: Sequence[Sample]) -> None:
    """Write an evaluation as JUnit's XML.

    A decision fails if it is worse, and a row fails if an assert does not hold for the tuned model.

    Args:
        folder: the output folder.
        evaluation: the result.
        samples: all rows.
    """
    root = ElementTree.Element("testsuites", name="loratune eval")
    decisions = [(one.name, one.verdict == "worse", one.why) for one in evaluation.decisions]
    _add_suite(root, "decisions", decisions)
    rows = sorted((one for one in samples if one.has_asserts), key=lambda one: one.row)
    _add_suite(root, "asserts", [(_name(one), bool(one.failed), _why(one)) for one in rows])
    write_pieces(folder / JUNIT, [ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)])


def _add_suite(root: ElementTree.Element, name: str, tests: Sequence[tuple[str, bool, str]]) -> None:
    failures = sum(has_failed for _, has_failed, _ in tests)
    suite = ElementTree.SubElement(root, "testsuite", name=name, tests=str(len(tests)), failures=str(failures))
    for title, has_failed, why in tests:
        case = ElementTree.SubElement(suite, "testcase", classname=f"loratune.eval.{name}", name=_clean(title))
        if has_failed:
            ElementTree.SubElement(case, "failure", message=_clean(shortened(why, 300))).text = _clean(why)


def _name(one: Sample) -> str:
    return f"{one.place}: {shortened(' '.join(one.question.split()), NAME_LENGTH)}"


def _why(one: Sample) -> str:
    lines = [f"{text}{'' if text in one.failed_before else ' (holds for the baseline)'}" for text in one.failed]
    return "\n".join([*lines, f"answer: {one.tuned}"])


def _clean(text: str) -> str:
    """Remove what XML cannot hold."""
    kept = printable(text).encode("utf-8", "replace").decode()
    return "".join(sign for sign in kept if sign not in "\ufffe\uffff")
