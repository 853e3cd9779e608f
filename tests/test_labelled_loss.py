"""Loss on labelled positions against full logits and plain cross-entropy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import count
from rounding import assert_same_but_rounding
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MiniCPM3Config,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from loratune.data.encoding.encoder import IGNORED
from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.head import OwnHead, head_of
from loratune.model.kernels import linear_cross_entropy as labelled_loss
from loratune.model.kernels.linear_cross_entropy import add_labelled_loss, summed_loss

SHAPE: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
TERMS = 2 * 2 * 7 * 48 + 99
"""There and back through the products of two layers, and the head."""


def tiny(config: type, **settings: Any) -> Any:
    """A model of a family, with weights so large that scales and caps show."""
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[config](config(**SHAPE | settings))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.8 * weight.shape[-1] ** -0.5)
    return model.eval()


def scaled(family: str) -> Any:
    """Models that scale or cap what lies between states and logits."""
    heads = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    return {
        "cohere2": lambda: tiny(Cohere2Config, logit_scale=0.25),
        "gemma2": lambda: tiny(Gemma2Config, final_logit_softcapping=2.0, query_pre_attn_scalar=8),
        "granite": lambda: tiny(GraniteConfig, logits_scaling=7.0),
        "minicpm3": lambda: tiny(MiniCPM3Config, num_key_value_heads=4, **heads),
    }[family]()


def labelled_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of which some are left out, a whole row's among them."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (3, 8), generator=random)
    labels = torch.where(torch.rand(3, 8, generator=random) < 0.5, ids, IGNORED)
    labels[1] = IGNORED
    return ids, labels


@pytest.mark.parametrize("is_frozen", [True, False], ids=["frozen", "trained head"])
@pytest.mark.parametrize("family", ["cohere2", "gemma2", "granite", "minicpm3"])
def test_the_loss_of_scaled_and_capped_logits_is_the_model_s_own(
    family: str, is_frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labelled_loss, "CHUNK_BYTES", 4 * 99 * 5)
    monkeypatch.setattr(labelled_loss, "POSITIONS_UNIT", 1)
    model = scaled(family)
    model.requires_grad_(not is_frozen)
    trained = model.model.layers[0].input_layernorm.weight.requires_grad_()
    wanted = [trained] if is_frozen else [trained, model.get_output_embeddings().weight]
    ids, labels = labelled_rows()
    logits = model(input_ids=ids, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    gradients = torch.autograd.grad(expected, wanted)
    with torch.no_grad():
        head = model.get_output_embeddings()
        by_head = head(model.model(input_ids=ids, use_cache=False).last_hidden_state)
        assert not torch.allclose(by_head, logits, rtol=1e-2)
    add_labelled_loss(model)
    assert isinstance(head_of(model), OwnHead)
    out = model(input_ids=ids, labels=labels, summed_loss=True)
    assert_same_but_rounding(out.loss_sum, expected, TERMS)
    for mine, theirs in zip(torch.autograd.grad(out.loss_sum, wanted), gradients, strict=True):
        assert_same_but_rounding(mine, theirs, TERMS)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)


@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config, LlamaConfig, MistralConfig])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_that_is_all_there_is_between_states_and_logits_is_taken_itself(config: type, dtype: Any) -> None:
    model = tiny(config).to(dtype).train()
    assert head_of(model) is model.get_output_embeddings()
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_so_is_that_of_a_model_whose_weights_are_not_numbers() -> None:
    model = tiny(Qwen2Config)
    model.model.norm.weight.data.fill_(float("nan"))  # which the first step tells
    assert head_of(model) is model.get_output_embeddings()


def test_a_model_whose_logits_depend_on_more_than_its_states_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(Qwen2Config)
    plain, calls = model.forward, []

    def forward(*arguments: Any, **settings: Any) -> Any:
        calls.append(None)
        output = plain(*arguments, **settings)
        output.logits = output.logits + len(calls)
        return output

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(LoratuneError, match="do not follow from its decoder's last states") as caught:
        add_labelled_loss(model)
    assert caught.value.exit_code == Exit.MODEL
    assert model.forward is forward


def plain(hidden: torch.Tensor, targets: torch.Tensor, head: Any) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(head(hidden).double(), targets, reduction="sum")


@settings(deadline=None, max_examples=40)
@given(
    positions=st.integers(0, 23),
    chunk=st.sampled_from([1, 3, 100]),
    block=st.sampled_from([1, 2, 100]),
    frozen=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_are_those_of_full_logits(
    positions: int, chunk: int, block: int, frozen: bool, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    head = torch.nn.Linear(6, 11, bias=bias).requires_grad_(not frozen)
    hidden = torch.randn(positions, 6, requires_grad=True)
    targets = torch.randint(11, (positions,))
    expected = plain(hidden, targets, head)
    wanted = [hidden, *(() if frozen else head.parameters())]
    gradients = torch.autograd.grad(3 * expected, wanted, materialize_grads=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelled_loss, "CHUNK_BYTES", 4 * 11 * chunk)
        patch.setitem(labelled_loss.BLOCK_LOGITS, "cpu", 11 * block)
        total, losses, _ = summed_loss(hidden, targets, head)
        found = torch.autograd.grad(3 * total, wanted, materialize_grads=True)
    torch.testing.assert_close(total.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses.sum(), total.detach())
    for mine, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_a_head_in_bfloat16_is_as_near_to_the_truth_as_full_logits() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 500, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(40, 64, dtype=torch.bfloat16)
    targets = torch.randint(500, (40,))

    def gradient(state: torch.Tensor, loss: Any) -> torch.Tensor:
        state = state.clone().requires_grad_()
        return torch.autograd.grad(loss(state), state)[0].double()

    exact_head = torch.nn.Linear(64, 500, bias=False, dtype=torch.float64).requires_grad_(False)
    exact_head.weight.copy_(head.weight)
    truth = gradient(hidden.double(), lambda state: plain(state, targets, exact_head))
    theirs = gradient(hidden, lambda state: plain(state, targets, head))
    mine = gradient(hidden, lambda state: summed_loss(state, targets, head)[0])
    assert (mine - truth).norm() <= 1.1 * (theirs - truth).norm()


def test_no_gradient_is_made_where_none_is_asked_for() -> None:
    head = torch.nn.Linear(4, 9, bias=False).requires_grad_(False)
    with torch.no_grad():
        total, losses, _ = summed_loss(torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 8]), head)
    assert not total.requires_grad
    assert losses.shape == (5,)


def test_a_model_returns_the_losses_of_its_labelled_positions_and_is_else_as_before(random_qwen: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_qwen).requires_grad_(False)
    ids = torch.randint(3, 99, (3, 8))
    labels = torch.where(torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) < 0.5, ids, IGNORED)
    labels[1] = IGNORED
    before = model(input_ids=ids).logits
    add_labelled_loss(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    out = model(input_ids=ids, labels=labels, attention_mask=None, summed_loss=True)
    wanted = []
    for row in range(3):
        losses = torch.nn.functional.cross_entropy(
            before[row, :-1], labels[row, 1:], ignore_index=IGNORED, reduction="none"
        )
        wanted.append(losses[labels[row, 1:] != IGNORED])
    torch.testing.assert_close(out.losses, torch.cat(wanted))
    torch.testing.assert_close(out.loss_sum, out.losses.sum())


def test_positions_are_looked_for_once(random_qwen: Path) -> None:
    """Each search makes a GPU wait, and so does the gradient of an index that may name a position twice."""
    model = AutoModelForCausalLM.from_pretrained(random_qwen).requires_grad_(False)
    add_labelled_loss(model)
    ids, labels = labelled_rows()
    states = model.get_input_embeddings()(ids).requires_grad_()
    counted = count(lambda: model(inputs_embeds=states, labels=labels, summed_loss=True).loss_sum.backward())
    assert counted.names["nonzero"] == 1
    assert counted.names["index_put"] == counted.names["index_put_"] == counted.names["_index_put_impl_"] == 0


def test_batches_of_all_sizes_make_products_of_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    made = labelled_loss._losses_then_gradients

    def noted(logits: torch.Tensor, *others: Any) -> torch.Tensor:
        seen.add(len(logits))
        return made(logits, *others)

    monkeypatch.setattr(labelled_loss, "_losses_then_gradients", noted)
    monkeypatch.setattr(labelled_loss, "CHUNK_BYTES", 4 * 11 * 100)
    head = torch.nn.Linear(6, 11, bias=False).requires_grad_(False)
    for positions in range(1, 300):
        assert summed_loss(torch.randn(positions, 6), torch.zeros(positions, dtype=torch.int64), head)[1].shape == (
            positions,
        )
    assert seen == {32, 64, 96}
