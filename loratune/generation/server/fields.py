"""Types of request fields; unsupported values are rejected with an error that names the field, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from loratune.engine.sampling import MaxNewTokens
from loratune.generation.server.failures import TAG, UNKNOWN
from loratune.nearest import MISSPELT, nearest

LONGEST_TEXT = 4 * 2**20
"""Characters of one text; the limit of the whole body is usually lower."""

LONGEST_NAME = 64
"""Characters of an unknown field that are compared with known ones."""


def _whole(value: Any) -> Any:
    """Accept integers written as 1.0, since JSON has only one type of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refuse(value: bool) -> bool:
    if value:
        raise ValueError("is not supported")
    return value


WHOLE = BeforeValidator(_whole)
No = Annotated[bool, AfterValidator(_refuse), WithJsonSchema({"type": "boolean", "const": False})]
Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
Name = Annotated[str, Field(min_length=1, max_length=1024)]
Tokens = Annotated[MaxNewTokens, WHOLE]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Nothing = Annotated[list[Any], Field(max_length=0)]
Zero = Annotated[float, Field(ge=0, le=0)]


NOTHING: tuple[Any, ...] = (None, False, "", [], {})
"""Values without effect in any field: clients send whole objects in which most fields are unset."""


def _allow_nothing(schema: dict[str, Any]) -> None:
    schema["additionalProperties"] = {"enum": list(NOTHING)}


class Fields(BaseModel):
    """A part of a request: strict types, and unknown fields are only accepted with values of NOTHING."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        json_schema_extra=_allow_nothing,
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        # 0 == False, but 0 may have an effect.
        asked = {
            key: inner
            for key, inner in value.items()
            if key in cls.model_fields
            or not any(inner is one or (one is not False and inner == one) for one in NOTHING)
        }
        unknown = next((key for key in asked if key not in cls.model_fields), "")
        if near := nearest(unknown[:LONGEST_NAME], cls.model_fields, MISSPELT):
            error = PydanticCustomError(UNKNOWN, "is not supported", {"meant": near})
            problem = InitErrorDetails(type=error, loc=(unknown,), input=asked[unknown])
            raise ValidationError.from_exception_data(cls.__name__, [problem])
        return asked


class TextPart(Fields):
    """A part of a message's content; images and audio are not supported."""

    type: Literal["text"]
    text: Text


def _tell_contents(value: Any) -> str:
    return f"{TAG}parts" if isinstance(value, list) else f"{TAG}text"


def _tell_lists(value: Any) -> str:
    return f"{TAG}list" if isinstance(value, list) else f"{TAG}text"


Parts = Annotated[list[TextPart], Field(min_length=1, max_length=256)]
Content = Annotated[
    Annotated[Text, Tag(f"{TAG}text")] | Annotated[Parts, Tag(f"{TAG}parts")], Discriminator(_tell_contents)
]
StopSignals = Annotated[
    Annotated[Stop, Tag(f"{TAG}text")] | Annotated[Annotated[list[Stop], Field(max_length=16)], Tag(f"{TAG}list")],
    Discriminator(_tell_lists),
]
Prompt = Annotated[
    Annotated[Annotated[Text, Field(min_length=1)], Tag(f"{TAG}text")]
    | Annotated[
        Annotated[list[Annotated[Text, Field(min_length=1)]], Field(min_length=1, max_length=1)], Tag(f"{TAG}list")
    ],
    Discriminator(_tell_lists),
]
