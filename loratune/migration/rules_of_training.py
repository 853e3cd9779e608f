"""How tools that train with transformers mean the settings of optimisation, checkpoints and trackers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratune.errors import counted
from loratune.migration.sheet import Sheet, is_off, number, texts, truth, whole
from loratune.migration.tool import Rules

Given = Mapping[str, Any]
OPTIMIZERS = {
    "adamw": (
        "adamw adamw_torch adamw_torch_fused adamw_hf adamw_apex_fused adamw_torch_xla adamw_torch_npu_fused "
        "adamw_anyprecision adam"
    ),
    "adamw_8bit": "adamw_8bit adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw paged_adamw_32bit",
}
OF_TORCHAO = ("adamw_torch_8bit", "ao_adamw_8bit")
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
TRACKERS = ("tensorboard", "wandb", "swanlab", "trackio", "mlflow")


def rows_per_step(sheet: Sheet, given: Given) -> None:
    """Rows per device × accumulation × devices."""
    rows, steps = whole(given.get("per_device_train_batch_size", 1)), given.get("gradient_accumulation_steps")
    total, devices = given.get("global_batch_size"), sheet.context.devices
    if total is not None:
        product, told = whole(total), f"{counted(whole(total), 'row')} per step over all devices"
    elif steps is None or (isinstance(steps, str) and steps == "auto"):
        sheet.lose("the rows of a step do not depend on the free memory here; give --training.batch_size")
        return
    else:
        product = rows * whole(steps) * (devices or 1)
        told = f"{rows} per device × {whole(steps)} accumulated × {counted(devices or 1, 'device')}"
        if devices is None:
            told += "; for more devices than one, multiply it (import --devices)"
    packed = not is_off(sheet.known.get("packing"))
    if packed:
        length = sheet.known.get("cutoff_len", sheet.known.get("max_length", "the model's"))
        told += f"; there, a row of a step is a pack of up to {length} tokens, here it is a row of the data"
    if packed or (devices is None and total is None):
        sheet.change("training.batch_size", product, told)
    else:
        sheet.take("training.batch_size", product)


def length_of_run(sheet: Sheet, given: Given) -> None:
    """A number of steps takes precedence over epochs in every tool."""
    steps = given.get("max_steps")
    if steps is not None and whole(steps) > 0:
        sheet.take("training.max_steps", whole(steps))
        return
    epochs = number(given.get("num_train_epochs", 3))
    if epochs > 0:
        sheet.take("training.epochs", epochs)
    else:
        sheet.lose("it trains for no epoch and no step")


def schedule(sheet: Sheet, given: Given) -> None:
    """Schedule and warm-up; transformers ignores the latter for a constant rate."""
    named = str(given.get("lr_scheduler_type", "linear"))
    known = SCHEDULES.get(named)
    if known is None:
        sheet.lose(f"loratune has the schedules {', '.join(dict.fromkeys(SCHEDULES.values()))}, not {named}")
    else:
        sheet.take("training.scheduler", known)
    lowest = given.get("min_lr")
    if lowest is not None and number(lowest) > 0:
        sheet.lose("schedules end at a rate of 0, not at a least rate")
    steps, ratio = number(given.get("warmup_steps", 0)), number(given.get("warmup_ratio", 0))
    warmup = steps if steps > 0 else ratio
    if named == "constant" and warmup:
        sheet.change("training.warmup", 0, "there, the schedule constant has no warm-up, whatever is given")
        return
    warmup = float(int(warmup)) if warmup >= 1 else warmup
    if 0 < whole(sheet.known.get("max_steps") or 0) <= warmup:
        sheet.lose(f"the warm-up of {counted(warmup, 'step')} does not end within max_steps")
        return
    sheet.take("training.warmup", warmup)


def optimizer(sheet: Sheet, given: Given) -> None:
    named = str(given["optim"])
    for known, names in OPTIMIZERS.items():
        if named in names.split():
            sheet.take("training.optimizer", known)
            return
    if named in OF_TORCHAO:
        sheet.change("training.optimizer", "adamw_8bit", "there, the 8-bit states are torchao's, here bitsandbytes'")
    else:
        sheet.lose(f"loratune has the optimizers {', '.join(OPTIMIZERS)}, not {named}")


def adam_constants(sheet: Sheet, given: Given) -> None:
    for name, value in given.items():
        if abs(number(value) - ADAM[name]) > 1e-6 * ADAM[name]:
            sheet.lose(f"{name} is {ADAM[name]:g} here, and not {number(value):g}")


def cut_off(sheet: Sheet, given: Given) -> None:
    """The largest length, in a tool that cuts off the end of longer rows."""
    (length,) = given.values()
    how = "there, the end of longer rows is cut off; here the end of the answer that is too long"
    sheet.change("training.max_length", whole(length), how)
    sheet.take("data.truncation_strategy", "truncate_answer")


def prompts_trained(sheet: Sheet, given: Given) -> None:
    """The switch that has prompts trained as well."""
    (asked,) = given.values()
    if not is_off(asked):
        sheet.lose("only answers are trained, never prompts")


def neftune(sheet: Sheet, given: Given) -> None:
    alpha = given["neftune_noise_alpha"]
    if not is_off(alpha):
        sheet.take("training.neftune_alpha", number(alpha))


def memory(sheet: Sheet, given: Given) -> None:
    sheet.skip("the free memory decides (training.gradient_checkpointing)")


def attention(sheet: Sheet, given: Given) -> None:
    sheet.skip("the fastest attention that runs on the device is used (model.attn_implementation)")


def packing(sheet: Sheet, given: Given) -> None:
    """Packing without separate attention lets the rows of a pack see each other; here they never do."""
    if not is_off(given.get("packing")) and given.get("neat_packing") is not None and is_off(given["neat_packing"]):
        sheet.note(
            "there, the rows of a pack see each other; here each row attends to itself alone", "training.packing"
        )


def checkpoints(sheet: Sheet, given: Given) -> None:
    every(sheet, "checkpoints.every_steps", given["save_steps"])


def kept_checkpoints(sheet: Sheet, given: Given) -> None:
    if whole(given["save_total_limit"]) > 0:
        sheet.take("checkpoints.keep", whole(given["save_total_limit"]))


def validations(sheet: Sheet, given: Given) -> None:
    steps = given.get("eval_steps")
    if steps is None or is_off(steps):
        sheet.skip("validation is every evaluation.every_steps")
    else:
        every(sheet, "evaluation.every_steps", steps)


def every(sheet: Sheet, setting: str, steps: Any) -> None:
    """Take a number of steps; there, a share of the run may stand in its place."""
    if is_off(steps):
        return
    if number(steps) < 1:
        sheet.skip(f"a share of the run; set {setting} to a number of steps")
    else:
        sheet.take(setting, whole(steps))


def best_checkpoint(sheet: Sheet, given: Given) -> None:
    """The final adapter is the last one in other tools, unless the best is asked for."""
    has_validation = sheet.recipe.get("data.validation", 0) not in (0, 0.0, [])
    if not is_off(given.get("load_best_model_at_end", False)):
        if str(given.get("metric_for_best_model", "loss")) in ("loss", "eval_loss"):
            sheet.take("checkpoints.keep_best", True)
        else:
            sheet.lose("the best checkpoint is that of the lowest validation loss")
    elif has_validation:
        sheet.take("checkpoints.keep_best", False)


def trackers(sheet: Sheet, given: Given) -> None:
    names = [name for name in texts(given.get("report_to", "none")) if name != "none"]
    names += [name for name in TRACKERS if not is_off(given.get(f"use_{name}", given.get(f"enable_{name}")))]
    names += ["wandb"] if given.get("wandb_project") and "enable_wandb" not in given else []
    known = list(dict.fromkeys(name for name in names if name in TRACKERS))
    if known:
        sheet.take("tracking.report_to", known)
    if left := [name for name in names if name not in TRACKERS]:
        sheet.skip(f"loratune has no tracker {', '.join(left)}")
    if given.get("wandb_project") and "wandb" in known:
        sheet.skip("the environment variable WANDB_PROJECT sets it")


def logging(sheet: Sheet, given: Given) -> None:
    if number(given["logging_steps"]) >= 1:
        sheet.take("tracking.every_steps", whole(given["logging_steps"]))
    else:
        sheet.skip("a share of the run; set tracking.every_steps")


def resuming(sheet: Sheet, given: Given) -> None:
    for value in given.values():
        if not is_off(value):
            sheet.skip("the flag --resume; runs of another tool cannot be resumed from")


def overwriting(sheet: Sheet, given: Given) -> None:
    sheet.skip("the flag --overwrite")


def timeout(sheet: Sheet, given: Given) -> None:
    sheet.skip("a process that makes no progress is named after training.ddp_timeout")


def command(sheet: Sheet, given: Given) -> None:
    if not truth(given["do_train"]):
        sheet.lose("the file is not for training")


def early_stopping(sheet: Sheet, given: Given) -> None:
    if not is_off(given["early_stopping_patience"]):
        sheet.take("evaluation.early_stopping", whole(given["early_stopping_patience"]))


def seed_of_data(sheet: Sheet, given: Given) -> None:
    if whole(given["data_seed"]) != whole(sheet.known.get("seed", 42)):
        sheet.take("data.seed", whole(given["data_seed"]))


TRAINING_DEFAULTS: Given = {"load_best_model_at_end": False}
"""Defaults of all these tools that are not loratune's."""
ROWS = ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size")
TRAINING_RULES: Rules = {
    ROWS: rows_per_step,
    ("num_train_epochs", "max_steps"): length_of_run,
    ("lr_scheduler_type", "warmup_ratio", "warmup_steps", "min_lr"): schedule,
    ("optim",): optimizer,
    tuple(ADAM): adam_constants,
    ("neftune_noise_alpha",): neftune,
    ("gradient_checkpointing", "disable_gradient_checkpointing", "use_gradient_checkpointing"): memory,
    (
        "attn_implementation",
        "flash_attn",
        "attn_impl",
        "flash_attention",
        "sdp_attention",
        "xformers_attention",
        "eager_attention",
        "flex_attention",
    ): attention,
    ("packing", "neat_packing", "sample_packing", "padding_free"): packing,
    ("save_steps",): checkpoints,
    ("save_total_limit",): kept_checkpoints,
    ("eval_strategy", "eval_steps", "evals_per_epoch"): validations,
    ("save_strategy", "saves_per_epoch"): lambda sheet, given: sheet.skip(
        "checkpoints are every checkpoints.every_steps"
    ),
    ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"): best_checkpoint,
    (
        "report_to",
        "use_wandb",
        "use_swanlab",
        "use_tensorboard",
        "enable_wandb",
        "enable_tensorboard",
        "wandb_project",
    ): trackers,
    ("logging_steps",): logging,
    ("resume_from_checkpoint", "auto_resume_from_checkpoints", "resume_only_model"): resuming,
    ("overwrite_output_dir", "add_version"): overwriting,
    ("ddp_timeout",): timeout,
    ("do_train",): command,
    ("data_seed",): seed_of_data,
    ("early_stopping_patience",): early_stopping,
}
"""The order matters where a rule reads what another has written: validation is known before the best checkpoint."""
