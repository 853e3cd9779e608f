"""YAML with line numbers, and without its traps: no duplicate keys, no tags, no aliases, 1e-4 is a number."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_DEPTH = 20


class _Resolver(yaml.SafeLoader):
    """The core schema of YAML 1.2: `no` is a text, `010` is ten, `1e-4` is a number."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


_SCALARS = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     list("-+.0123456789")),
]  # fmt: skip
for _name, _pattern, _first in _SCALARS:
    _Resolver.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


@dataclass
class Document:
    """What a YAML text holds, where each key stands, and what is wrong with its form."""

    values: Any = None
    lines: dict[str, int] = field(default_factory=dict)
    """Dotted key → line, counted from 1."""
    problems: list[tuple[int, str]] = field(default_factory=list)
    """(line, message)."""


def read_yaml(text: str) -> Document:
    """Parse one YAML document; every problem of form is collected rather than raised."""
    document = Document()
    loader = _Resolver(text)
    try:
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(filter(None, [error.problem, error.context]))
        document.problems.append((mark.line + 1 if mark else 1, f"not valid YAML: {problem}"))
    except (yaml.YAMLError, RecursionError) as error:
        document.problems.append((1, f"not valid YAML: {str(error).splitlines()[0]}"))
    else:
        document.values = _Builder(document).build(node, "") if node else None
    finally:
        loader.dispose()
    return document


class _Builder:
    """Turns the node tree into plain values and notes lines and problems on the way."""

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
        if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
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
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(line, "a key must be a plain word")
                continue
            key = key_node.value
            dotted = f"{path}.{key}".lstrip(".")
            if key in values:
                self._refuse(line, f"{dotted} stands here and already on line {self.document.lines[dotted]}")
                continue
            self.document.lines[dotted] = line
            values[key] = self.build(value_node, dotted, depth + 1)
        return values

    def _scalar(self, node: yaml.Node) -> Any:
        kind = node.tag.rpartition(":")[2]
        match kind:
            case "null":
                return None
            case "bool":
                return node.value.lower() == "true"
            case "int":
                return int(node.value)
            case "float":
                return float(re.sub(r"\.(inf|nan)", r"\1", node.value.lower()))
            case "str":
                return node.value
        return self._refuse(node.start_mark.line + 1, f"a value of type {kind} is not allowed in a recipe")

    def _refuse(self, line: int, message: str) -> None:
        self.document.problems.append((line, message))
