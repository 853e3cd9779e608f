"""The settings of the data: sources, formats, checks and truncation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from loratune.recipe.findings import FINDINGS, Finding
from loratune.recipe.section import HomePath, Section, listed


class SourceSettings(Section):
    """A file or hub dataset with its own settings."""

    path: HomePath
    """A file, or hf:org/name:split; path#500 and path#2x work here too."""
    system: str | None = None
    """System prompt for its rows without one; overrides prompt.system."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the training rows, relative to the weights of the other sources."""


def _form(entry: Any) -> str:
    return "settings" if isinstance(entry, dict | SourceSettings) else "text"


# The tag selects the type from the value's form, so that an error refers only to the form that was used.
SourceEntry = Annotated[
    Annotated[HomePath, Field(min_length=1), Tag("text")] | Annotated[SourceSettings, Tag("settings")],
    Discriminator(_form),
]
TrainingSources = Annotated[
    list[SourceEntry],
    BeforeValidator(listed, json_schema_input_type=SourceEntry | Annotated[list[SourceEntry], Field(min_length=1)]),
]
Share = Annotated[float, Field(ge=0, le=0.9)]


def _names(entries: list[str | SourceSettings]) -> list[str]:
    return [entry if isinstance(entry, str) else entry.path for entry in entries]


def _weight(entry: str | SourceSettings) -> float | None:
    return None if isinstance(entry, str) else entry.weight


class DataSettings(Section):
    """Training and validation rows, and how they are checked."""

    train: TrainingSources = Field(
        min_length=1,
        description="Rows: JSON, JSONL, CSV, Parquet (.gz, .zst), or hf:org/name:split; Alpaca, ShareGPT, messages or "
        "pairs. rows.json#500 draws 500, rows.json#2x takes each twice, {path: rows.json, weight: 10} mixes.",
    )
    validation: Annotated[
        float | list[SourceEntry],
        BeforeValidator(listed, json_schema_input_type=Share | SourceEntry | list[SourceEntry]),
    ] = 0.1
    """Validation rows: a fraction of the training rows, or sources like those of train; 0 for none."""
    placeholders: dict[str, str] = {}
    """Values for {{name}}-like placeholders in the rows, as name=value."""
    columns: dict[str, str] = {}
    """Maps column names that no format knows: `instruction=question`, one pair per flag."""
    encoding: str = "utf-8"
    """Text encoding of the files, such as gb18030; files in another encoding are rejected."""
    train_on_turns: Literal["all", "last"] = "all"
    """Which answers of a conversation to train on: all, or only the last."""
    train_thinking: bool = True
    """Also train the reasoning of an answer, not only the text after it."""
    truncation_strategy: Literal["drop", "truncate_prompt", "truncate_answer", "refuse"] = "drop"
    """For rows longer than training.max_length: drop them, truncate the prompt or the answer, or stop."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """For rows that cannot be read or trained on: stop, or skip up to max_bad_rows of them."""
    max_bad_rows: int = Field(default=100, ge=1)
    """Maximum number of rows that on_bad_row: skip may skip."""
    severity: dict[Finding, Literal["refuse", "warn", "ignore"]] = {}
    """Overrides the severity of findings (see remove), such as short=ignore, duplicates=refuse."""
    remove: Annotated[list[Finding], BeforeValidator(listed, json_schema_input_type=Finding | list[Finding])] = Field(
        default=[],
        description=f"Findings whose rows are removed, with a report: {', '.join(FINDINGS)}.",
    )
    near_duplicates: float | None = Field(default=None, gt=0, lt=1)
    """Minimum similarity of near duplicates, such as 0.8; off by default, because the search is slow."""
    seed: int | None = Field(default=None, ge=0, le=2**32 - 1)
    """Seed of the split, sampling and mixture, to keep the rows while seed changes; default is seed."""

    @field_validator("columns")
    @classmethod
    def _columns_are_named(cls, columns: dict[str, str]) -> dict[str, str]:
        if any(not name.strip() for pair in columns.items() for name in pair):
            raise ValueError("write NAME=COLUMN, such as instruction=question; neither may be empty")
        return columns

    @field_validator("validation")
    @classmethod
    def _fraction_in_range(cls, validation: float | list[str | SourceSettings]) -> float | list[str | SourceSettings]:
        if isinstance(validation, float) and not 0 <= validation <= 0.9:
            raise ValueError("a fraction must be between 0 and 0.9")
        if isinstance(validation, list) and any(_weight(entry) for entry in validation):
            raise ValueError("weights mix training rows; all validation rows are used")
        return validation

    @model_validator(mode="after")
    def _similarity_is_given(self) -> DataSettings:
        asked = "near_duplicates" in self.remove or self.severity.get("near_duplicates", "ignore") != "ignore"
        if asked and self.near_duplicates is None:
            raise ValueError("near_duplicates in data.remove or data.severity needs data.near_duplicates, such as 0.8")
        return self

    @property
    def train_names(self) -> list[str]:
        """Names of the training sources, as in the recipe."""
        return _names(self.train)

    @property
    def validation_sources(self) -> list[str | SourceSettings]:
        """The sources of validation rows; empty if a fraction is split off."""
        return self.validation if isinstance(self.validation, list) else []

    @property
    def validation_names(self) -> list[str]:
        """Names of the validation sources, as in the recipe; empty if a fraction is split off."""
        return _names(self.validation_sources)

    @field_validator("train")
    @classmethod
    def _all_weighted_or_none(cls, train: list[str | SourceSettings]) -> list[str | SourceSettings]:
        if len({_weight(entry) is None for entry in train}) > 1:
            raise ValueError("give every source a weight, or none")
        return train
