"""The models and rows of the checks: random weights of Qwen2.5-7B's shapes, tiny-qwen, rows of chosen lengths."""

from __future__ import annotations

import json
import random
import shutil
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.synthetic import QWEN_7B, write_model

from gpu_checks.runner import REPOSITORY
from gpu_checks.table import Workplace

TINY_QWEN = REPOSITORY / "loratune" / "assets" / "tiny-qwen"
EMBEDDING_SCALE = 50
"""With it the residual stream of random weights is about as large as a real Qwen's, so that overflows show."""
SMALL = QWEN_7B | {
    "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 4096, "bos_token_id": None, "eos_token_id": 3002,
}  # fmt: skip
"""What stands for the 7B where there is no GPU."""


def random_model(place: Workplace, layers: int) -> tuple[Path, Path]:
    """Return the folders of a base and of an adapter with rank 8 on all its linear layers, written once.

    Args:
        place: without a GPU the model has small shapes.
        layers: 28 makes it a 7B.
    """
    import torch

    folder = place.folder / f"random-{layers}"
    if not folder.is_dir():
        begun = folder.with_suffix(".part")
        shutil.rmtree(begun, ignore_errors=True)
        torch.manual_seed(0)
        write_model(begun, (QWEN_7B if place.is_gpu else SMALL) | {"num_hidden_layers": layers}, EMBEDDING_SCALE)
        begun.rename(folder)
        # It names the base, which has moved.
        file = folder / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(folder / "base")}))
    return folder / "base", folder / "adapter"


def rows_of(lengths: Sequence[int]) -> list[dict[str, str]]:
    """Return Alpaca rows of about these lengths in tokens of tiny-qwen, prompt included; no two are alike."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    words = _words()
    generator = random.Random(0)
    empty = _tokens(tokenizer, "", "")
    rows = []
    for length in lengths:
        question = " ".join(generator.choices(words, k=4))
        picked = generator.choices(words, k=length)
        ends = _ends_of_words(tokenizer, picked)
        room = length - empty - len(tokenizer(question).input_ids)
        count = max(1, sum(end <= room for end in ends))
        rows.append({"instruction": question, "input": "", "output": " ".join(picked[:count])})
    return rows


def write_rows(path: Path, lengths: Sequence[int]) -> Path:
    """Write `rows_of` these lengths to a JSON file."""
    path.write_text(json.dumps(rows_of(lengths), ensure_ascii=False))
    return path


def _words() -> list[str]:
    rows = json.loads((REPOSITORY / "data" / "company_faq.json").read_text(encoding="utf-8"))
    text = " ".join(row["output"] for row in rows if row["output"].isascii())
    return sorted(set(text.split()))


def _tokens(tokenizer: Any, question: str, answer: str) -> int:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return len(tokenizer.apply_chat_template(turns, return_dict=False))


def _ends_of_words(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """Return how many tokens of the joined words come up to the end of each one."""
    spans = tokenizer(" ".join(words), return_offsets_mapping=True).offset_mapping
    stops = [stop for _, stop in spans]
    ends, place = [], -1
    for word in words:
        place += len(word) + 1
        ends.append(bisect_right(stops, place))
    return ends


def adapted_base(base: Path, adapter: Path, dtype: Any) -> Any:
    """Load a base with an adapter that is to be trained, as PEFT and transformers do it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from loratune.model.hardware import detect_hardware

    device = detect_hardware().device  # and without cuDNN's attention, which would make plans for each length
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map=device)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True)


def use_loratune(model: Any, attention: str = "auto", has_plain_layers: bool = True) -> str:
    """Put loratune's kernels into a PEFT model, as `sft` does.

    Args:
        model: loaded with the attention, unless that is for loratune to choose.
        attention: as in the recipe.
        has_plain_layers: whether it has norms and MLPs that loratune has kernels for.

    Returns:
        Which attention it is, and how the documents of a packed row are kept apart.
    """
    from loratune.model.architecture.structure import causal_model
    from loratune.model.hardware import detect_hardware
    from loratune.model.kernels.attention_choice import choose_attention
    from loratune.model.kernels.linear_cross_entropy import add_labelled_loss
    from loratune.model.kernels.lora_linear import use_fused_lora
    from loratune.model.kernels.norm_mlp import use_fused_elementwise
    from loratune.model.kernels.recurrent_layers import call_modules_in_training
    from loratune.training.probes.isolation import choose_packing

    base = causal_model(model)
    own = str(base.config._attn_implementation)
    taken = (use_fused_lora(model), use_fused_elementwise(base))
    if not taken[0] or bool(taken[1]) != has_plain_layers:
        raise RuntimeError(
            f"loratune's kernels have not been used: {taken[0]} linear layers, {taken[1]} norms and MLPs"
        )
    call_modules_in_training(base)
    packing = choose_packing(model, choose_attention(base, detect_hardware(), attention, is_packed=True), own)
    if not packing.is_packed:
        raise RuntimeError(packing.reason)
    add_labelled_loss(base)
    return f"{packing.attention}; {packing.reason}"


def packed(rows: Sequence[tuple[list[int], list[int]]], device: Any, is_padded: bool = False) -> dict[str, Any]:
    """Return one pass with rows of ids and labels, as loratune packs it, or as it pads it."""
    from loratune.data.assembly.batches import collate_packed, collate_padded

    made = [{"input_ids": ids, "labels": labels, "sequence": 0} for ids, labels in rows]
    batch = collate_padded(made, pad_token_id=0) if is_padded else collate_packed(made)
    del batch["about"]
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}


def random_rows(vocabulary: int, lengths: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of rows; the first third of each has no labels, as a prompt."""
    generator = random.Random(1)
    rows = []
    for length in lengths:
        ids = [generator.randrange(vocabulary) for _ in range(length)]
        rows.append((ids, [-100] * (length // 3) + ids[length // 3 :]))
    return rows


def relative_error(found: Any, exact: Any) -> float:
    """Return the norm of the difference over that of what is exact, both in float64."""
    exact = exact.double().cpu()
    return float((found.detach().double().cpu() - exact).norm() / exact.norm())


def with_gradient(module: Callable[[Any], Any], x: Any, direction: Any) -> tuple[Any, Any]:
    """Return a function's output and the gradient of its input, for the gradient of its output."""
    import torch

    rows = x.clone().requires_grad_()
    output = module(rows)
    (grad,) = torch.autograd.grad(output, rows, direction.to(output.dtype))
    return output.detach(), grad
