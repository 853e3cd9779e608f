"""How other tools mean the settings of the base, its precision and the adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loratune.migration.sheet import Sheet, is_off, number, texts, truth, whole
from loratune.migration.tool import Rules

Given = Mapping[str, Any]
DTYPES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "float32": "float32",
    "fp32": "float32",
    "auto": "auto",
}
METHODS = {"lora": "lora", "qlora": "lora", "full": "full", "freeze": "freeze"}
EVERY_LINEAR = ("all", "all-linear", "all_linear")
EXPERT_STACKS = re.compile(r"(?:.*\.)?experts\.(gate_up_proj|down_proj)")


def base(sheet: Sheet, given: Given) -> None:
    sheet.take("model.base", str(given["model_name_or_path"]))


def precision(sheet: Sheet, given: Given) -> None:
    """bfloat16 is what auto takes wherever the machine has it."""
    named = DTYPES.get(str(given.get("torch_dtype", given.get("dtype", "auto"))).removeprefix("torch."))
    if named is None:
        sheet.lose(f"loratune has the types {', '.join(dict.fromkeys(DTYPES.values()))}")
        return
    if not is_off(given.get("fp16")) and str(given["fp16"]) != "auto":
        named = "float16"
    sheet.take("model.dtype", "auto" if named == "bfloat16" else named)


def quantisation(sheet: Sheet, given: Given) -> None:
    if trains_base(sheet):
        sheet.skip("weights that are trained are not quantised")
        return
    bits = given.get("quantization_bit", given.get("quant_bits"))
    method = str(given.get("quantization_method", given.get("quant_method", "bnb"))).lower()
    is_4bit = not is_off(given.get("load_in_4bit")) or (bits is not None and str(bits) == "4")
    is_8bit = not is_off(given.get("load_in_8bit")) or (bits is not None and str(bits) == "8")
    if bits is not None and not is_off(bits) and not is_4bit and not is_8bit:
        sheet.lose("bases are quantised to 4 bits (nf4) or 8 bits (int8)")
    elif (is_4bit or is_8bit) and method not in ("bnb", "bitsandbytes"):
        sheet.lose(f"bases are quantised by bitsandbytes, not by {method}; training runs on other weights")
    elif is_4bit and str(given.get("bnb_4bit_quant_type", given.get("quantization_type", "nf4"))) != "nf4":
        sheet.lose("4 bits are nf4 here, not fp4")
    elif is_4bit:
        sheet.take("model.quantization", "nf4")
        nested = given.get("bnb_4bit_use_double_quant", given.get("double_quantization", True))
        sheet.take("model.double_quantization", truth(nested))
    elif is_8bit:
        sheet.take("model.quantization", "int8")
    computed = given.get("bnb_4bit_compute_dtype")
    if is_4bit and computed is not None:
        sheet.take("model.compute_dtype", DTYPES.get(str(computed).removeprefix("torch."), str(computed)))


def method(sheet: Sheet, given: Given) -> None:
    named = str(given["finetuning_type"])
    if named in METHODS:
        sheet.take("method", METHODS[named])
    else:
        sheet.fail(f"loratune trains {', '.join(dict.fromkeys(METHODS.values()))}, not {named}")


def trains_base(sheet: Sheet) -> bool:
    """Return whether weights of the base are trained, which can be neither quantised nor sharded."""
    return bool(sheet.recipe.get("method", "lora") != "lora")


def start(sheet: Sheet, given: Given) -> None:
    """Where the matrices of an adapter start; true is PEFT's usual start, or PiSSA's of `pissa_init`."""
    for name, value in given.items():
        named = "pissa" if name == "pissa_init" and not is_off(value) else str(value).lower()
        if named in ("true", "false", "default"):
            continue
        if named in ("pissa", "olora") and number(sheet.known.get("weight_decay", 0)) > 0:
            sheet.lose(f"{named} begins with a part of the base, which weight decay would shrink; give one of the two")
        elif named == "eva":
            sheet.change("lora.init", named, "every layer keeps its rank (rho 1); PEFT moves ranks between layers")
        else:
            sheet.take("lora.init", named)


def targets(sheet: Sheet, given: Given) -> None:
    """Names, a regular expression, or every linear layer; experts are a group of their own."""
    named = given.get("lora_target", "all")
    is_everything = any(one in EVERY_LINEAR for one in texts(named)) or not is_off(given.get("lora_target_linear"))
    is_pattern = isinstance(named, str) and bool(re.search(r"[^\w.,\s-]", named))
    if is_pattern and "," in named:
        sheet.lose("a regular expression with a comma is read as two names here; write it without one")
        return
    names = [named] if is_pattern else [name for name in texts(named) if name not in EVERY_LINEAR]
    found = [*(["all-linear"] if is_everything else []), *names]
    stacks = texts(given.get("lora_target_parameters", []))
    if stacks and sheet.recipe.get("model.quantization") == "nf4":
        sheet.lose("experts are adapted only where the base is not in nf4")
    elif stacks and all(EXPERT_STACKS.fullmatch(stack) or stack in ("gate_up_proj", "down_proj") for stack in stacks):
        sheet.change("lora.dropout", 0.0, "experts are adapted without dropout")
        found.append("experts")
    elif stacks:
        sheet.lose("parameters are adapted as the group experts only")
    value: Any = "all-linear" if found == ["all-linear"] else found
    if is_pattern:
        sheet.change("lora.target_modules", value, "names of modules are those of the language model here")
    else:
        sheet.take("lora.target_modules", value)


def alpha(sheet: Sheet, given: Given) -> None:
    rank = whole(given["lora_rank"])
    sheet.take("lora.rank", rank)
    sheet.take("lora.alpha", number(given.get("lora_alpha", 2 * rank)))


def saved_modules(sheet: Sheet, given: Given) -> None:
    names = [name for value in given.values() for name in texts(value)]
    if sheet.recipe.get("model.quantization", "none") != "none":
        sheet.lose("lora.modules_to_save trains full matrices and needs a base that is not quantised")
    else:
        sheet.take("lora.modules_to_save", names)


def layers(sheet: Sheet, given: Given) -> None:
    """A run of layers is `first-last` here."""
    value = given["layers_to_transform"]
    numbers = sorted(whole(one) for one in (value if isinstance(value, list) else texts(value)))
    if numbers != list(range(numbers[0], numbers[-1] + 1)):
        sheet.lose("layers are a range here, such as 8-15")
    else:
        sheet.take("lora.layers", f"{numbers[0]}-{numbers[-1]}")


def sharded(sheet: Sheet, given: Given) -> None:
    """Of what spreads a run over devices, only the sharding of the base has a setting."""
    named = [str(value).lower() for value in given.values() if not is_off(value)]
    is_sharded = any(mark in one for one in named for mark in ("zero3", "z3", "'stage': 3", "shard", "fsdp"))
    if is_sharded and sheet.recipe.get("model.quantization") != "int8" and not trains_base(sheet):
        sheet.take("model.sharding", "fsdp")
    elif named:
        sheet.skip("devices decide how a run is computed, not what is learnt; see sft --gpus")


def images(sheet: Sheet, given: Given) -> None:
    """Of a model that reads images, loratune trains the language model alone."""
    trained = {
        "freeze_vit": False,
        "freeze_vision_tower": False,
        "freeze_aligner": False,
        "freeze_multi_modal_projector": False,
        "freeze_mm_modules": False,
    }
    for name, value in given.items():
        if name in trained and not truth(value):
            sheet.lose("only the language model is trained, not its parts for images")
        elif name in ("freeze_llm", "freeze_language_model") and truth(value):
            sheet.lose("the language model is what is trained")


def tokenizers_template(sheet: Sheet, named: str) -> None:
    """Take the tokenizer's own template in place of one that the tool has by name."""
    how = f"there, the template is {sheet.tool}'s {named}; here it is the tokenizer's own (import --rows compares them)"
    sheet.change("prompt.template", "chat", how)


MODEL_RULES: Rules = {
    ("finetuning_type",): method,
    ("pissa_init", "init_weights", "init_lora_weights", "peft_init_lora_weights"): start,
    ("model_name_or_path",): base,
    ("torch_dtype", "dtype", "bf16", "fp16", "pure_bf16", "float16", "bfloat16"): precision,
    (
        "load_in_4bit",
        "load_in_8bit",
        "quantization_bit",
        "quant_bits",
        "quantization_method",
        "quant_method",
        "quantization_type",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "double_quantization",
        "bnb_4bit_compute_dtype",
    ): quantisation,
    ("lora_rank", "lora_alpha"): alpha,
    ("lora_target", "lora_target_linear", "lora_target_parameters"): targets,
    ("modules_to_save", "lora_modules_to_save", "additional_target"): saved_modules,
    ("layers_to_transform",): layers,
    ("fsdp", "fsdp_config", "deepspeed"): sharded,
    (
        "freeze_vit",
        "freeze_vision_tower",
        "freeze_aligner",
        "freeze_multi_modal_projector",
        "freeze_llm",
        "freeze_language_model",
        "freeze_mm_modules",
    ): images,
}
