"""The traps of YAML, and that nothing but plain values comes out of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.recipe.yaml_reader import MAX_DEPTH, read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("+5", 5),
        ("010", 10),
        ("-0", 0),
        ("0x1F", "0x1F"),
        ("0o10", "0o10"),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("y", "y"),
        ("true", True),
        ("FALSE", False),
        ("tRue", "tRue"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ('"true"', "true"),
        ("!!str 1", "1"),
        ("nan", "nan"),
        ("inf", "inf"),
        ("${HOME}", "${HOME}"),
    ],
)
def test_a_scalar_is_read_as_yaml_1_2_has_it(text: str, value: Any) -> None:
    document = read_yaml(f"key: {text}")
    assert document.problems == []
    assert document.values == {"key": value}
    assert type(document.values["key"]) is type(value)


def test_infinity_and_nan_are_read_as_numbers_so_that_bounds_can_refuse_them() -> None:
    values = read_yaml("a: .inf\nb: -.Inf\nc: .NaN").values
    assert (values["a"], values["b"]) == (math.inf, -math.inf)
    assert math.isnan(values["c"])


def test_lines_are_counted_from_one_and_known_by_dotted_key() -> None:
    text = "# a comment\nlora:\n\n  rank: 8\n  targets:\n    - q_proj\nseed: 1\n"
    assert read_yaml(text).lines == {"lora": 2, "lora.rank": 4, "lora.targets": 5, "seed": 7}


def test_a_repeated_key_is_told_with_both_lines() -> None:
    document = read_yaml("lora:\n  rank: 8\n  alpha: 16\n  rank: 9\n")
    assert document.problems == [(4, "lora.rank is already given on line 2")]


def test_the_same_key_in_two_sections_is_not_repeated() -> None:
    text = "evaluation: {every_steps: 1}\ncheckpoints: {every_steps: 2}"
    assert read_yaml(text).problems == []


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("a: 1\nb: !!python/object/apply:os.system ['true']", 2, "python/object/apply:os.system"),
        ("!!python/name:os.system {}", 1, "python/name:os.system"),
        ("a: !secret x", 1, "!secret"),
        ("a:\n  !section\n  b: 1", 2, "!section"),
        ("a: [1, !x 2]", 1, "!x"),
        ("!k a: 1", 1, "plain word"),
        ("a: !!set {b, c}", 1, "set"),
        ("a: !!binary aGk=", 1, "binary"),
        ("a: !!timestamp 2024-01-01", 1, "timestamp"),
        ("a: !!map 3", 1, "map"),
        ("a: !!int three", 1, "int"),
        ("a: !!float x", 1, "float"),
        ("a: !!bool maybe", 1, "bool"),
        ("a: !!null x", 1, "null"),
    ],
)
def test_a_tag_is_refused_unless_the_value_is_plainly_of_that_type(text: str, line: int, told: str) -> None:
    (problem,) = read_yaml(text).problems
    assert problem[0] == line
    assert told in problem[1]


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("a: &x [1]\nb: *x", 1, "aliases"),
        ("a: &x\n  b: *x", 1, "aliases"),
        ("a: *x", 1, "undefined alias"),
        ("a: 1\n---\nb: 2", 2, "single document"),
        ("a: [1, 2", 1, "not valid YAML"),
        ("a: 1\n b: 2", 2, "not valid YAML"),
        ("a: b\n\tc: d", 2, "not valid YAML"),
        ("a: 'open\nb: 1", 2, "not valid YAML"),
        ("? [a, b]\n: 1", 1, "plain word"),
        ("a: 1\nb: \x00", 2, "U+0000"),
        ("a: 1\n\x1b[2Jb: 2", 2, "U+001B"),
        ('a: 1\nb: "\\ud800"', 2, "UTF-16"),
        ("%YAML 9.9\n---\na: 1", 1, "version"),
        ("a: " + "1" * 5000, 1, "digits"),
    ],
)
def test_a_fault_of_form_is_told_with_its_line(text: str, line: int, told: str) -> None:
    (problem,) = read_yaml(text).problems
    assert problem[0] == line
    assert told in problem[1]


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 200, 5000])
@pytest.mark.parametrize("bracket", ["[]", "{}"])
def test_deep_nesting_is_refused_at_any_depth(depth: int, bracket: str) -> None:
    opening = "[" if bracket == "[]" else "{a: "
    (problem,) = read_yaml("a: " + opening * depth + bracket[1] * depth).problems
    assert problem == (1, f"nested deeper than {MAX_DEPTH} levels")


@pytest.mark.parametrize("text", ["", "   \n\n", "# only a comment\n", "---\n"])
def test_an_empty_text_has_no_values_and_no_problem(text: str) -> None:
    document = read_yaml(text)
    assert not document.values
    assert document.problems == []


def test_all_faults_of_form_in_one_text_are_told() -> None:
    problems = read_yaml("a: 1\na: 2\nb: !x 3\nc: {d: 4, d: 5}\n").problems
    assert [line for line, _ in problems] == [2, 3, 4]


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.from_regex(r"[-+0-9.eE_:xo]{1,6}", fullmatch=True),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(PLAIN)
def test_what_is_written_reads_back_equal_and_of_the_same_type(value: Any) -> None:
    document = read_yaml(write_yaml({"key": value}))
    assert document.problems == []
    assert repr(document.values) == repr({"key": value})


@settings(deadline=None)
@given(st.text())
def test_any_text_is_read_or_has_a_problem_on_one_of_its_lines(text: str) -> None:
    for line, message in read_yaml(text).problems:
        assert 1 <= line <= len(text.splitlines()) + 1
        assert message
