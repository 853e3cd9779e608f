"""What all groups of settings have in common."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict


def listed(value: Any) -> Any:
    """A single text stands for a list of one, so that a flag given once and a YAML scalar both work."""
    return [value] if isinstance(value, str) else value


def named_modules(value: Any) -> Any:
    """Names of modules: a list, or texts that may hold several names, as `q_proj,v_proj` does elsewhere."""
    names = listed(value)
    if not isinstance(names, list):
        return names
    parts = [name.split(",") if isinstance(name, str) else [name] for name in names]
    return [name.strip() if isinstance(name, str) else name for several in parts for name in several]


def _at_home(path: str) -> str:
    if not path.strip():
        raise ValueError("must not be empty")
    return os.path.expanduser(path) if path == "~" or path.startswith("~/") else path  # noqa: PTH111 - a text stays one


HomePath = Annotated[str, AfterValidator(_at_home)]
"""A path in which ~ means the home folder, as in a shell, which does not see the values of a recipe."""
ModuleNames = Annotated[list[str], BeforeValidator(named_modules)]


class Section(BaseModel):
    """A group of settings; unknown keys are errors, types are not coerced, and values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
