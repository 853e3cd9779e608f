"""What later commands need to know of a run's settings: typed, with a version of its own, a part of manifest.json.

`recipe.yaml` is for people, and to train again. Its settings come and go with the versions of loratune; a run's record
stays readable, since a section that an earlier version wrote is read by the present names of its settings, and what it
lacks has the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from loratune.recipe.names import with_current_names
from loratune.recipe.section import Section
from loratune.recipe.sections import LoraSettings, ModelSettings, PromptSettings, Recipe

RECORD_VERSION = 1
SectionKind = TypeVar("SectionKind", bound=Section)


@dataclass(frozen=True)
class RunRecord:
    """How an adapter came to be, as far as its use depends on it."""

    name: str
    """Of the run: that of its output folder."""
    model: ModelSettings
    """The base, as the recipe named it, and how it was held in memory."""
    lora: LoraSettings
    prompt: PromptSettings
    learning_rate: float
    training: dict[str, str] = field(default_factory=dict)
    """What a model card says of the training, ready to be read."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of the rows' columns, as data.columns."""
    placeholders: dict[str, str] = field(default_factory=dict)
    paths: tuple[str, ...] = ()
    """Of the output and of the data; nothing that is given away may name them."""

    @classmethod
    def of(cls, recipe: Recipe) -> RunRecord:
        """The record of a run of this recipe."""
        training, data = recipe.training, recipe.data
        return cls(
            name=Path(recipe.output).name,
            model=recipe.model,
            lora=recipe.lora,
            prompt=recipe.prompt,
            learning_rate=training.learning_rate,
            training={
                "learning rate, schedule": f"{training.learning_rate:g}, {training.scheduler}",
                "rows per device and step": f"{training.batch_size} × {training.gradient_accumulation}",
                "longest row": f"{training.max_length} tokens",
                "data": ", ".join(Path(name).name for name in data.train_names),
            },
            columns=data.columns,
            placeholders=data.placeholders,
            paths=(recipe.output, *data.train_names, *data.validation_names),
        )

    def settings(self) -> dict[str, Any]:
        """Dotted name → value of each setting that the adapter is loaded, asked and merged with, in JSON types."""
        sections = {"model": self.model, "lora": self.lora, "prompt": self.prompt}
        return {
            f"{section}.{name}": value
            for section, settings in sections.items()
            for name, value in settings.model_dump(mode="json").items()
        }

    def values(self) -> dict[str, Any]:
        """The record in JSON types, as `read_record` takes it."""
        sections = {name: getattr(self, name).model_dump(mode="json") for name in ("model", "lora", "prompt")}
        return {"version": RECORD_VERSION, **asdict(self), **sections, "paths": list(self.paths)}


def read_record(values: Mapping[str, Any]) -> RunRecord:
    """A record as a run has written it; keys that this version does not know are left out.

    Raises:
        ValueError: it was written by a later version, or is damaged.
    """
    if values.get("version") != RECORD_VERSION:
        raise ValueError(f"its record has version {values.get('version')}; this loratune reads {RECORD_VERSION}")
    try:
        return RunRecord(
            name=str(values["name"]),
            model=_section("model", ModelSettings, values),
            lora=_section("lora", LoraSettings, values),
            prompt=_section("prompt", PromptSettings, values),
            learning_rate=float(values["learning_rate"]),
            training=dict(values["training"]),
            columns=dict(values["columns"]),
            placeholders=dict(values["placeholders"]),
            paths=tuple(values["paths"]),
        )
    except (AttributeError, KeyError, TypeError, ValidationError) as error:
        raise ValueError(f"its record is damaged: {type(error).__name__}: {error}") from error


def _section(name: str, kind: type[SectionKind], values: Mapping[str, Any]) -> SectionKind:
    flat = with_current_names({f"{name}.{key}": value for key, value in values[name].items()})
    known = {key.removeprefix(f"{name}."): value for key, value in flat.items()}
    return kind.model_validate({key: value for key, value in known.items() if key in kind.model_fields})
