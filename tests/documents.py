"""Checks the JSON documents of commands with a validator of JSON Schema that is not pydantic's."""

from __future__ import annotations

import functools
import json
from typing import Any

from jsonschema import Draft202012Validator
from typer.testing import Result

from loratune.cli.schema import documents


@functools.cache
def validator(name: str) -> Any:
    """The validator of a command's document: merge, data-check, error."""
    schema = documents()[name].json_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def faults(document: Any) -> list[str]:
    """What of a document its own schema does not allow."""
    name = document["schema"].split("/")[1]
    assert document["schema"] == documents()[name].schema
    return [f"{error.json_path}: {error.message}" for error in validator(name).iter_errors(document)]


def require_one_document(result: Result) -> None:
    """Whatever became of a command line with --json, stdout is one document, and an error says its exit code."""
    document = json.loads(result.stdout)
    if "$schema" in document:
        Draft202012Validator.check_schema(document)
        return
    assert faults(document) == []
    if document["schema"].startswith("loratune/error/"):
        assert document["exit_code"] == result.exit_code != 0
