"""Makes JSON Schema of recipes, with which editors complete and check them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from loratune.recipe.names import DROPPED, RENAMED
from loratune.recipe.section import Section
from loratune.recipe.sections import Recipe
from loratune.recipe.sweep_section import SWEEP, SweepSettings

DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]


def recipe_schema() -> Schema:
    """Return the schema of recipes: all settings with descriptions, defaults, choices and bounds, and no other keys.

    Earlier names of settings are in it as deprecated. What settings demand of each other is not.
    """
    made = Recipe.model_json_schema()
    sections: dict[str, Schema] = made["$defs"]
    for old, new in RENAMED.items():
        place, name = _place(made, sections, new)
        old_place, old_name = _place(made, sections, old)
        old_place[old_name] = deepcopy(place[name]) | {"deprecated": True, "description": f"Now called {new}."}
    for old, why in DROPPED.items():
        place, name = _place(made, sections, old)
        place[name] = {"type": "integer", "deprecated": True, "description": f"Not needed: {why}."}
    for name, field in Recipe.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section) and not field.is_required():  # empty, it is null
            made["properties"][name] = {"anyOf": [{"$ref": f"#/$defs/{kind.__name__}"}, {"type": "null"}]}
    return {"$schema": DIALECT, **_untitled(made), "title": "A recipe of loratune"}


def sweep_schema() -> Schema:
    """Return the schema of a sweep's recipe, which has a section of its own besides."""
    made, section = recipe_schema(), _untitled(SweepSettings.model_json_schema())
    made["properties"][SWEEP] = section
    return made | {"title": "A sweep's recipe of loratune"}


def _place(made: Schema, sections: dict[str, Schema], dotted: str) -> tuple[Schema, str]:
    """Return the properties that a setting is one of, and its key in them."""
    section, _, name = dotted.rpartition(".")
    if not section:
        return made["properties"], name
    kind = Recipe.model_fields[section].annotation
    assert kind is not None
    return sections[kind.__name__]["properties"], name


def _untitled(schema: Any) -> Any:
    """Leave out the titles that pydantic makes of the names of keys; no setting is called title."""
    if isinstance(schema, dict):
        return {key: _untitled(value) for key, value in schema.items() if key != "title"}
    return [_untitled(one) for one in schema] if isinstance(schema, list) else schema
