"""Packed rows against each document by itself, and everything else against transformers' sdpa."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from operators import GPU, count, fake_gpu, on_fake_gpu, varlen_by_mask
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config
from transformers.masking_utils import chunked_causal_mask_function

from loratune.data.assembly.batches import collate_packed
from loratune.model.architecture.cache_argument import cache_argument
from loratune.model.kernels import packed_attention as document_attention
from loratune.model.kernels.packed_attention import (
    DOCUMENT_ATTENTION,
    VARLEN_ATTENTION,
    register_document_attention,
)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
WINDOW = 5
CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "qwen3 with some windows": lambda: Qwen3Config(
        **SIZES, head_dim=16, sliding_window=WINDOW, use_sliding_window=True, max_window_layers=1
    ),
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral with windows": lambda: MistralConfig(**SIZES, sliding_window=WINDOW),
}
ROWS = {"several": [7, 1, 12, 1, 5, 4], "one": [11], "of one token": [1, 1, 1], "a single token": [1]}


@pytest.fixture(params=[DOCUMENT_ATTENTION, VARLEN_ATTENTION])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an attention for packed rows; a dense mask stands in for the kernel that needs a GPU."""
    register_document_attention()
    monkeypatch.setattr(document_attention, "varlen_attn", varlen_by_mask)
    return str(request.param)


@pytest.fixture(params=["qwen2", *CONFIGS])
def models(request: pytest.FixtureRequest, implementation: str, random_qwen: Path) -> tuple[Any, Any]:
    """One model twice: with documents by themselves, and with sdpa."""
    names = (implementation, "sdpa")
    if request.param == "qwen2":
        return tuple(AutoModelForCausalLM.from_pretrained(random_qwen, attn_implementation=name) for name in names)
    made = []
    for name in names:
        torch.manual_seed(0)
        config = CONFIGS[request.param]()
        made.append(AutoModelForCausalLM.from_config(config, attn_implementation=name).eval())
    # Random weights of the usual size leave attention without a say.
    for model in made:
        for index, weight in enumerate(model.parameters()):
            torch.nn.init.normal_(weight, 1 if weight.ndim == 1 else 0, 0.3, torch.Generator().manual_seed(index))
    return made[0], made[1]


def documents_of(lengths: list[int]) -> list[list[int]]:
    """Random ids."""
    random = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(1, 96, (length,), generator=random).tolist() for length in lengths]


def batch_of(documents: list[list[int]]) -> dict[str, Any]:
    """A packed row; every token but the first of a document has a label."""
    batch = collate_packed([{"input_ids": ids, "labels": ids, "sequence": n} for n, ids in enumerate(documents)])
    del batch["about"]
    return batch


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of all weights, which are reset."""
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_logits_of_a_packed_document_are_those_of_the_document_alone(models: Any, lengths: list[int]) -> None:
    model, reference = models
    documents = documents_of(lengths)
    batch = batch_of(documents)
    del batch["labels"]
    packed = model(**batch).logits[0, : sum(lengths)].split(lengths)
    for ids, logits in zip(documents, packed, strict=True):
        torch.testing.assert_close(logits, reference(torch.tensor([ids])).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
def test_gradients_of_a_packed_row_are_the_sum_of_those_alone(models: Any, checkpointing: bool | None) -> None:
    model, reference = models
    documents = documents_of(ROWS["several"])
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    model.train()
    model(**batch_of(documents), num_items_in_batch=1, use_cache=False).loss.backward()
    for ids in documents:
        if len(ids) > 1:
            reference(torch.tensor([ids]), labels=torch.tensor([ids]), num_items_in_batch=1).loss.backward()
    packed, alone = gradients(model), gradients(reference)
    assert packed.keys() == alone.keys()
    for name, gradient in packed.items():
        scale = float(alone[name].abs().max())
        torch.testing.assert_close(gradient, alone[name], atol=1e-5 * max(1, scale), rtol=1e-4, msg=name)


def test_a_padded_batch_is_as_with_sdpa(models: Any) -> None:
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 0, 0, 0, 0]])}
    batch["attention_mask"] = (batch["input_ids"] > 0).long()
    logits, expected = (model(**batch).logits for model in models)
    assert torch.equal(logits, expected)
    sides = (model(**{name: rows.flip(1) for name, rows in batch.items()}).logits for model in models)
    assert torch.equal(*sides)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_without_a_mask_is_as_with_sdpa(models: Any, use_cache: bool) -> None:
    logits, expected = (model(torch.arange(20, 32)[None], use_cache=use_cache).logits for model in models)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("rows", [[[5, 6, 7, 8, 9, 10, 11]], [[5, 6, 7, 8], [0, 0, 9, 10]]], ids=["one", "two"])
def test_generation_is_as_with_sdpa(models: Any, rows: list[list[int]]) -> None:
    batch = {"input_ids": torch.tensor(rows), "attention_mask": (torch.tensor(rows) > 0).long()}
    settings = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found, expected = (model.generate(**batch, **settings, eos_token_id=None) for model in models)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(map(torch.equal, found.logits, expected.logits))


def test_several_documents_without_borders_are_right_where_no_cache_hides_them(models: Any) -> None:
    batch = batch_of(documents_of(ROWS["several"]))
    unmarked = {name: batch[name] for name in ("input_ids", "position_ids")}
    logits, expected = (model(**unmarked, use_cache=False).logits for model in models)
    assert torch.equal(logits, expected)
    del batch["labels"]
    torch.testing.assert_close(logits, models[0](**batch).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("hidden", ["cache", "mask"])
@pytest.mark.parametrize("lengths", [[2, 1, 1], [3, 9]], ids=["within the window", "beyond the window"])
def test_several_documents_without_borders_are_refused_where_they_would_see_each_other(
    models: Any, hidden: str, lengths: list[int]
) -> None:
    model, _ = models
    batch = batch_of(documents_of(lengths))
    unmarked = {name: batch[name] for name in ("input_ids", "position_ids")}
    more = {"use_cache": True} if hidden == "cache" else {"attention_mask": torch.ones_like(batch["input_ids"])}
    with pytest.raises(ValueError, match="a row of several documents needs cu_seq_lens_q"):
        model(**unmarked, **more)


def test_no_mask_of_the_row_is_built_for_documents_with_borders(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = models
    lengths: list[int] = []
    build = document_attention.sdpa_mask

    def watch(**arguments: Any) -> Any:
        lengths.append(arguments["q_length"])
        return build(**arguments)

    monkeypatch.setattr(document_attention, "sdpa_mask", watch)
    model(**batch_of(documents_of(ROWS["several"])))
    if model.config._attn_implementation == VARLEN_ATTENTION:
        assert lengths == []
    else:
        assert max(lengths) == max(ROWS["several"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 3, 5])}, "documents of 5 tokens in a row of 7"),
        ({"attention_mask": torch.ones(1, 7)}, "borders of documents and an attention mask"),
        ({"input_ids": torch.ones(2, 7, dtype=torch.long)}, "one row without a cache"),
    ],
    ids=["wrong borders", "mask", "two rows"],
)
def test_borders_that_do_not_fit_are_refused(models: Any, change: dict[str, Any], message: str) -> None:
    batch = batch_of(documents_of([3, 4])) | change
    del batch["labels"]
    with pytest.raises(ValueError, match=message):
        models[0](**batch)


def test_borders_with_keys_of_an_earlier_call_are_refused(models: Any) -> None:
    model, _ = models
    name = cache_argument(model)
    cache = model(torch.tensor([[5, 6]]))[name]
    batch = batch_of(documents_of([3, 4]))
    del batch["labels"]
    with pytest.raises(ValueError, match="without a cache of earlier keys"):
        model(**batch, **{name: cache})


def test_a_saved_model_does_not_name_the_attention(models: Any, tmp_path: Path) -> None:
    models[0].save_pretrained(tmp_path)
    assert DOCUMENT_ATTENTION not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("groups", [1, 3])
def test_products_give_what_the_kernel_gives(length: int, groups: int) -> None:
    torch.manual_seed(length)
    query = torch.randn(1, length, 2 * groups, 16).transpose(1, 2).requires_grad_()
    key, value = (torch.randn(1, length, 2, 16).transpose(1, 2).requires_grad_() for _ in range(2))
    upstream = torch.randn(1, length, 2 * groups, 16)
    found = document_attention._attend_by_products(query, key, value, 0.3)
    expected = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    ours = torch.autograd.grad(found, (query, key, value), upstream)
    theirs = torch.autograd.grad(expected, (query, key, value), upstream)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_documents_in_bfloat16_are_those_alone_within_its_precision(models: Any) -> None:
    model, reference = (model.to(torch.bfloat16) for model in models)
    documents = documents_of([150, 40])
    batch = batch_of(documents)
    del batch["labels"]
    exact = reference.float()
    for ids, logits in zip(documents, model(**batch).logits[0, :190].split([150, 40]), strict=True):
        expected = exact(torch.tensor([ids])).logits[0]
        assert (logits.float() - expected).norm() < 0.05 * expected.norm()


def test_documents_of_all_lengths_make_products_of_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = set()
    softmax = torch.nn.functional.softmax

    def noted(scores: torch.Tensor, dim: int) -> torch.Tensor:
        shapes.add(tuple(scores.shape))
        return softmax(scores, dim=dim)

    monkeypatch.setattr(document_attention.functional, "softmax", noted)
    for length in range(1, 257):
        tensors = (torch.randn(1, heads, length, 8) for heads in (4, 2, 2))
        assert document_attention._attend_by_products(*tensors, None).shape == (1, length, 4, 8)
    assert len(shapes) == 256 // document_attention.LENGTH_UNIT


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_all_documents_are_one_call_of_torch_s_kernel_per_layer(family: str, dtype: torch.dtype) -> None:
    register_document_attention()
    batch = batch_of(documents_of([7, 1, 30, 26]))
    del batch["labels"]
    with fake_gpu():
        config = CONFIGS[family]()
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=VARLEN_ATTENTION)
        batch = on_fake_gpu(batch)
        counted = count(lambda: model.model(**batch, use_cache=False), watched="_varlen_attn")
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert len(counted.arguments) == config.num_hidden_layers
    windows = []
    for arguments in counted.arguments:
        query, key, value, of_queries, of_keys, longest_query, longest_key, is_causal, scale, window, shared, *_ = (
            arguments
        )
        assert [tuple(t.shape) for t in (query, key, value)] == [(64, 4, size), (64, 2, size), (64, 2, size)]
        assert {t.dtype for t in (query, key, value)} == {dtype}
        assert all(t.stride(-1) == 1 for t in (query, key, value))
        assert of_queries is of_keys
        assert (of_queries.dtype, tuple(of_queries.shape), of_queries.device.type) == (torch.int32, (5,), GPU)
        assert (longest_query, longest_key, shared) == (30, 30, True)
        assert scale == pytest.approx(size**-0.5)
        assert is_causal is (window == [-1, 0])
        windows.append(window)
    windowed = {"qwen3 with some windows": [0, 1], "mistral with windows": [1, 1]}.get(family, [0, 0])
    assert windows == [[WINDOW - 1, 0] if has_window else [-1, 0] for has_window in windowed]


def test_without_that_kernel_a_gpu_gets_keys_for_every_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where flash attention cannot run, torch computes shared keys by plain products, with all scores in memory."""
    seen = []

    def kernel(query: Any, key: Any, value: Any, *_: Any, enable_gqa: bool, **__: Any) -> Any:
        seen.append((query.shape, key.shape, value.shape, enable_gqa))
        return query

    monkeypatch.setattr(document_attention.functional, "scaled_dot_product_attention", kernel)
    register_document_attention()
    batch = batch_of(documents_of([7, 1, 4]))
    del batch["labels"]
    with fake_gpu():
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation=DOCUMENT_ATTENTION)
        model.model(**on_fake_gpu(batch), use_cache=False)
    assert seen == 2 * [3 * ((1, 4, length, 8),) + (False,) for length in (7, 1, 4)]


@pytest.mark.parametrize("kind", ["chunks", "narrow values", "dropout"])
def test_what_the_kernel_does_not_serve_is_left_to_single_documents(
    random_qwen: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Local attention of chunks is not named by a layer, but by its mask."""
    monkeypatch.setattr(document_attention, "varlen_attn", None)
    layer = AutoModelForCausalLM.from_pretrained(random_qwen).model.layers[0].self_attn
    chunks = chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.long))
    local = {"local_size": 3, "mask_function": chunks} if kind == "chunks" else {}
    mask = document_attention.defer_mask(batch_size=1, q_length=6, kv_length=6, **local)
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    value = key[..., :4] if kind == "narrow values" else key
    settings = {"cu_seq_lens_q": torch.tensor([0, 4, 6], dtype=torch.int32), "max_length_q": 4, "scaling": 0.3}
    settings["dropout"] = 0.5 if kind == "dropout" else 0.0
    results = []
    for attend in (document_attention.attend_by_varlen, document_attention.attend_documents):
        torch.manual_seed(3)
        results.append(attend(layer, query, key, value, mask, **settings)[0])
    assert torch.equal(*results)


def test_the_kernel_gets_the_type_of_autocast(random_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained norms of queries and keys are float32, and a kernel that torch does not cast for takes no mixture."""
    seen: list[torch.dtype] = []

    def note(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **settings: Any) -> torch.Tensor:
        seen.extend([query.dtype, key.dtype, value.dtype])
        return varlen_by_mask(query, key, value, *rest, **settings)

    monkeypatch.setattr(document_attention, "varlen_attn", note)
    layer = AutoModelForCausalLM.from_pretrained(random_qwen).model.layers[0].self_attn
    mask = document_attention.defer_mask(batch_size=1, q_length=6, kv_length=6)
    settings = {"cu_seq_lens_q": torch.tensor([0, 4, 6], dtype=torch.int32), "max_length_q": 4, "scaling": 0.3}
    query, key, value = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        document_attention.attend_by_varlen(layer, query, key, value, mask, **settings)
    assert seen == [torch.bfloat16] * 3
