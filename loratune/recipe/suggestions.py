"""Names of settings in other tools, which errors translate, and the nearest name to a misspelt one."""

from __future__ import annotations

from collections.abc import Iterable

from loratune.nearest import MISSPELT, nearest
from loratune.recipe.names import DROPPED, RENAMED
from loratune.recipe.not_needed import NOT_NEEDED
from loratune.recipe.not_offered import NOT_OFFERED

ALIKE_IN_A_SECTION = 0.75
"""See `ALIKE`; names of one section begin alike."""
STEP_ROWS = "training.batch_size (per step: rows per device × accumulation × devices)"
KNOWN_ELSEWHERE = {
    # The model.
    "model_name_or_path": "model.base",
    "model_name": "model.base",
    "model_id": "model.base",
    "model_id_or_path": "model.base",
    "base_model": "model.base",
    "revision_of_model": "model.revision",
    "pretrained_model_name_or_path": "model.base",
    "model_revision": "model.revision",
    "use_hf": "model.hub",
    "use_modelscope": "model.hub: modelscope",
    "torch_dtype": "model.dtype",
    "infer_dtype": "model.dtype",
    "bf16": "model.dtype: bfloat16",
    "fp16": "model.dtype: float16",
    "load_in_4bit": "model.quantization: nf4",
    "load_in_8bit": "model.quantization: int8",
    "quantization_bit": "model.quantization: nf4 or int8",
    "quantization_method": "model.quantization",
    "quant_method": "model.quantization",
    "quant_bits": "model.quantization: nf4 or int8",
    "bnb_4bit_quant_type": "model.quantization: nf4",
    "bnb_4bit_compute_dtype": "model.compute_dtype",
    "bnb_4bit_use_double_quant": "model.double_quantization",
    "double_quantization_bit": "model.double_quantization",
    "flash_attn": "model.attn_implementation",
    "flash_attention": "model.attn_implementation: flash_attention_2",
    "attn_impl": "model.attn_implementation",
    "sdp_attention": "model.attn_implementation: sdpa",
    # What is trained.
    "finetuning_type": "method",
    "train_type": "method",
    "tuner_type": "method",
    "adapter": "method",
    "freeze_trainable_layers": "freeze.layers: last 2",
    "freeze_trainable_modules": "freeze.modules",
    "freeze_extra_modules": "freeze.modules",
    "trainable_parameters": "freeze.modules",
    "unfrozen_parameters": "freeze.modules",
    # LoRA.
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_bias": "lora.bias",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "lora_target_linear": "lora.target_modules: all-linear",
    "lora_target_parameters": "lora.target_modules: experts",
    "layers_to_transform": "lora.layers",
    "peft_layers_to_transform": "lora.layers",
    "lora_modules_to_save": "lora.modules_to_save",
    "additional_target": "lora.modules_to_save",
    "loraplus_lr_ratio": "lora.b_learning_rate_ratio",
    "lorap_lr_ratio": "lora.b_learning_rate_ratio",
    "init_weights": "lora.init",
    "init_lora_weights": "lora.init",
    "peft_init_lora_weights": "lora.init",
    "pissa_init": "lora.init: pissa",
    "peft_use_rslora": "lora.use_rslora",
    "peft_use_dora": "lora.use_dora",
    # Rows.
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "dataset_path": "data.train",
    "train_dataset": "data.train",
    "train_file": "data.train",
    "data_path": "data.train",
    "eval_dataset": "data.validation",
    "val_dataset": "data.validation",
    "test_datasets": "data.validation",
    "validation_file": "data.validation",
    "val_size": "data.validation",
    "val_set_size": "data.validation",
    "test_size": "data.validation",
    "split_dataset_ratio": "data.validation",
    "eval_split": "data.validation",
    "mask_history": "data.train_on_turns: last",
    "train_on_inputs": "data.train_on_turns (only answers are trained, never prompts)",
    "train_on_prompt": "data.train_on_turns (only answers are trained, never prompts)",
    "roles_to_train": "data.train_on_turns (only answers are trained, never prompts)",
    "assistant_only_loss": "data.train_on_turns (only answers are trained, never prompts)",
    "completion_only_loss": "data.train_on_turns (only answers are trained, never prompts)",
    "loss_scale": "data.train_on_turns",
    "dataset_exact_deduplication": "data.remove: duplicates",
    "excess_length_strategy": "data.truncation_strategy",
    "truncation": "data.truncation_strategy",
    "overflow": "data.truncation_strategy",
    # Prompts.
    "chat_template": "prompt.template",
    "template_type": "prompt.template",
    "default_system": "prompt.system",
    "system_prompt": "prompt.system",
    "default_system_message": "prompt.system",
    # Optimisation.
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "n_epochs": "training.epochs",
    "lr": "training.learning_rate",
    "lr_scheduler_type": "training.scheduler",
    "lr_scheduler": "training.scheduler",
    "warmup_ratio": "training.warmup",
    "warmup_steps": "training.warmup",
    "per_device_train_batch_size": STEP_ROWS,
    "micro_batch_size": STEP_ROWS,
    "gradient_accumulation_steps": STEP_ROWS,
    "grad_accum": STEP_ROWS,
    "cutoff_len": "training.max_length",
    "sequence_len": "training.max_length",
    "max_seq_length": "training.max_length",
    "max_seq_len": "training.max_length",
    "model_max_length": "training.max_length",
    "packing_length": "training.tokens_per_pass",
    "global_batch_size": STEP_ROWS,
    "train_iters": "training.max_steps",
    "iters": "training.max_steps",
    "lr_warmup_fraction": "training.warmup",
    "lr_warmup_iters": "training.warmup",
    "fsdp": "model.sharding: fsdp",
    "sample_packing": "training.packing",
    "padding_free": "training.packing",
    "neat_packing": "training.packing",
    "optim": "training.optimizer",
    "gradient_clipping": "training.max_grad_norm",
    "clip_grad": "training.max_grad_norm",
    "neftune_noise_alpha": "training.neftune_alpha",
    "use_gradient_checkpointing": "training.gradient_checkpointing",
    "disable_gradient_checkpointing": "training.gradient_checkpointing: false",
    # Validation, checkpoints, tracking, the run.
    "eval_steps": "evaluation.every_steps",
    "evals_per_epoch": "evaluation.every_steps",
    "eval_strategy": "evaluation.every_steps",
    "early_stopping_patience": "evaluation.early_stopping",
    "early_stop_interval": "evaluation.early_stopping",
    "save_steps": "checkpoints.every_steps",
    "saves_per_epoch": "checkpoints.every_steps",
    "save_strategy": "checkpoints.every_steps",
    "save_total_limit": "checkpoints.keep",
    "load_best_model_at_end": "checkpoints.keep_best",
    "metric_for_best_model": "checkpoints.best_by",
    "resume_from_checkpoint": "the flag --resume",
    "auto_resume_from_checkpoints": "the flag --resume",
    "overwrite_output_dir": "the flag --overwrite",
    "logging_steps": "tracking.every_steps",
    "wandb_project": "the environment variable WANDB_PROJECT, with tracking.report_to: wandb",
    "wandb_name": "tracking.run_name",
    "use_wandb": "tracking.report_to: wandb",
    "use_swanlab": "tracking.report_to: swanlab",
    "enable_wandb": "tracking.report_to: wandb",
    "enable_tensorboard": "tracking.report_to: tensorboard",
    "output_dir": "output",
    "data_seed": "seed",
    "random_seed": "seed",
    "stage": "the command: loratune sft",
    "do_train": "the command: loratune sft",
}
"""Name of a setting in transformers, TRL, PEFT, LLaMA-Factory, ms-swift, axolotl or unsloth → its equivalent here."""


WITHOUT_SETTING = {
    "group_by_length": "packing leaves no padding, and without it rows of similar length are batched together",
    "length_column_name": "packing leaves no padding, and without it rows of similar length are batched together",
    "remove_unused_columns": "unknown columns are ignored, and data check lists them",
    "pissa_iter": "lora.init pissa takes 16 iterations",
    "pissa_convert": "with lora.init pissa the base stays as it is, and every saved adapter is plain LoRA",
    "loraplus_lr_embedding": "LoRA is never put on embeddings",
    "train_sampling_strategy": "rows are shuffled in each epoch, using the seed",
    "per_device_eval_batch_size": DROPPED["evaluation.batch_size"],
    "eval_batch_size": DROPPED["evaluation.batch_size"],
    "eval_packing": "validation rows are packed like training rows",
    "hub_revision": "merge and export push their results",
    "trust_remote_code": "code from a model's folder is never run",
    **NOT_NEEDED,
}
"""Name of a setting in those tools → why loratune has no equivalent."""


def suggestion(setting: str, known: Iterable[str], dashes: str = "") -> str:
    """Return a suggestion for an unknown setting, as the end of a sentence; empty if there is none.

    Args:
        setting: the dotted name as written.
        known: dotted names of possible settings, or of sections if a section was written.
        dashes: what comes before them where they are flags.
    """
    last = setting.rpartition(".")[2]
    if elsewhere := KNOWN_ELSEWHERE.get(last.lower().replace("-", "_")):
        return f"; in loratune this is {_as_flag(elsewhere, known) if dashes else elsewhere}"
    if reason := (WITHOUT_SETTING | NOT_OFFERED).get(last.lower().replace("-", "_")):
        return f"; loratune has none: {reason}"
    near = _nearest(setting, last, list(known))
    return f"; did you mean {dashes}{near}?" if near else ""


def _as_flag(equivalent: str, known: Iterable[str]) -> str:
    """Return an equivalent of the table as it is written on a command line."""
    name, *value = equivalent.split(" ", 1)
    name = name.removesuffix(":")
    return " ".join([f"--{name}", *value]) if name in known else equivalent


def _nearest(setting: str, last: str, known: list[str]) -> str:
    """Return the setting with the most similar name, comparing last parts first and then whole names."""
    by_last: dict[str, list[str]] = {}
    for name in [*known, *RENAMED]:
        by_last.setdefault(name.rpartition(".")[2], []).append(RENAMED.get(name, name))
    if near := nearest(last, by_last, MISSPELT):
        return nearest(setting, by_last[near], least=0)  # of several with this name, the one in the closest section
    return nearest(setting, known, ALIKE_IN_A_SECTION)
