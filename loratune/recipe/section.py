"""What all groups of settings have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


def listed(value: Any) -> Any:
    """A single text stands for a list of one, so that a flag given once and a YAML scalar both work."""
    return [value] if isinstance(value, str) else value


TextList = Annotated[list[str], BeforeValidator(listed)]


class Section(BaseModel):
    """A group of settings; unknown keys are errors, types are not coerced, and values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
