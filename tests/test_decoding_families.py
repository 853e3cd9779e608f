"""Every family says what transformers' `generate` says to each prompt alone, whichever decoder it gets."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import greedy, run
from peft import LoraConfig, get_peft_model
from tiny_models import CONFIGS, make_tiny_model
from torch.nn import functional

from loratune.engine import decoder_choice, slot_decoder
from loratune.engine.decoder_choice import open_decoder
from loratune.engine.forward_batch import DecodingError, ForwardBatch
from loratune.engine.plain_decoder import PlainDecoder
from loratune.engine.prefix_cache import PrefixCache
from loratune.engine.sampling import Sampling
from loratune.engine.scheduler import PROMPT_PART, Decoder
from loratune.engine.sequence import RunningSequence
from loratune.engine.slot_decoder import SlotDecoder
from loratune.engine.slot_states import SlotStates, StateName
from loratune.model.adapter.own_parameters import BASE
from loratune.model.architecture.layer_memory import has_states
from loratune.model.from_folder import load_plain

ONE_BY_ONE = {"gemma2": "softcap", "gpt_oss": "s_aux"}
"""Families whose attention has a term that the slots do not have."""
QUICK = ("qwen3_5", "granitemoehybrid", "deepseek_v3", "gpt_oss")
FAMILIES = [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in CONFIGS]
LENGTHS = (3, 40, 1, 17, PROMPT_PART + 70, 9, 40, 2)
ADAPTED = [
    "q_proj", "k_proj", "o_proj", "out_proj", "qkv_proj", "in_proj", "in_proj_qkv", "in_proj_qkvz", "q_b_proj",
    "kv_a_proj_with_mqa", "c_attn",
]  # fmt: skip
"""Names of layers of which each family has some."""


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 3000, (length,), generator=generator).tolist() for length in LENGTHS]


def tiny(kind: str, folder: Path, **settings: Any) -> Any:
    return load_plain(make_tiny_model(kind, folder / kind, **settings)).eval()


def answer(decoder: Decoder, asked: list[list[int]], tokens: int, names: list[str] | None = None) -> list[list[int]]:
    names = names or [BASE] * len(asked)
    sampling = Sampling(max_new_tokens=tokens)
    return run(decoder, [RunningSequence(p, sampling, frozenset(), n) for p, n in zip(asked, names, strict=True)])


@pytest.mark.parametrize("kind", FAMILIES)
def test_answers_and_losses_are_the_model_s_own(kind: str, tmp_path: Path) -> None:
    model, asked = tiny(kind, tmp_path), prompts()
    expected = [greedy(model, prompt, 8) for prompt in asked]
    following = [[*prompt, *said, 7, 8] for prompt, said in zip(asked, expected, strict=True)][1:6:2]
    expected_then = [greedy(model, prompt, 5) for prompt in following]
    loss = own_loss(model, asked[4])
    decoder = open_decoder(model, slots=3, cache_budget_bytes=1e9)
    assert isinstance(decoder, PlainDecoder if kind in ONE_BY_ONE else SlotDecoder)
    assert ONE_BY_ONE.get(kind, "") in (decoder.notice or "")
    assert answer(decoder, asked, 8) == expected
    assert len({tuple(said) for said in expected}) > 1
    assert [answer(decoder, [prompt], 5)[0] for prompt in following] == expected_then
    assert answer(decoder, following, 5) == expected_then
    assert decoder.loss(asked[4][:10], asked[4][10:]) == pytest.approx(loss, rel=1e-5)
    decoder.close()
    assert greedy(model, asked[0], 8) == expected[0]


def own_loss(model: Any, ids: list[int]) -> float:
    """The loss of all but ten tokens, of the model's own logits."""
    logits = model(torch.tensor([ids])).logits[0, 9:-1].detach()
    return float(functional.cross_entropy(logits.double(), torch.tensor(ids[10:]), reduction="sum"))


def own_losses(model: Any, ids: list[int]) -> list[float]:
    found = []
    for name in ("default", "other"):
        model.set_adapter(name)
        found.append(own_loss(model, ids))
    with model.disable_adapter():
        return [*found, own_loss(model, ids)]


def adapted(model: Any) -> Any:
    """The model with two adapters whose B is not 0."""
    names = [name for name in ADAPTED if any(path.endswith(f".{name}") for path, _ in model.named_modules())]
    torch.manual_seed(4)
    wide, narrow = (LoraConfig(r=rank, target_modules=names, init_lora_weights=False) for rank in (4, 2))
    both = get_peft_model(model, wide)
    both.add_adapter("other", narrow)
    return both.eval()


def said_alone(model: Any, asked: list[list[int]], names: list[str], tokens: int) -> list[list[int]]:
    """What transformers and PEFT say to each prompt with its adapter."""
    said = []
    for prompt, name in zip(asked, names, strict=True):
        if name == BASE:
            with model.disable_adapter():
                said.append(greedy(model, prompt, tokens))
        else:
            model.set_adapter(name)
            said.append(greedy(model, prompt, tokens))
    return said


@pytest.mark.parametrize("kind", FAMILIES)
def test_adapters_and_the_base_in_one_batch_do_not_mix(kind: str, tmp_path: Path) -> None:
    model, asked = adapted(tiny(kind, tmp_path)), prompts()
    names = ["default", "other", BASE, "default", "other", BASE, "other", "default"]
    expected = said_alone(model, asked, names, 5)
    decoder = open_decoder(model, slots=4)
    assert answer(decoder, asked, 5, names) == expected
    losses = [decoder.loss(asked[4][:10], asked[4][10:], name) for name in ("default", "other", BASE)]
    decoder.close()
    assert losses == pytest.approx(own_losses(model, asked[4]), rel=1e-5)
    assert min(abs(one - other) for one, other in itertools.combinations(losses, 2)) > 5e-5 * losses[0]


def test_adapters_of_fused_experts_are_computed_apart(tmp_path: Path) -> None:
    """PEFT refuses a pass of several adapters where one targets parameters, even for the rows of another."""
    model = tiny("qwen3_5_moe_text", tmp_path)
    torch.manual_seed(5)
    experts = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"], init_lora_weights=False)
    both = get_peft_model(model, experts)
    both.add_adapter("other", experts)
    names = ["default", BASE, "other", "default", BASE, "other", BASE, "default"]
    expected = said_alone(both.eval(), prompts(), names, 4)
    decoder = open_decoder(both, slots=4)
    assert isinstance(decoder, SlotDecoder)
    assert answer(decoder, prompts(), 4, names) == expected
    assert expected != said_alone(both, prompts(), [BASE] * len(names), 4)
