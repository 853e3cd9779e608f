"""Compares packed passes of hybrids and mixtures with each row alone: what documents see of others, and gradients."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tiny_models import MIXTURES, make_tiny_model

from gpu_checks.models import packed, random_rows, relative_error, use_loratune
from gpu_checks.table import Figures, Workplace
from gpu_checks.whole_step import by_loratune, by_peft

KINDS = ("qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "gpt_oss", "gemma3", "granitemoehybrid", "lfm2")
DELTA_NET = ("fla", "causal_conv1d")
KERNELS = {
    "qwen3_5": DELTA_NET, "qwen3_5_moe": DELTA_NET, "qwen3_next": DELTA_NET, "lfm2": ("causal_conv1d",),
    "granitemoehybrid": ("causal_conv1d", "mamba_ssm"),
}  # fmt: skip
"""Packages whose kernels transformers takes for recurrent layers where they are installed."""
OWN_LAYERS = ("gemma3",)
"""Those of which no norm or MLP is as Qwen's."""
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLASH = "flash_attention_2"
ATTENTIONS = ("auto", "sdpa", "eager", FLASH)
"""loratune's choice, a call per document, the model's own, and flash-attn where it is installed."""
ROUNDING = 5e-5
"""Relative error of gradients that float32 alone may cause in models so narrow and random, 800 steps of it."""
LENGTHS = (21, 70, 33, 5, 64, 131, 2)
"""Of the documents: linear attention has chunks of 64, and there are boundaries within one, between and across."""
FIRST = LENGTHS[0]


def families(place: Workplace) -> Figures:
    """Return the documents that see others, the largest errors, and what was found of each case."""
    torch.backends.cudnn.allow_tf32 = False  # in convolutions, by default
    packages = {name for names in KERNELS.values() for name in names}
    installed = {name for name in packages if place.is_gpu and importlib.util.find_spec(name)}
    cases: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        folder = tiny_model(place, kind)
        kernels = ("no kernels", "kernels") if installed & {*KERNELS.get(kind, ())} else ("no kernels",)
        for name, attention, used in product(TYPES, ATTENTIONS, kernels):
            if attention != FLASH or (place.is_gpu and name == "bfloat16" and importlib.util.find_spec("flash_attn")):
                case = compare(kind, folder, TYPES[name], attention, used == "kernels")
                cases[f"{kind}, {name}, {attention}, {used}"] = case
    return summary(cases) | {"kernels": sorted(installed)}


def summary(cases: dict[str, dict[str, Any]]) -> Figures:
    """Return the figures that have bounds, and what was found of each case."""
    leaking = [name for name, case in cases.items() if case["leak"] != 0]
    blind = [name for name, case in cases.items() if not case["leak without boundaries"] > 0]
    exact = {name: case for name, case in cases.items() if ", float32, " in name and name.endswith("no kernels")}
    ratios = {name: case["error"] / max(case["of PEFT"], ROUNDING) for name, case in cases.items()}
    worst = max(ratios, key=lambda name: ratios[name])
    return {
        "leaking": len(leaking), "which leak": leaking, "blind controls": len(blind), "which are blind": blind,
        "float32 error": max(case["error"] for case in exact.values()),
        "packed beside padded": max(case["beside padded"] for case in exact.values()),
        "error / plain": ratios[worst], "worst": worst, "cases": cases,
    }  # fmt: skip


def tiny_model(place: Workplace, kind: str) -> Path:
    """Return the folder of a family's tiny model, written once."""
    folder = place.folder / "tiny" / kind
    return folder if (folder / "config.json").is_file() else make_tiny_model(kind, folder)


def compare(kind: str, folder: Path, dtype: torch.dtype, attention: str, with_kernels: bool) -> dict[str, Any]:
    """Return leak and error of one model.

    The exact gradients are those of PEFT in float32 with the same weights, of each row alone, without kernels. Where
    loratune rounds to fewer digits, the measure is what PEFT's own gradients are off by, since rounding may send a
    token to other experts.
    """
    rows = random_rows(3000, LENGTHS)
    labelled = sum(label >= 0 for _, labels in rows for label in labels[1:])
    own = "eager" if attention == "eager" else "sdpa"
    with without_kernels(kind):
        right = by_peft(adapted(kind, folder, dtype, own).float(), rows, labelled)[1]
    with nullcontext() if with_kernels else without_kernels(kind):
        plain = by_peft(adapted(kind, folder, dtype, own), rows, labelled)[1]
        model = adapted(kind, folder, dtype, attention)
        told = use_loratune(model, attention, kind not in OWN_LAYERS)
        found, padded = (by_loratune(model, rows, labelled, is_padded)[1] for is_padded in (False, True))
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
        recomputed = by_loratune(model, rows, labelled)[1]
        return {
            "how": told,
            "leak": leak(model, rows),
            "leak without boundaries": leak(model, rows, has_boundaries=False),
            "error": max(distance(one, right) for one in (found, recomputed)),
            "of PEFT": distance(plain, right),
            "beside padded": distance(found, padded),
        }


@contextmanager
def without_kernels(kind: str) -> Iterator[None]:
    """Have a family's layers compute with transformers' own functions, whichever kernels are installed."""
    modeling = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    taken = {name: function for name, function in vars(modeling).items() if is_dispatched(function, modeling)}
    vars(modeling).update({name: inspect.unwrap(function) for name, function in taken.items()})
    try:
        yield
    finally:
        vars(modeling).update(taken)


def is_dispatched(function: Any, modeling: Any) -> bool:
    """Return whether transformers may compute a function of its own by a kernel."""
    return (
        inspect.isfunction(function) and hasattr(function, "__wrapped__") and function.__module__ == modeling.__name__
    )


def adapted(kind: str, folder: Path, dtype: torch.dtype, attention: str) -> Any:
    """Load a model with an adapter that has an effect: on attention and the stacks of experts, or on all of a model."""
    from loratune.model.adapter.attach import attach_adapter
    from loratune.model.base import load_base
    from loratune.model.hardware import detect_hardware
    from loratune.recipe.method_sections import LoraSettings
    from loratune.recipe.sections import ModelSettings

    asked = ModelSettings(base=str(folder), dtype=str(dtype).removeprefix("torch."), attn_implementation=attention)
    base = load_base(asked, folder, detect_hardware())
    targets = ["attention", "experts"] if kind in MIXTURES else ["all-linear"]
    model: Any = attach_adapter(base, LoraSettings(target_modules=targets, rank=4, dropout=0.0), str(folder), 0)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model.train()


def distance(found: dict[str, Any], right: dict[str, Any]) -> float:
    """Return the norm of the difference of all gradients, relative to that of the right ones."""
    both = (torch.cat([one[name].flatten().double().cpu() for name in right]) for one in (found, right))
    return relative_error(*both)


def leak(model: Any, rows: list[Any], has_boundaries: bool = True) -> float:
    """Return the largest gradient that states of later documents have at the first one's embeddings.

    It is 0 without rounding if they do not see it, whatever the type and the kernels.
    """
    from loratune.model.architecture.structure import decoder_of

    inputs = packed(rows, model.device)
    del inputs["labels"]
    if not has_boundaries:
        inputs = {"input_ids": inputs["input_ids"]}
    with noted_embeddings(model) as noted:
        states = decoder_of(model)(**inputs, use_cache=False).last_hidden_state[0, FIRST:]
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).to(states)
    (grad,) = torch.autograd.grad(states, noted, direction)
    return float(grad[0, :FIRST].float().abs().max())


@contextmanager
def noted_embeddings(model: Any) -> Iterator[list[Any]]:
    """Collect the embeddings of a pass, as what gradients are taken for."""
    noted: list[Any] = []

    def note(_: Any, __: Any, output: Any) -> Any:
        noted.append(output.detach().requires_grad_())
        return noted[-1]

    hook = model.get_input_embeddings().register_forward_hook(note)
    try:
        yield noted
    finally:
        hook.remove()
