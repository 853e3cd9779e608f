"""Makes JSON Schema of the types of values: strict, with the descriptions that stand below their fields."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from loratune.recipe.json_schema import DIALECT
from loratune.runs.typed_json import BESIDE

Schema = dict[str, Any]


class _Strict(GenerateJsonSchema):
    """All keys are written, and there are no others."""

    def typed_dict_schema(self, schema: core_schema.TypedDictSchema) -> Schema:
        return _described(super().typed_dict_schema(schema), schema.get("cls"))

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> Schema:
        return _described(super().dataclass_schema(schema), schema["cls"])

    def field_is_required(self, field: Any, total: bool) -> bool:
        return bool(field.get("required", total)) if field["type"] == "typed-dict-field" else True


def schema_of(kind: Any, title: str, added: Schema) -> Schema:
    """Return the JSON Schema of a type's values, in JSON.

    Args:
        kind: a TypedDict, a dataclass, or a union of them.
        title: of the schema.
        added: further keys of the object, or of each object of the union.
    """
    made = TypeAdapter(kind).json_schema(schema_generator=_Strict, mode="serialization")
    definitions = {name: _without_titles(one) for name, one in made.pop("$defs", {}).items()}
    for one in definitions.values():
        _spread(one, definitions)
    shapes = [_whole(shape, definitions, added) for shape in made.get("anyOf", [made])]
    head: Schema = {"$schema": DIALECT, "title": title}
    body = shapes[0] if len(shapes) == 1 else {"anyOf": shapes}
    used = _reached(body, definitions)
    return head | body | ({"$defs": {name: definitions[name] for name in sorted(used)}} if used else {})


def _whole(shape: Schema, definitions: dict[str, Schema], added: Schema) -> Schema:
    """Return one shape of the document, with keys added in front."""
    whole = dict(definitions[_name(shape)]) if "$ref" in shape else _without_titles(shape)
    _spread(whole, definitions)
    return whole | {
        "properties": added | whole.get("properties", {}),
        "required": [*added, *whole.get("required", [])],
    }


def _spread(schema: Schema, definitions: dict[str, Schema]) -> None:
    """Put the keys of values that are written beside the others in their place."""
    properties = schema.get("properties", {})
    for name in [name for name, value in properties.items() if value.get(BESIDE)]:
        inner = definitions[_name(properties.pop(name))]
        _spread(inner, definitions)
        properties.update(inner["properties"])
        schema["required"] = [*(key for key in schema["required"] if key != name), *inner["required"]]


def _name(reference: Schema) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _reached(schema: Any, definitions: dict[str, Schema]) -> set[str]:
    """Return the names of the definitions that a schema uses, also through others."""
    found: set[str] = set()
    places: list[Any] = [schema]
    while places:
        place = places.pop()
        if isinstance(place, list):
            places += place
        elif isinstance(place, dict):
            if "$ref" in place and _name(place) not in found:
                found.add(_name(place))
                places.append(definitions[_name(place)])
            places += place.values()
    return found


def _without_titles(schema: Schema) -> Schema:
    """Leave out the titles that are made of the names of keys."""
    kept = {name: value for name, value in schema.items() if name != "title"}
    if "properties" in kept:
        of_keys = kept["properties"].items()
        kept["properties"] = {key: {n: v for n, v in value.items() if n != "title"} for key, value in of_keys}
    return kept


def _described(schema: Schema, cls: Any) -> Schema:
    texts = field_texts(cls)
    for name, value in schema["properties"].items():
        if name in texts:
            value.setdefault("description", texts[name])
    about = {"description": _in_json(schema["description"])} if "description" in schema else {}
    return schema | about | {"additionalProperties": False}


def field_texts(cls: type) -> dict[str, str]:
    """Return field → the string below it, for the fields of a class and its bases."""
    texts: dict[str, str] = {}
    bases = getattr(cls, "__orig_bases__", ()) if cls.__mro__ == (cls, dict, object) else cls.__mro__[1:]
    for base in reversed([base for base in bases if getattr(base, "__annotations__", None)]):
        texts |= field_texts(base)
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except OSError:  # made by a call, as a TypedDict with the key `from` has to be
        return texts
    assert isinstance(body, ast.ClassDef)
    for field, below in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)):
            continue
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            texts[field.target.id] = _in_json(str(below.value.value))
    return texts


def _in_json(text: str) -> str:
    """Return a description as one line, in JSON's words."""
    return re.sub(r"\bNone\b", "null", " ".join(text.split()))
