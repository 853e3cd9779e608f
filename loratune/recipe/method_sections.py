"""Declares the settings of what is trained, in the same way as `loratune.recipe.sections`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from loratune.recipe.section import ModuleNames, Section, listed, named_modules

TargetGroup = Literal["all-linear", "attention", "mlp", "shared-experts", "experts"]
EXPERTS = "experts"
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Name], Field(min_length=1)]
LAYERS = re.compile(r"(?P<end>first|last) (?P<count>[1-9]\d*)|(?P<start>\d+)-(?P<stop>\d+)")


def _listed_unless_named(value: Any) -> Any:
    return value if value in get_args(TargetGroup) else named_modules(value)


def _range_of_layers(layers: str | None) -> str | None:
    match = LAYERS.fullmatch(layers) if layers is not None else None
    if layers is not None and (not match or (match["start"] and int(match["start"]) > int(match["stop"]))):
        raise ValueError("write 'last 6', 'first 4' or a range such as '8-15'")
    return layers


LAYERS_TEXT = Field(json_schema_extra={"pattern": "^(?:(?:first|last) [1-9][0-9]*|[0-9]+-[0-9]+)$"})
Layers = Annotated[Annotated[str, LAYERS_TEXT] | None, AfterValidator(_range_of_layers)]
Method = Literal["lora", "full", "freeze"]
METHOD, METHOD_SECTIONS = "method", ("lora", "freeze")
"""Name of the setting, and the sections that are of use to the method of their name alone."""


class LoraSettings(Section):
    """The LoRA adapter."""

    rank: int = Field(default=16, ge=1, le=4096)
    """Rank of the update matrices; determines the adapter's capacity and memory."""
    alpha: float = Field(default=32, gt=0)
    """Scale of the update, which is multiplied by alpha / rank; keep it when changing the rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability of the adapter's inputs during training."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which bias terms are also trained."""
    target_modules: Annotated[
        TargetGroup | list[str],
        BeforeValidator(_listed_unless_named, json_schema_input_type=TargetGroup | Name | Names),
    ] = "all-linear"
    """What to adapt: groups (all-linear, attention, mlp, shared-experts, experts), names, or regular expressions."""
    layers: Layers = None
    """Decoder layers to adapt: 'last 6', 'first 4' or '8-15' (counted from 0); default is all."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=4096)]] = {}
    """Other ranks of modules, by the end of their names or an expression for it, such as o_proj=16."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Other alphas of modules, named in the same way."""
    modules_to_save: ModuleNames = []
    """Modules to train in full and save with the adapter, such as embed_tokens."""
    init: Literal["default", "gaussian", "pissa", "olora", "eva"] = "default"
    """Initial matrices: pissa, olora: a part of the base's, saved with twice the rank; eva: A by the first rows."""
    b_learning_rate_ratio: float = Field(default=1, gt=0, le=1000)
    """Learning rate of the matrices B divided by that of A (LoRA+); the paper uses 16."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps high ranks stable."""
    use_dora: bool = False
    """Train magnitude and direction separately (DoRA): closer to full fine-tuning, but slower."""

    @field_validator("target_modules")
    @classmethod
    def _targets_not_empty(cls, targets: str | list[str]) -> str | list[str]:
        if not targets or "" in list(targets):
            raise ValueError("name at least one module")
        return targets

    @model_validator(mode="after")
    def _experts_have_limits(self) -> LoraSettings:
        """PEFT adds an update to the experts' matrices themselves, so it cannot drop out inputs or scale outputs."""
        odd = [name for name in ("dropout", "use_dora") if getattr(self, name)]
        if odd and adapts_experts(self):
            raise ValueError(
                f"PEFT has no {' and no '.join(odd)} for experts; leave {' and '.join(odd)} out, or experts out of "
                "target_modules"
            )
        return self

    @model_validator(mode="after")
    def _start_fits(self) -> LoraSettings:
        if (self.starts_from_base or self.starts_from_rows) and adapts_experts(self):
            raise ValueError(f"init {self.init} is not available for experts; leave one of the two out")
        return self

    @property
    def starts_from_base(self) -> bool:
        """Whether the matrices begin with a part of the base's; see `loratune.model.adapter.starts`."""
        return self.init in ("pissa", "olora")

    @property
    def starts_from_rows(self) -> bool:
        """Whether A begins with directions of the layers' inputs; see `loratune.model.adapter.input_start`."""
        return self.init == "eva"

    @property
    def saved_rank(self) -> int:
        """The highest rank of a module in the saved adapter."""
        return max(self.rank, *self.rank_pattern.values(), 1) * (2 if self.starts_from_base else 1)


def adapts_experts(lora: LoraSettings) -> bool:
    """Return whether the adapter changes the matrices of routed experts."""
    return EXPERTS in listed(lora.target_modules)


class FreezeSettings(Section):
    """What method freeze trains."""

    layers: Layers = None
    """Decoder layers to train: 'last 4', 'first 4' or '8-15' (counted from 0); default is all."""
    modules: ModuleNames = []
    """Modules to train, in these layers or outside of layers: names, groups or expressions; default is whole layers."""
