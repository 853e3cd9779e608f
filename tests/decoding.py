"""Tiny models of several families, and what transformers' generate says to a prompt alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from loratune.engine.sampling import Sampling
from loratune.engine.sequence import RunningSequence
from loratune.engine.slot_decoder import SlotDecoder

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2 with a window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "llama": LlamaConfig(**SIZES),
    "mistral with a window": MistralConfig(**SIZES, sliding_window=7),
}
PROMPTS = [list(range(5, 5 + length)) for length in (3, 40, 1, 17, 9, 70, 2)]


def random_model(config: Any) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    for parameter in model.parameters():  # wide enough for attention to matter
        parameter.data.mul_(4)
    return model


def token_bytes(model: Any) -> int:
    """What the keys and values of one token take, by the numbers of a config with equal layers."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * size * model.dtype.itemsize)


def greedy(model: Any, prompt: list[int], tokens: int, ends: list[int] | None = None, **forward: Any) -> list[int]:
    """What transformers says to one prompt alone."""
    model.set_attn_implementation("eager")
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0,
        **forward,
    )
    new: list[int] = output[0, len(prompt) :].tolist()
    return new


def run(decoder: SlotDecoder, all_running: list[RunningSequence]) -> list[list[int]]:
    for running in all_running:
        decoder.add(running)
    while not decoder.is_idle:
        decoder.step()
    return [running.tokens for running in all_running]


def check_any_course(
    data: st.DataObject, model: Any, decoder: Any, longest: int = 512, after: Callable[[Any], object] = id
) -> None:
    """Ask, go on, remove and make steps in any order, until all answers have ended; each is as it is given alone.

    Args:
        data: draws the course.
        model: knows the tokens 1 to 6.
        decoder: of the model; it is closed.
        longest: most tokens of a conversation that goes on.
        after: called after each event.
    """
    prompts = st.lists(st.integers(1, 2), min_size=1, max_size=90)  # few ids, so that many begin alike
    running: list[RunningSequence] = []
    for _ in range(data.draw(st.integers(1, 14))):
        match data.draw(st.sampled_from(["ask", "step", "step", "remove", "go on"])):
            case "ask":
                tokens = data.draw(st.integers(1, 70))
                running.append(RunningSequence(data.draw(prompts), Sampling(max_new_tokens=tokens), frozenset()))
                decoder.add(running[-1])
            case "go on" if running and running[-1].finish and len(running[-1].ids) < longest:
                running.append(RunningSequence([*running[-1].ids, 5, 6], Sampling(max_new_tokens=4), frozenset()))
                decoder.add(running[-1])
            case "remove" if running:
                decoder.remove(data.draw(st.sampled_from(running)))
            case _:
                decoder.step()
        after(decoder)
    while not decoder.is_idle:
        decoder.step()
        after(decoder)
    decoder.close()
    for one in running:  # some have been removed before their end
        assert one.tokens == greedy(model, one.prompt, max(1, len(one.tokens)))[: len(one.tokens)]


def adapted(kind: str = "qwen2", **settings: Any) -> Any:
    """Two adapters of different rank whose B is not 0."""
    model = get_peft_model(
        random_model(CONFIGS[kind]), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **settings)
    )
    model.add_adapter(
        "other", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **settings)
    )
    return model.eval()
