"""`loratune schema`: prints JSON Schemas."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typing_extensions import TypedDict

from loratune import console
from loratune.cli import failures, mcp
from loratune.cli.commands import command_lines, command_module
from loratune.cli.documents import Document
from loratune.errors import Exit, LoratuneError

RECIPES = ("recipe", "sweep-recipe")
DETAILS = """\
With --json, every command prints one JSON document to stdout; its key schema has its name and version, such as
loratune/merge/1. A command that fails prints loratune/error/1, with the exit code and a list of problems, each with
its place and remedy.

schema recipe is for editors, which complete recipes with it, and schema error for what a failure prints. Without a
name, all schemas are listed."""


class ListedSchema(TypedDict):
    """A schema that can be printed."""

    name: str
    """For `loratune schema NAME`."""
    document: str | None
    """Name and version as documents say them; null for recipes."""


class Schemas(TypedDict):
    """All schemas."""

    schemas: list[ListedSchema]


DOCUMENT = Document("schema", 1, lambda: Schemas)


def documents() -> dict[str, Document]:
    """Return name → document of every command that prints one, of the agents' tools, and of errors."""
    modules = [command_module("_".join(line)) for line in command_lines()]
    found: list[Document] = [module.DOCUMENT for module in modules if hasattr(module, "DOCUMENT")]
    return {document.name: document for document in [*found, mcp.STARTED, failures.DOCUMENT]}


def command(
    name: Annotated[
        str | None, typer.Argument(help="recipe, error, or a command such as merge or data-check.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the list as JSON to stdout; schemas always are.")] = False,
) -> None:
    known = documents()
    if name is not None:
        console.write_json(_schema(name, known))
        return
    listed: Schemas = {
        "schemas": [
            *(ListedSchema(name=recipe, document=None) for recipe in RECIPES),
            *(ListedSchema(name=one.name, document=one.schema) for one in known.values()),
        ]
    }
    if json:
        DOCUMENT.write(listed)
        return
    console.table([(one["name"], one["document"] or "recipes") for one in listed["schemas"]], is_result=True)


def _schema(name: str, known: dict[str, Document]) -> dict[str, Any]:
    if name in RECIPES:
        from loratune.recipe.json_schema import recipe_schema, sweep_schema

        return recipe_schema() if name == "recipe" else sweep_schema()
    wanted = "-".join(name.split())
    if wanted not in known:
        raise LoratuneError(f"{name}: no schema of that name; there are {', '.join([*RECIPES, *known])}", Exit.USAGE)
    return known[wanted].json_schema()
