"""What a training pass of packed rows asks of a GPU, counted on tensors without values, and PEFT's own pass beside it.

A GPU waits for the host where kernels are short, so their number decides how fast batches of few tokens are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operators import OperatorCount, count, fake_gpu, norm_by_one_kernel, on_fake_gpu
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config

from loratune.data.assembly.batches import collate_packed, collate_padded
from loratune.model.architecture.roles import is_rms_norm
from loratune.model.kernels import norm_mlp
from loratune.model.kernels.lora_linear import use_fused_lora
from loratune.model.kernels.norm_mlp import use_fused_elementwise
from loratune.model.kernels.packed_attention import VARLEN_ATTENTION, use_document_attention

LAYERS = 4
"""Every layer takes the same. With 28, we take 4,066 kernels, PEFT 6,668."""
TOKENS = 6
"""Of each document."""
MOST_OF_A_LAYER = 147
"""Of which 77 are those of its seven adapted modules, and 21 round and scale their A and B."""


def adapted() -> Any:
    """A narrow Qwen2 in bfloat16, with a float32 adapter on all linear modules."""
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    lora = LoraConfig(r=4, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, lora).train()


def training_pass(model: Any, batch: dict[str, Any]) -> Callable[[], None]:
    """Forward and backward of the decoder. The loss is the same few operators however a layer computes."""
    inputs = {name: value for name, value in batch.items() if name not in ("about", "labels")}

    def work() -> None:
        model.get_base_model().model(**inputs, use_cache=False).last_hidden_state.sum().backward()

    return work


def rows(count: int) -> list[dict[str, Any]]:
    return [{"input_ids": [1] * TOKENS, "labels": [1] * TOKENS, "sequence": number} for number in range(count)]


def peft_count() -> int:
    """Count PEFT's pass as TRL makes it: a padded row per document, under autocast to bfloat16."""
    work = training_pass(adapted(), collate_padded(rows(2), pad_token_id=0))

    def under_autocast() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            work()

    counted = count(under_autocast)
    assert counted.names["_scaled_dot_product_flash_attention_for_cpu"] == LAYERS
    # A GPU draws a mask and applies it in one kernel; here they are three.
    return len(counted) - counted.names["bernoulli_"] - counted.names["div_"]


def own_counts(documents: int, monkeypatch: pytest.MonkeyPatch) -> list[OperatorCount]:
    """Count two of our passes on a GPU of compute capability 8.0, with all documents in one row."""
    plain = norm_mlp._makers

    def makers(module: Any) -> list[Any]:
        return [norm_mlp._norm_with] if is_rms_norm(module) else plain(module)  # weights here are of another class

    monkeypatch.setattr(norm_mlp, "_makers", makers)
    monkeypatch.setattr(norm_mlp, "_gives_the_same", lambda *_: True)  # there are no values to compare
    monkeypatch.setattr(norm_mlp, "_OWN", norm_mlp._TORCH._replace(norm=norm_by_one_kernel))
    batch = collate_packed(rows(documents))
    with fake_gpu():
        model, batch = adapted(), on_fake_gpu(batch)
        assert use_fused_lora(model) == 7 * LAYERS
        assert use_fused_elementwise(model) == 3 * LAYERS + 1
        use_document_attention(model.get_base_model(), VARLEN_ATTENTION)
        return [count(training_pass(model, batch)) for _ in range(2)]


def test_a_pass_takes_a_third_fewer_kernels_than_peft_s_however_many_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    (few, few_again), (many, many_again) = (own_counts(documents, monkeypatch) for documents in (16, 64))
    assert many.names == few.names
    assert many_again.names == few_again.names
    assert few.names["_varlen_attn"] == few.names["_varlen_attn_backward"] == LAYERS
    assert len(few) <= peft_count() * 2 / 3
    assert len(few) <= MOST_OF_A_LAYER * LAYERS
    # Nothing is copied to the GPU, and no value is asked of it, which would fail here.
    assert few.copies == few_again.copies == 0
    # A and B are rounded in the first pass after a step; gradients are added up from the second on.
    assert few.names - few_again.names == {"_to_copy": 2 * 7 * LAYERS, "mul": 7 * LAYERS}
    assert few_again.names - few.names == {"add_": 2 * 7 * LAYERS}
