"""The base class and the value types of settings."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def listed(value: Any) -> Any:
    """Turn a single string into a list, so that a flag given once and a YAML scalar both work."""
    return [value] if isinstance(value, str) else value


def named_modules(value: Any) -> Any:
    """Split module names: a list, or strings with several names, such as `q_proj,v_proj`."""
    names = listed(value)
    if not isinstance(names, list):
        return names
    parts = [name.split(",") if isinstance(name, str) else [name] for name in names]
    return [name.strip() if isinstance(name, str) else name for several in parts for name in several]


def _at_home(path: str) -> str:
    if not path.strip():
        raise ValueError("must not be empty")
    return os.path.expanduser(path) if path == "~" or path.startswith("~/") else path  # noqa: PTH111 - a text stays one


HomePath = Annotated[str, AfterValidator(_at_home), Field(json_schema_extra={"pattern": r"\S"})]
"""A path in which ~ is the home folder. The shell does not expand it in a recipe or after `=`."""
ModuleNames = Annotated[list[str], BeforeValidator(named_modules, json_schema_input_type=str | list[str])]


class Section(BaseModel):
    """A group of settings: unknown keys are errors, types are not coerced, instances are immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
