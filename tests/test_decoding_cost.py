"""What one decoding step asks of a device, beside transformers' generate with PEFT's own forward.

OperatorCount are counted on a CPU, and copies on a fake GPU: both are the same on every machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from operators import OperatorCount
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config

from loratune.engine.paged_cache import PAGE, Kernel, PagedKVCache
from loratune.engine.sampling import Sampling
from loratune.engine.sequence import RunningSequence
from loratune.engine.slot_decoder import SlotDecoder
from loratune.model.adapter.own_parameters import BASE
from loratune.model.architecture.structure import causal_model, layer_count
from loratune.model.kernels import lora_inference
from loratune.model.kernels.lora_linear import use_fused_lora

LAYERS = 3
PROMPT = list(range(5, 25))
SETTINGS: dict[str, tuple[Sampling, dict[str, Any]]] = {
    "greedy": (Sampling(), {"do_sample": False}),
    "penalised": (Sampling(repetition_penalty=1.05), {"do_sample": False, "repetition_penalty": 1.05}),
    "sampled": (
        Sampling(temperature=0.7, top_k=20, top_p=0.8, seed=1, repetition_penalty=1.05),
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
    ),
}


def adapted(layers: int = LAYERS) -> Any:
    """A bfloat16 model with two float32 adapters, as loaded for inference."""
    config = Qwen2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    return model.eval()


def begun(model: Any, sampling: Sampling, names: list[str], prepare: Callable[[SlotDecoder], Any] = id) -> SlotDecoder:
    """A decoder whose answers are on their way."""
    use_fused_lora(model)
    decoder = SlotDecoder(model, slots=len(names))
    prepare(decoder)
    for name in names:
        decoder.add(RunningSequence(PROMPT, sampling.but(max_new_tokens=99), frozenset(), name))
    while not all(running.tokens for running in decoder.running) or not decoder.running:
        decoder.step()
    decoder.step()
    return decoder


def launched_by_generate(model: Any, rows: int, how: dict[str, Any]) -> Counter[str]:
    """OperatorCount of one token of `generate`: what two answers differ by, one of which has another token."""
    counts = []
    for tokens in (4, 5):
        ids = torch.tensor([PROMPT] * rows)
        with OperatorCount() as counted:
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                eos_token_id=299, pad_token_id=0, **how,
            )  # fmt: skip
        counts.append(counted.names)
    return counts[1] - counts[0]


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("rows", [1, 8])
def test_a_step_launches_less_than_generate_with_peft(kind: str, rows: int) -> None:
    sampling, how = SETTINGS[kind]
    expected = launched_by_generate(adapted(), rows, how)
    decoder = begun(adapted(), sampling, ["default"] * rows)
    with OperatorCount() as counted:
        decoder.step()
    # A kernel for each sampled answer's random numbers is left.
    share = 0.85 if kind == "sampled" else 0.7
    assert counted.names.total() <= share * expected.total(), (counted.names, expected)


class GPU:
    """The device "meta" as one: the CPU reads zeros of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads = 0

        def read(tensor: torch.Tensor) -> list[int]:
            self.reads += 1
            return [0] * len(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", read)
        monkeypatch.setattr(torch.Tensor, "exponential_", lambda tensor, generator: tensor.mul_(1))
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        monkeypatch.setattr(torch, "Generator", lambda _: torch.default_generator)
        lora_inference._numbered.cache_clear()


def on_pages(decoder: SlotDecoder) -> SlotDecoder:
    """The decoder as on a GPU whose kernel reads pages."""
    kernel = Kernel(pytest.importorskip("torch.nn.attention.varlen").varlen_attn, reads_tables=True)
    layers = layer_count(causal_model(decoder.model).config)
    decoder._cache = PagedKVCache(layers, 99 * PAGE, kernel, decoder._cache.has_states)
    decoder._prefixes._cache = decoder._cache
    return decoder


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("names", [["default"], ["default"] * 8, ["default", "other", BASE]], ids=["1", "8", "mixed"])
def test_a_step_copies_little_to_a_gpu_and_reads_once(
    kind: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted().to("meta")
    gpu = GPU(monkeypatch)
    decoder = begun(model, SETTINGS[kind][0], names, on_pages)
    gpu.reads = 0
    with OperatorCount() as counted:
        decoder.step()
    assert counted.copies == 2  # what the rows are, and their tokens
    assert gpu.reads == 1
