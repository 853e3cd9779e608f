"""The settings of a run that later commands need: a typed and versioned part of manifest.json.

`recipe.yaml` is for people, and for training again; its settings change with versions of loratune. A run's record stays
readable: settings of earlier versions are read under their present names, and missing ones have defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from loratune.recipe.method_sections import LoraSettings, Method
from loratune.recipe.names import with_current_names
from loratune.recipe.section import Section
from loratune.recipe.sections import ModelSettings, PromptSettings, Recipe

RECORD_VERSION = 1
_METHOD: TypeAdapter[Method] = TypeAdapter(Method)
SectionKind = TypeVar("SectionKind", bound=Section)


@dataclass(frozen=True)
class RunRecord:
    """How an adapter was trained, as far as its use depends on it."""

    name: str
    """Name of the output folder."""
    model: ModelSettings
    """The base and how it was loaded."""
    lora: LoraSettings
    prompt: PromptSettings
    learning_rate: float
    method: Method = "lora"
    training: dict[str, str] = field(default_factory=dict)
    """Lines about the training for a model card."""
    columns: dict[str, str] = field(default_factory=dict)
    """Value of data.columns."""
    placeholders: dict[str, str] = field(default_factory=dict)
    paths: tuple[str, ...] = ()
    """Paths of output and data, which published files must not contain."""

    @classmethod
    def of(cls, recipe: Recipe) -> RunRecord:
        """Return the record of a recipe's run."""
        training, data = recipe.training, recipe.data
        return cls(
            name=Path(recipe.output).name,
            model=recipe.model,
            lora=recipe.lora,
            method=recipe.method,
            prompt=recipe.prompt,
            learning_rate=training.learning_rate,
            training=_trained_weights(recipe)
            | {
                "learning rate, schedule": f"{training.learning_rate:g}, {training.scheduler}",
                "rows per step": str(training.batch_size),
                "longest row": f"{training.max_length} tokens",
                "data": ", ".join(Path(name).name for name in data.train_names),
            },
            columns=data.columns,
            placeholders=data.placeholders,
            paths=(recipe.output, *data.train_names, *data.validation_names),
        )

    def settings(self) -> dict[str, Any]:
        """Return dotted name → value, as JSON types, of the settings that affect loading, prompting and merging."""
        sections = {"model": self.model, "lora": self.lora, "prompt": self.prompt}
        return {
            f"{section}.{name}": value
            for section, settings in sections.items()
            for name, value in settings.model_dump(mode="json").items()
        }

    def values(self) -> dict[str, Any]:
        """Return the record as JSON types for `read_record`."""
        sections = {name: getattr(self, name).model_dump(mode="json") for name in ("model", "lora", "prompt")}
        return {"version": RECORD_VERSION, **asdict(self), **sections, "paths": list(self.paths)}


def read_record(values: Mapping[str, Any]) -> RunRecord:
    """Parse a record; unknown keys are ignored.

    Raises:
        ValueError: a later version wrote it, or it is damaged.
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
            method=_METHOD.validate_python(values.get("method", "lora")),
            training=dict(values["training"]),
            columns=dict(values["columns"]),
            placeholders=dict(values["placeholders"]),
            paths=tuple(values["paths"]),
        )
    except (AttributeError, KeyError, TypeError, ValidationError) as error:
        raise ValueError(f"its record is damaged: {type(error).__name__}: {error}") from error


def _trained_weights(recipe: Recipe) -> dict[str, str]:
    """Return the card's line about weights of the base that were trained."""
    if recipe.method == "freeze":
        given = {"freeze.layers": recipe.freeze.layers, "freeze.modules": ", ".join(recipe.freeze.modules)}
        return {"trained weights": "; ".join(f"{name} {value}" for name, value in given.items() if value)}
    return {"trained weights": "all"} if recipe.method == "full" else {}


def _section(name: str, kind: type[SectionKind], values: Mapping[str, Any]) -> SectionKind:
    flat = with_current_names({f"{name}.{key}": value for key, value in values[name].items()})
    known = {key.removeprefix(f"{name}."): value for key, value in flat.items()}
    return kind.model_validate({key: value for key, value in known.items() if key in kind.model_fields})
