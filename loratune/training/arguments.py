"""Converts a recipe's settings into TRL's configuration."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import torch
from trl import SFTConfig

from loratune.errors import Exit, LoratuneError
from loratune.model.hardware import Hardware, resolve_dtype
from loratune.recipe.sections import Recipe, TrainingSettings

OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
}
SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def training_arguments(recipe: Recipe, hardware: Hardware, has_validation: bool) -> tuple[SFTConfig, list[str]]:
    """Return TRL's configuration for a recipe.

    Args:
        recipe: the whole recipe.
        hardware: determines precision, optimizer and distributed back end.
        has_validation: whether there are validation rows.

    Returns:
        The configuration, and a warning for each setting that this machine cannot use as given.
    """
    training = recipe.training
    dtype = resolve_dtype(recipe.model.dtype, hardware)
    warnings = _precision_warnings(recipe, hardware, dtype)
    if recipe.model.sharding == "fsdp" and not hardware.is_distributed:
        warnings.append("model.sharding fsdp has no effect, since there is one process; start several with --gpus")
    optimizer = _served_optimizer(training.optimizer, hardware)
    if optimizer != training.optimizer:
        warnings.append(f"training.optimizer {training.optimizer} needs a GPU; {optimizer} is used")
    autocast = autocast_type(recipe, dtype, hardware)
    arguments = SFTConfig(
        output_dir=recipe.output,
        seed=recipe.seed,
        data_seed=recipe.seed,
        **_optimisation(training, optimizer, hardware.is_gpu),
        per_device_train_batch_size=1,  # a step, which `AdapterTrainer` makes of several passes
        remove_unused_columns=False,
        gradient_accumulation_steps=1,
        gradient_checkpointing=bool(training.gradient_checkpointing),  # TRL's default is True
        max_length=None,  # the encoder has already enforced it
        dataset_kwargs={"skip_prepare_dataset": True},
        pad_to_multiple_of=None,
        eval_strategy="steps" if has_validation else "no",
        eval_steps=recipe.evaluation.every_steps,
        eval_on_start=has_validation,
        save_strategy="steps",
        save_steps=recipe.checkpoints.every_steps,
        logging_steps=recipe.tracking.every_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # the filter would log NaN as 0
        disable_tqdm=True,
        report_to="none",  # loratune runs trackers in separate processes
        bf16=autocast == torch.bfloat16,
        fp16=autocast == torch.float16,
        use_cpu=not hardware.is_gpu,
        ddp_backend="gloo" if hardware.is_distributed and not hardware.is_gpu else None,
        router_aux_loss_coef=0.0,  # with an adapter routers are frozen, and their logits would be kept for nothing
    )
    arguments._n_gpu = min(1, arguments._n_gpu)  # else several GPUs make it nn.DataParallel, which TRL refuses
    return arguments, warnings


def autocast_type(recipe: Recipe, dtype: torch.dtype, hardware: Hardware) -> torch.dtype | None:
    """Return the type that autocast computes products in; None where there is none.

    The base has its dtype already: autocast would convert tensors again and again, and disable fused LoRA layers. Only
    float32 weights among the base's own need it.
    """
    if dtype == torch.float16 and hardware.is_gpu:
        return dtype
    has_wide = bool(recipe.lora.modules_to_save or recipe.lora.bias != "none" or recipe.trains_base)
    return dtype if dtype == torch.bfloat16 and has_wide else None


def _precision_warnings(recipe: Recipe, hardware: Hardware, dtype: torch.dtype) -> list[str]:
    """What this machine computes slowly, or in another type than the user may expect."""
    model, found = recipe.model, list[str]()
    if model.dtype == "auto" and dtype == torch.float32:
        found.append(
            "this CPU has no products of bfloat16: the model is trained in float32, which takes twice the memory"
        )
    if hardware.is_gpu and not hardware.has_bfloat16:
        computing = {"model.dtype": model.dtype}
        if model.quantization == "nf4":
            computing["model.compute_dtype"] = model.compute_dtype
        slow = [name for name, value in computing.items() if value == "bfloat16"]
        if slow:
            found.append(f"{hardware.name} only emulates bfloat16, which is slow; set {' and '.join(slow)} to auto")
    if hardware.others:
        count = hardware.others + 1
        found.append(
            f"training uses one of {count} GPUs, {hardware.name}; --gpus auto uses all, and CUDA_VISIBLE_DEVICES "
            "chooses one"
        )
    return found


def _optimisation(training: TrainingSettings, optimizer: str, is_gpu: bool) -> dict[str, Any]:
    """Return the settings of optimizer and schedule."""
    return {
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": SCHEDULERS[training.scheduler],
        "warmup_steps": training.warmup,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": "adamw_torch_fused" if optimizer == "adamw" and is_gpu else OPTIMIZERS[optimizer],
        "neftune_noise_alpha": training.neftune_alpha,
    }


def with_gradient_checkpointing(arguments: SFTConfig, is_wanted: bool) -> SFTConfig:
    """Return a copy of the configuration with gradient checkpointing switched on or off.

    TRL and transformers read the setting under different names, and only the constructor copies one to the other.
    """
    changed = copy.copy(arguments)
    changed.gradient_checkpointing = changed.activation_checkpointing = is_wanted
    return changed


def _served_optimizer(name: str, hardware: Hardware) -> str:
    """Return the recipe's optimizer, or its replacement on this machine."""
    if name.startswith("paged") and not hardware.is_gpu:
        return "adamw"
    if name != "adamw" and importlib.util.find_spec("bitsandbytes") is None:
        raise LoratuneError(f"training.optimizer {name} needs the package bitsandbytes", Exit.USAGE)
    return name
