"""Parses YAML with line numbers and strict rules: no duplicate keys, tags or aliases, and 1e-4 is a number."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_DEPTH = 20
MAX_DIGITS = 100
_KINDS = {
    yaml.ScalarNode: ("null", "bool", "int", "float", "str"),
    yaml.SequenceNode: ("seq",),
    yaml.MappingNode: ("map",),
}
SURROGATE = re.compile(r"[\ud800-\udfff]")


class _Resolver(yaml.SafeLoader):
    """The core schema of YAML 1.2: `no` is a string, `010` is ten, `1e-4` is a number."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


_SCALARS = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     list("-+.0123456789")),
]  # fmt: skip
_PATTERNS = {name: re.compile(rf"^(?:{pattern})\Z") for name, pattern, _ in _SCALARS}


class _Writer(yaml.SafeDumper):
    """Quotes every string that `_Resolver` or a YAML 1.1 parser would read as another type."""

    def analyze_scalar(self, scalar: str) -> Any:
        """Force the escaped style for strings with rare line breaks, which folding would turn into spaces."""
        analysis = super().analyze_scalar(scalar)
        if re.search("[\x85\u2028\u2029]", scalar):
            analysis.allow_single_quoted = analysis.allow_block = False
        return analysis


for _name, _, _first in _SCALARS:
    for _side in (_Resolver, _Writer):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _PATTERNS[_name], _first)


@dataclass
class Document:
    """Values and line numbers of a YAML text, and problems of its syntax."""

    values: Any = None
    lines: dict[str, int] = field(default_factory=dict)
    """Dotted key → line, counted from 1."""
    problems: list[tuple[int, str]] = field(default_factory=list)
    """(line, message)."""


def read_yaml(text: str) -> Document:
    """Parse one YAML document; problems are collected instead of raised."""
    document = Document()
    try:
        # The constructor already reads characters, so it is inside the try; the loader needs no closing.
        node = _Resolver(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(filter(None, [error.problem, error.context]))
        document.problems.append((mark.line + 1 if mark else 1, f"not valid YAML: {problem}"))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        document.problems.append((line, f"not valid YAML: the character U+{error.character:04X} is not allowed"))
    except RecursionError:
        document.problems.append((1, f"nested deeper than {MAX_DEPTH} levels"))
    else:
        document.values = _Builder(document).build(node, "") if node else None
    return document


def write_yaml(values: dict[str, Any], is_ascii: bool = False) -> str:
    """Return YAML text that `read_yaml` parses to equal values.

    Args:
        values: values of plain types.
        is_ascii: escape all non-ASCII characters.
    """
    return yaml.dump(values, Dumper=_Writer, sort_keys=False, allow_unicode=not is_ascii, width=100)


class _Builder:
    """Converts the node tree into plain values and records lines and problems."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.seen: set[int] = set()

    def build(self, node: yaml.Node, path: str, depth: int = 0) -> Any:
        line = node.start_mark.line + 1
        if id(node) in self.seen:
            return self._refuse(line, "aliases (*name) are not allowed; write the value out")
        self.seen.add(id(node))
        if depth > MAX_DEPTH:
            return self._refuse(line, f"nested deeper than {MAX_DEPTH} levels")
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _KINDS[type(node)]:
            return self._refuse(line, f"the tag {node.tag!r} is not allowed; a recipe holds plain values")
        if isinstance(node, yaml.MappingNode):
            return self._build_mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, f"{path}.{index}", depth + 1) for index, item in enumerate(node.value)]
        return self._scalar(node)

    def _build_mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.tag.startswith("tag:yaml.org,2002:"):
                self._refuse(line, "a key must be a plain word")
                continue
            key = key_node.value
            dotted = f"{path}.{key}".lstrip(".")
            if key in values:
                self._refuse(line, f"{dotted} is already given on line {self.document.lines[dotted]}")
                continue
            self.document.lines[dotted] = line
            values[key] = self.build(value_node, dotted, depth + 1)
        return values

    def _scalar(self, node: yaml.Node) -> Any:
        kind, line = node.tag.rpartition(":")[2], node.start_mark.line + 1
        if kind == "str":
            is_text = node.value.isascii() or not SURROGATE.search(node.value)
            return node.value if is_text else self._refuse(line, "an unpaired UTF-16 surrogate is not allowed")
        if not _PATTERNS[kind].match(node.value):
            return self._refuse(line, f"{node.value!r} is not a value of type {kind}")
        match kind:
            case "bool":
                return node.value.lower() == "true"
            case "int" if len(node.value) > MAX_DIGITS:
                return self._refuse(line, f"a number of more than {MAX_DIGITS} digits is not allowed")
            case "int":
                return int(node.value)
            case "float":
                return float(re.sub(r"\.(inf|nan)", r"\1", node.value.lower()))
        return None

    def _refuse(self, line: int, message: str) -> None:
        self.document.problems.append((line, message))
