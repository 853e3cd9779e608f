"""Declares every setting with type, default, bounds and the description that help, docs and errors use."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from loratune.choices import BestBy, Dtype
from loratune.recipe.data_sections import DataSettings
from loratune.recipe.method_sections import METHOD_SECTIONS, FreezeSettings, LoraSettings, Method, adapts_experts
from loratune.recipe.names import DROPPED
from loratune.recipe.section import HomePath, Section, listed

TINY_QWEN = "tiny-qwen"
OWN_RATE = 2e-5
"""Learning rate of weights of the base itself."""
TEMPLATE_ARGUMENTS = ("enable_thinking", "preserve_thinking", "reasoning_effort")
"""Prompt settings that chat templates take as arguments of the same names."""

Tracker = Literal["none", "tensorboard", "wandb", "swanlab", "trackio", "mlflow"]


class ModelSettings(Section):
    """The base model, and how it is loaded."""

    base: str = Field(min_length=1)
    """Base model: a hub id, a local folder, or tiny-qwen (the bundled practice model)."""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """Hub to download a hub id from; local folders are never looked up."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", Dtype] = "auto"
    """Type of the base weights; auto takes bfloat16 where the machine has it."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Load the base in 4 bits (nf4) or 8 bits (int8) with bitsandbytes; a mixture's experts only with nf4."""
    double_quantization: bool = True
    """Quantise the nf4 scales too; saves about 0.4 bits a weight."""
    compute_dtype: Literal["auto", Dtype] = "auto"
    """Type in which a quantised base multiplies."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation; auto uses the fastest that runs on the device."""
    sharding: Literal["none", "fsdp"] = "none"
    """Hold the base once over all processes (fsdp) instead of once in each; without effect for one process."""


class PromptSettings(Section):
    """How conversations are rendered; stored with the adapter and used by all later commands."""

    template: Literal["chat", "alpaca", "plain"] = "chat"
    """chat is the tokenizer's own template; alpaca and plain (Human: … Assistant: …) suit base models."""
    system: str | None = None
    """System prompt for rows without one; default is the template's own."""
    enable_thinking: bool = False
    """Ask for reasoning before the answer; templates without such a mode ignore it."""
    preserve_thinking: bool | None = None
    """Keep the reasoning of earlier answers in prompts (true) or leave it out; default is the template's own."""
    reasoning_effort: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    """How much to reason, in a word that the template knows, such as low; default is the template's own."""
    instruction_prefix: str = ""
    """Text before each instruction, in training and inference."""
    generation_prompt: Literal["auto", "template"] = "auto"
    """auto adds a generation prompt if the template writes none; template uses the template unchanged."""
    date: Annotated[str, Field(json_schema_extra={"pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"})] | None = None
    """Date for templates that write today's date, such as 2026-11-26; default is the day the run starts."""

    @property
    def template_arguments(self) -> dict[str, Any]:
        """Arguments of the chat template; those that are unset are left to the template's own default."""
        values = {name: getattr(self, name) for name in TEMPLATE_ARGUMENTS}
        return {name: value for name, value in values.items() if value is not None}

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
    """Number of optimizer steps; overrides epochs."""
    learning_rate: float = Field(default=3e-4, gt=0, le=1)
    """Peak learning rate; 2e-5 by default with method full and freeze, which need about a tenth of an adapter's."""
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate schedule after warm-up."""
    warmup: float = Field(
        default=0.05, ge=0, json_schema_extra={"anyOf": [{"exclusiveMaximum": 1}, {"type": "integer"}]}
    )
    """Warm-up: a fraction of all steps if below 1, otherwise a number of steps."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Weight decay of the adapter's matrices."""
    batch_size: int = Field(default=16, ge=1, le=65536)
    """Sequences per optimizer step, over all devices; memory does not depend on it."""
    packing: bool = True
    """Pack the sequences of a pass without padding, with separate attention; otherwise pad them to the longest."""
    tokens_per_pass: int | None = Field(default=None, ge=8, le=1_048_576)
    """Maximum tokens that go through the model at once; default is what the free memory holds."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: a third slower, far less memory; default is if needed."""
    deterministic: bool = False
    """Use deterministic kernels only: equal bits from run to run on a GPU too, but slower; a CPU needs no setting."""
    ddp_timeout: float = Field(default=600, gt=0)
    """Seconds after which a run of several processes ends if one does not start or makes no progress; it is named."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Maximum gradient norm; larger gradients are scaled down, 0 disables clipping."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw"
    """Optimizer; the 8-bit and paged variants use bitsandbytes, and the paged ones need a GPU."""
    neftune_alpha: float | None = Field(default=None, gt=0)
    """Strength of the NEFTune noise on the embeddings; the paper uses 5."""
    max_length: int = Field(default=2048, ge=8, le=1_048_576)
    """Maximum tokens per row; see data.truncation_strategy for longer rows."""

    @field_validator("warmup")
    @classmethod
    def _warmup_counts_whole_steps(cls, warmup: float) -> float:
        if warmup >= 1 and warmup != int(warmup):
            raise ValueError("a value from 1 up is a number of steps and must be whole")
        return warmup


class EvaluationSettings(Section):
    """Validation during training, and the sample generations after it."""

    every_steps: int = Field(default=50, ge=1)
    """Steps between validations; there is always one before the first and one after the last step."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after this many validations without a better one; checkpoints.best_by says which is better."""
    questions_share: float = Field(default=0.2, ge=0, le=10)
    """Maximum time for the closing sample generations, relative to training time (at least 10 s); 0 for none."""


class CheckpointSettings(Section):
    """The checkpoints during training."""

    every_steps: int = Field(default=50, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep."""
    keep_best: bool = True
    """Keep the checkpoint of the best validation, and use it as the final adapter."""
    best_by: BestBy = "auto"
    """The best validation has the lowest loss or most exact answers; auto: exact where at least half are."""


class TrackingSettings(Section):
    """The metrics and experiment trackers."""

    report_to: Annotated[list[Tracker], BeforeValidator(listed, json_schema_input_type=Tracker | list[Tracker])] = [
        "none"
    ]
    """Experiment trackers, each from its own package; metrics.jsonl and loss.png are always written."""
    run_name: str | None = None
    """Name of the run in the trackers; default is the output folder's name."""
    every_steps: int = Field(default=1, ge=1)
    """Steps between lines of metrics.jsonl; the first and the last step always get one."""


class Recipe(Section):
    """All settings of a run."""

    method: Method = "lora"
    """What is trained: an adapter (lora), all weights of the language model (full), or some of them (freeze)."""
    model: ModelSettings
    lora: LoraSettings = LoraSettings()
    freeze: FreezeSettings = FreezeSettings()
    data: DataSettings
    prompt: PromptSettings = PromptSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()
    output: HomePath = "out/run"
    """Run folder: the adapter, and the record of how it was trained."""
    seed: int = Field(default=42, ge=0, le=2**32 - 1)
    """Seed of the adapter's initialisation and shuffling, and of the split and sampling without data.seed."""

    @property
    def trains_base(self) -> bool:
        """Whether weights of the base itself are trained, without an adapter's matrices."""
        return self.method != "lora"

    @model_validator(mode="after")
    def _method_fits(self) -> Recipe:
        unused: dict[str, Section] = {name: getattr(self, name) for name in METHOD_SECTIONS if name != self.method}
        given = [
            f"{section}.{name}"
            for section, settings in unused.items()
            for name in type(settings).model_fields
            # Recipes that loratune has written hold every setting.
            if getattr(settings, name) != getattr(type(settings)(), name)
        ]
        if given:
            them = "it" if len(given) == 1 else "them"
            raise ValueError(f"method {self.method} makes no use of {', '.join(given)}; leave {them} out")
        if self.method == "freeze" and self.freeze == FreezeSettings():
            raise ValueError("method freeze needs freeze.layers or freeze.modules, which say what is trained")
        if self.trains_base and self.model.quantization != "none":
            raise ValueError(f"method {self.method} trains weights of the base and needs model.quantization none")
        if self.trains_base and self.model.sharding != "none":
            raise ValueError(f"method {self.method} needs model.sharding none: only frozen weights are sharded")
        if self.trains_base and "learning_rate" not in self.training.model_fields_set:
            training = self.training.model_copy(update={"learning_rate": OWN_RATE})
            training.model_fields_set.discard("learning_rate")  # a default still, also where the method changes
            object.__setattr__(self, "training", training)
        return self

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Recipe:
        if self.lora.modules_to_save and self.model.quantization != "none":
            raise ValueError("lora.modules_to_save trains full matrices and needs model.quantization none")
        if self.model.quantization == "nf4" and adapts_experts(self.lora):
            raise ValueError(
                "lora.target_modules experts adds to whole stacks of matrices, which nf4 dequantises one by one; take "
                "model.quantization none or int8, or leave experts out"
            )
        if self.lora.starts_from_base and self.training.weight_decay:
            raise ValueError(
                f"lora.init {self.lora.init} begins with a part of the base, which training.weight_decay would shrink; "
                "take 0"
            )
        if self.training.max_steps and self.training.warmup >= self.training.max_steps:
            raise ValueError("training.warmup must be shorter than training.max_steps")
        return self


def iterate_settings(section: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted name, field) of every setting, in order of declaration."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from iterate_settings(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def settings_with_dropped() -> dict[str, FieldInfo]:
    """Return dotted name → field of every setting, and of the dropped ones that are still read."""
    return {**dict(iterate_settings()), **{name: FieldInfo(annotation=int) for name in DROPPED}}


def default_settings() -> dict[str, Any]:
    """Return dotted name → default, as JSON types, for each setting with a default."""
    fields = ((name, field) for name, field in iterate_settings() if not field.is_required())
    values = {name: to_jsonable_python(field.get_default()) for name, field in fields}
    return {name: value for name, value in values.items() if value != {}}  # keys of a dict are settings


def flat_settings(recipe: Recipe) -> dict[str, Any]:
    """Return dotted name → value, as JSON types, for each setting, and for each key in place of those with keys."""
    return dict(_flat(recipe.model_dump(mode="json")))


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
