"""Everything that a run gathers before its first step: base, data, model and adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers.utils import logging as transformers_logging
from trl import SFTConfig

from loratune import console
from loratune.data.assembly.steps import PassLayout
from loratune.data.encoding.encoder import Encoder
from loratune.data.preparation import PreparedData
from loratune.errors import Exit, LoratuneError, together
from loratune.model.adapter.attach import attach_adapter
from loratune.model.adapter.own_weights import OwnWeights, resolve_weights, train_weights
from loratune.model.adapter.plain_copy import with_same_weights
from loratune.model.adapter.summary import AdapterSummary, summarise_adapter
from loratune.model.adapter.targets import Targets, resolve_targets
from loratune.model.architecture.file_layout import parameter_infos
from loratune.model.base import dtype_name, is_to_be_sharded, load_base
from loratune.model.files import find_base, untried, weight_files
from loratune.model.hardware import Hardware
from loratune.model.kernels.attention_choice import choose_attention
from loratune.model.kernels.lora_linear import use_fused_lora
from loratune.model.kernels.norm_mlp import use_fused_elementwise
from loratune.model.kernels.recurrent_layers import call_modules_in_training
from loratune.model.memory import (
    free_main_memory_bytes,
    hold_within,
    keep_freed_memory,
    resident_bytes,
    return_large_blocks,
)
from loratune.model.sharding.gathering import is_sharded, with_weights
from loratune.model.sharding.sharded_base import require_apart_from_vocabulary, require_shardable, with_same_shards
from loratune.model.tokenizer import load_tokenizer, set_pad_token
from loratune.protocols import AdaptedModel, CausalModel, Tokenizer
from loratune.recipe.advice import advise
from loratune.recipe.sections import Recipe
from loratune.runs.checkpoint import Checkpoint
from loratune.runs.intact import require_intact
from loratune.runs.tensor_hashes import TensorHashes
from loratune.runtime import process_number
from loratune.training.activations import (
    EFFICIENT_TOKENS,
    MASKED_TOKENS,
    PassPlan,
    largest_step,
    measure_passes,
    plan_passes,
)
from loratune.training.arguments import training_arguments, with_gradient_checkpointing
from loratune.training.checkpoints.resuming import PASS_TOKENS, changed_passes
from loratune.training.checkpoints.signals import StopSignals
from loratune.training.determinism import request_deterministic_cublas
from loratune.training.failures import attempted
from loratune.training.first_rows import start_from_rows
from loratune.training.gate import pass_gate
from loratune.training.memory.expecting import ProcessMemory, Workload, expect_passes, settings_of
from loratune.training.memory.planned import planned_model
from loratune.training.memory.prediction import Prediction
from loratune.training.names import refused_names
from loratune.training.notes import Notes
from loratune.training.probes.checked_model import CheckedModel, check_model
from loratune.training.processes.group import from_all
from loratune.training.quantization_effect import BaseWeights, weights_of
from loratune.training.reporting.overview import show_data, show_model
from loratune.training.reporting.start_up import StartUp
from loratune.training.steps import StepPlan, advise_steps, plan_steps


@dataclass
class Prepared:
    """Everything that a run gathers before the model is loaded."""

    recipe: Recipe
    output: Path
    hardware: Hardware
    base: Path
    tokenizer: Tokenizer
    encoder: Encoder
    data: PreparedData
    plan: StepPlan
    arguments: SFTConfig
    warnings: tuple[str, ...]
    """Warnings about recipe, rows, and settings that this machine cannot use as given."""
    start_up: StartUp
    stops: StopSignals
    hashes: TensorHashes
    """Hashes of the base, computed while the model loads."""
    resident_bytes: int
    """What the process held before it loaded the model."""


@dataclass
class Session(Prepared):
    """Everything that a run gathers before its first step."""

    model: AdaptedModel
    """The base with the adapter on it, as PEFT makes it."""
    weights: BaseWeights
    summary: AdapterSummary
    checked: CheckedModel
    passes: PassPlan
    prediction: Prediction | None
    """Of this process's memory; None for a model that cannot be run without values."""
    notes: Notes

    @property
    def layout(self) -> PassLayout:
        """How a step goes through the model in this process."""
        return PassLayout(
            self.passes.tokens,
            EFFICIENT_TOKENS[self.hardware.device.type],
            self.checked.is_packed,
            self.hardware.processes,
            process_number(),
            self.checked.is_single,
            is_even=is_sharded(self.model),  # weights are gathered in every pass, by all processes together
        )


def prepare(recipe: Recipe, day: str | None, output: Path, hardware: Hardware, stops: StopSignals) -> Prepared:
    """Find the base and prepare the data: quick steps that may fail, before the model is loaded."""
    start_up = StartUp()
    start_up.stage_done("imports")
    if is_to_be_sharded(recipe.model, hardware):
        require_shardable(recipe.model, recipe.lora)
    transformers_logging.set_verbosity_error()
    return_large_blocks()
    if recipe.training.deterministic:
        request_deterministic_cublas()
    data = _checked_data(recipe, day, hardware)
    recipe = recipe.model_copy(update={"prompt": data.prompt})
    base = find_base(recipe.model)
    hashes = TensorHashes(weight_files(base))
    hashes.start()
    tokenizer = load_tokenizer(base)
    encoder = Encoder(tokenizer, recipe.prompt)
    set_pad_token(tokenizer, {encoder.end_id, tokenizer.eos_token_id})
    plan = plan_steps(recipe.training, len(data.train))
    arguments, served = training_arguments(recipe, hardware, data.validation is not None)
    base_changes = require_intact(base, force=True)
    warnings = (
        *untried(base),
        *advise(recipe),
        *advise_steps(recipe.training, plan),
        *data.warnings,
        *served,
        *base_changes,
    )
    show_data(recipe, data)
    start_up.stage_done("data")
    return Prepared(
        recipe, output, hardware, base, tokenizer, encoder, data, plan, arguments, warnings, start_up, stops, hashes,
        resident_bytes(),
    )  # fmt: skip


def _checked_data(recipe: Recipe, day: str | None, hardware: Hardware) -> PreparedData:
    """Return the checked data of a recipe whose names of modules and layers are checked too.

    Raises:
        LoratuneError: what is wrong with rows and names, together.
    """
    errors = []
    try:
        data = pass_gate(recipe, day).checked()
    except LoratuneError as error:
        errors.append(error)
    if wrong := refused_names(recipe, hardware):
        errors.append(wrong)
    if errors:
        raise together(errors)
    return data


def load(prepared: Prepared, start: Checkpoint | None = None) -> Session:
    """Load the model and attach the adapter."""
    recipe, hardware = prepared.recipe, prepared.hardware
    with console.status(f"loading {recipe.model.base}"):
        model = load_base(recipe.model, prepared.base, hardware)
    weights = weights_of(model, recipe.model, prepared.base, prepared.data)
    loaded_attention = str(model.config._attn_implementation)
    adapted, trained, plain = _made_trainable(model, prepared)
    if recipe.lora.starts_from_rows and not start:  # a checkpoint holds what has become of them
        with console.status("reading the first rows for lora.init eva"):
            start_from_rows(adapted, recipe.lora, prepared.data.train, recipe.seed)
    with_weights(adapted, use_fused_lora)
    with_weights(model, use_fused_elementwise)
    call_modules_in_training(model)
    attention = choose_attention(model, hardware, recipe.model.attn_implementation, recipe.training.packing)
    checked = check_model(adapted, plain, attention, loaded_attention, recipe)
    del plain  # so that the memory that is free is measured without its adapter
    _require_one_layout(checked)
    attention = checked.attention
    summary = summarise_adapter(adapted, trained)
    passes = _plan_passes(prepared, adapted, checked, start)
    prediction = _predicted(prepared, checked, passes)
    # Beside a GPU, main memory is not what a run lacks.
    if not is_sharded(model) and (hardware.is_gpu or (prediction and prediction.keeps_freed)):
        keep_freed_memory()
    if prediction and prediction.keeps_freed:
        hold_within(adapted, prediction.between_passes)
    for told in changed_passes(start, attention.name, checked.is_packed, recipe.model.quantization) if start else ():
        console.warn(f"{told}, so bits may differ")
    arguments = with_gradient_checkpointing(prepared.arguments, passes.gradient_checkpointing)
    show_model(recipe, summary, dtype_name(model.dtype), checked, passes, weights)
    if prediction:
        console.say(f"memory: {prediction}")
    prepared.start_up.stage_done("model")
    warnings = (*prepared.warnings, *weights.notes, *checked.warnings)
    known = vars(prepared) | {"arguments": arguments, "warnings": warnings}
    known |= {"checked": checked, "passes": passes, "prediction": prediction}
    return Session(**known, model=adapted, weights=weights, summary=summary, notes=Notes())


def _made_trainable(
    model: CausalModel, prepared: Prepared
) -> tuple[AdaptedModel, Targets | OwnWeights, CausalModel | None]:
    """Prepare a model for the recipe's method.

    Returns:
        The model, as PEFT makes it; what is trained of it; and the base as PEFT alone would use it, or None if weights
        of the base are trained: to compare them, all would have to be written and read again.
    """
    recipe, name = prepared.recipe, prepared.recipe.model.base
    if recipe.trains_base:
        weights = resolve_weights(model, recipe, parameter_infos(prepared.base))
        return train_weights(model, weights, name), weights, None
    plain = _plain_copy(model, prepared.base)
    targets = resolve_targets(model, recipe.lora)
    if is_sharded(model):
        require_apart_from_vocabulary(targets.roles)
    return attach_adapter(model, recipe.lora, name, recipe.seed, targets), targets, plain


def _plain_copy(model: CausalModel, folder: Path) -> CausalModel:
    """Return the base as PEFT alone would use it, with the same weights in memory."""
    if not is_sharded(model):
        return with_same_weights(model)
    return with_same_shards(model, folder, str(model.config._attn_implementation))


def _require_one_layout(checked: CheckedModel) -> None:
    """Refuse processes that would divide a step differently: rows would be lost or trained on twice."""
    if len(set(from_all((checked.is_packed, checked.is_masked, checked.is_single)))) > 1:
        raise LoratuneError(
            "the checks of the model differ between the processes, so they would put rows into passes differently; use "
            "devices of one kind, or --no-training.packing",
            Exit.USAGE,
        )


def _plan_passes(prepared: Prepared, model: AdaptedModel, checked: CheckedModel, start: Checkpoint | None) -> PassPlan:
    """Choose the size of a pass, as before the interruption if it still fits."""
    hardware, lengths = prepared.hardware, prepared.data.train.lengths
    training = settings_of(prepared.recipe, checked.is_packed)
    longest, step = int(lengths.max()), largest_step(lengths, training, hardware.processes)
    memory = None
    if training.gradient_checkpointing is None or training.tokens_per_pass is None:
        memory = measure_passes(model, training.packing, longest, step, hardware)
    begun = start.progress.get(PASS_TOKENS) if start else None
    wanted = begun or (MASKED_TOKENS if checked.is_masked else None)
    passes = plan_passes(training, memory, longest, step, str(hardware.device.type), wanted)
    if begun and passes.tokens != begun:
        console.warn(
            f"a pass has up to {passes.tokens:,} tokens, {begun:,} before the interruption, so bits may differ"
        )
    return passes


def _predicted(prepared: Prepared, checked: CheckedModel, passes: PassPlan) -> Prediction | None:
    """Predict the memory of this process; None, after a warning, for a model that cannot be run without values."""

    def predict() -> Prediction:
        recipe, hardware, train = prepared.recipe, prepared.hardware, prepared.data.train
        planned = planned_model(recipe, prepared.base, hardware)
        planned = replace(planned, is_packed=checked.is_packed, is_masked=checked.is_masked)
        work = Workload(train.lengths, train.trained_tokens / train.tokens)
        memory = ProcessMemory(prepared.resident_bytes, free_main_memory_bytes() + resident_bytes())
        return expect_passes(planned, recipe, work, hardware, passes, memory)

    return attempted("the prediction of memory", predict)
