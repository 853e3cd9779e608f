"""Every setting, declared once: its type, default, bounds and the sentence that help, docs and errors use."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from loratune.choices import Dtype
from loratune.recipe.data_sections import DataSettings
from loratune.recipe.section import HomePath, ModuleNames, Section, listed, named_modules

TINY_QWEN = "tiny-qwen"
NAMED_TARGETS = ("attention", "all-linear")
LAYERS = re.compile(r"(?P<end>first|last) (?P<count>[1-9]\d*)|(?P<start>\d+)-(?P<stop>\d+)")


def _listed_unless_named(value: Any) -> Any:
    return value if value in NAMED_TARGETS else named_modules(value)


class ModelSettings(Section):
    """Which base model, and how it is held in memory."""

    base: str = Field(min_length=1)
    """Base model: a hub id, a local folder, or tiny-qwen (the embedded practice model)."""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """Where a hub id is downloaded from; a local folder is never looked up anywhere."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", Dtype] = "auto"
    """Type of the base weights; auto takes bfloat16 where the machine has it."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Hold the base in 4 bits (nf4) or 8 bits (int8) through bitsandbytes."""
    double_quantization: bool = True
    """Quantise the nf4 scales too; saves about 0.4 bits a weight."""
    compute_dtype: Literal["auto", Dtype] = "auto"
    """Type in which a quantised base multiplies."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation; auto takes flash attention where it is installed, else sdpa."""


class LoraSettings(Section):
    """The low-rank adapter."""

    rank: int = Field(default=8, ge=1, le=4096)
    """Rank of the update matrices: its capacity, and its memory."""
    alpha: float = Field(default=16, gt=0)
    """Scale of the update: it is multiplied by alpha / rank. Twice the rank is the usual start."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of the adapter's inputs dropped in training, against overfitting."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which bias vectors train along."""
    target_modules: Annotated[Literal["attention", "all-linear"] | list[str], BeforeValidator(_listed_unless_named)] = (
        "all-linear"
    )
    """Modules that get an adapter: attention (q, k, v, o), all-linear, or names such as q_proj."""
    layers: str | None = None
    """Only these decoder layers: 'last 6', 'first 4' or '8-15' (counted from 0); default is all."""
    modules_to_save: ModuleNames = []
    """Modules trained in full and saved with the adapter, such as embed_tokens."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps high ranks stable."""
    use_dora: bool = False
    """Train magnitude and direction apart (DoRA): closer to full training, slower."""

    @field_validator("target_modules")
    @classmethod
    def _targets_not_empty(cls, targets: str | list[str]) -> str | list[str]:
        if not targets or "" in list(targets):
            raise ValueError("name at least one module")
        return targets

    @field_validator("layers")
    @classmethod
    def _layers_are_a_range(cls, layers: str | None) -> str | None:
        if layers is None:
            return None
        match = LAYERS.fullmatch(layers)
        if not match or (match["start"] and int(match["start"]) > int(match["stop"])):
            raise ValueError("write 'last 6', 'first 4' or a range such as '8-15'")
        return layers


class PromptSettings(Section):
    """How a conversation becomes text; saved with the adapter and used by every later command."""

    template: Literal["chat", "alpaca", "plain"] = "chat"
    """chat is the tokenizer's own template; alpaca and plain (Human: … Assistant: …) suit base models."""
    system: str | None = None
    """System prompt for rows without one; default is the template's own."""
    enable_thinking: bool = False
    """Qwen3: prompt for a reasoning block; other models ignore it."""
    instruction_prefix: str = ""
    """Text set before each instruction, in training and afterwards."""
    generation_prompt: Literal["auto", "template"] = "auto"
    """auto begins answers as the template begins its own, also if it writes no generation prompt; template does not."""
    date: str | None = None
    """Day, as 2026-11-26, that a template with today's date gets in training; default is the day the run starts."""

    @field_validator("date")
    @classmethod
    def _date_is_a_day(cls, date: str | None) -> str | None:
        if date is not None:
            try:
                if datetime.date.fromisoformat(date).isoformat() != date:
                    raise ValueError(date)
            except ValueError:
                raise ValueError("write a day as 2026-11-26") from None
        return date


class TrainingSettings(Section):
    """The optimisation."""

    epochs: float = Field(default=3, gt=0, le=1000)
    """Passes over the training rows; training.max_steps takes precedence."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, in place of epochs."""
    learning_rate: float = Field(default=1e-4, gt=0, le=1)
    """Peak learning rate; LoRA wants about ten times that of full training: 1e-4 to 2e-4."""
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup: float = Field(default=0.05, ge=0)
    """Steps until the peak learning rate: a fraction of all below 1, else a number of steps."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Weight decay of the adapter's matrices."""
    batch_size: int = Field(default=4, ge=1, le=4096)
    """Rows that one device takes at once; packed, as many on average."""
    packing: bool = True
    """Set rows behind each other without padding, each attending to itself alone; else pad rows of similar length."""
    tokens_per_batch: int | None = Field(default=None, ge=8, le=1_048_576)
    """Most tokens of a packed batch; default is as many batches as without packing, evenly filled."""
    gradient_accumulation: int = Field(default=4, ge=1, le=65536)
    """Parts of a step: batch_size × this × devices rows make one, packed on average."""
    gradient_checkpointing: bool | None = None
    """Compute activations again in the backward pass: about a third slower, far less memory; default is if needed."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients above this norm are scaled down; 0 switches it off."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw"
    """Optimizer; the 8-bit and paged ones come from bitsandbytes, the paged ones need a GPU."""
    neftune_alpha: float | None = Field(default=None, gt=0)
    """Strength of NEFTune's noise on the embeddings; 5 is the paper's value."""
    max_length: int = Field(default=1024, ge=8, le=1_048_576)
    """Longest row in tokens; longer rows are left out, with a count."""

    @field_validator("warmup")
    @classmethod
    def _warmup_counts_whole_steps(cls, warmup: float) -> float:
        if warmup >= 1 and warmup != int(warmup):
            raise ValueError("a value from 1 up is a number of steps and must be whole")
        return warmup


class EvaluationSettings(Section):
    """Validation during training, and the questions after it."""

    every_steps: int = Field(default=50, ge=1)
    """Steps between validations; there is always one before the first and one after the last step."""
    batch_size: int | None = Field(default=None, ge=1, le=4096)
    """Rows that one device takes at once in validation; default is training.batch_size."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after this many validations in a row without a better loss."""
    questions_share: float = Field(default=0.2, ge=0, le=10)
    """Most time for the closing questions, as a share of the training's, but 10 seconds at least; 0 asks none."""


class CheckpointSettings(Section):
    """What is kept on the way."""

    every_steps: int = Field(default=50, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest checkpoints stay on disk."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss, and make it the final adapter."""


class TrackingSettings(Section):
    """What is logged, and where to."""

    report_to: Annotated[
        list[Literal["none", "tensorboard", "wandb", "swanlab", "trackio", "mlflow"]], BeforeValidator(listed)
    ] = ["none"]
    """Experiment trackers, each from its own package; metrics.jsonl and loss.png are always written."""
    run_name: str | None = None
    """Name of the run at the trackers; default is the output folder's name."""
    every_steps: int = Field(default=1, ge=1)
    """Steps between two lines of metrics.jsonl; the first and the last step always have one."""


class Recipe(Section):
    """A whole recipe."""

    model: ModelSettings
    lora: LoraSettings = LoraSettings()
    data: DataSettings
    prompt: PromptSettings = PromptSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()
    output: HomePath = "out/run"
    """Run folder: the adapter and everything known about how it came to be."""
    seed: int = Field(default=42, ge=0, le=2**32 - 1)
    """Seed of the adapter's start, the split, the sampling and the order of the rows."""

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Recipe:
        if self.lora.modules_to_save and self.model.quantization != "none":
            raise ValueError("lora.modules_to_save trains full matrices and needs model.quantization none")
        if self.training.tokens_per_batch and not self.training.packing:
            raise ValueError("training.tokens_per_batch is the size of packed batches and needs training.packing")
        if self.training.max_steps and self.training.warmup >= self.training.max_steps:
            raise ValueError("training.warmup must be shorter than training.max_steps")
        return self


def iterate_settings(section: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Walk over (dotted name, field) of every setting in the order of declaration."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from iterate_settings(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def default_settings() -> dict[str, Any]:
    """Dotted name of each setting that has a default → the default in JSON's types."""
    fields = ((name, field) for name, field in iterate_settings() if not field.is_required())
    values = {name: to_jsonable_python(field.get_default()) for name, field in fields}
    return {name: value for name, value in values.items() if value != {}}  # each key of those is a setting of its own


def flat_settings(recipe: Recipe) -> dict[str, Any]:
    """Dotted name of each setting, down to the keys of its own values → value in JSON's types."""
    return dict(_flat(recipe.model_dump(mode="json")))


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
