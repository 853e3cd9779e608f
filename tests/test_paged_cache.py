"""Keys and values in pages: the same answers, no copies, and never more memory than was promised."""

from __future__ import annotations

import types
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from decoding import CONFIGS, PROMPTS, adapted, check_any_course, greedy, random_model, run, token_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operators import OperatorCount

from loratune.engine import cache_choice, paged_cache
from loratune.engine import scheduler as decoder_module
from loratune.engine.cache_choice import make_cache, works
from loratune.engine.paged_cache import Kernel, PagedBatch, PagedKVCache
from loratune.engine.sampling import Sampling
from loratune.engine.sequence import RunningSequence
from loratune.engine.slot_decoder import SlotDecoder
from loratune.engine.slot_states import SlotStates
from loratune.model.adapter.own_parameters import BASE

SMALL = 16
"""Tokens of a page, so that short prompts take several."""


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """What torch's documentation says of `varlen_attn` with pages, a row and a head at a time in float64."""
    assert seqused_k is not None
    assert (cu_seq_k is None) != (block_table is None)
    assert enable_gqa == (query.shape[1] != key.shape[-2])
    assert max_k == int(seqused_k.max())
    left, right = window_size
    output = torch.zeros_like(query)
    for row, used in enumerate(seqused_k.tolist()):
        first, last = cu_seq_q[row : row + 2].tolist()
        assert last - first <= max_q
        if block_table is not None:
            assert block_table.stride(-1) == 1
            own = [torch.cat([pool[page] for page in block_table[row]])[:used].double() for pool in (key, value)]
        else:
            assert cu_seq_k is not None
            assert len(cu_seq_k) == len(seqused_k) + 1
            own = [pool[cu_seq_k[row] : cu_seq_k[row] + used].double() for pool in (key, value)]
        numbers = [tensor for tensor in (cu_seq_q, cu_seq_k, seqused_k, block_table) if tensor is not None]
        assert {tensor.dtype for tensor in numbers} == {torch.int32}
        groups = query.shape[1] // key.shape[-2]
        keys, values = (tensor.repeat_interleave(groups, 1).transpose(0, 1) for tensor in own)
        asked = query[first:last].double().transpose(0, 1)
        scores = asked @ keys.transpose(1, 2) * (query.shape[2] ** -0.5 if scale is None else scale)
        distance = torch.arange(used) - (torch.arange(last - first) + used - (last - first)).unsqueeze(1)
        hidden = (distance < -left if left >= 0 else False) | (distance > right if right >= 0 else distance != distance)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()
        output[first:last] = (weights @ values).transpose(0, 1).to(query.dtype)
    return output


KERNELS = {
    "gathered": None,
    "tables": Kernel(varlen_attention, reads_tables=True),
    "runs": Kernel(varlen_attention, reads_tables=False),
}


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_cache, "PAGE", SMALL)
    monkeypatch.setattr(cache_choice, "PAGE", SMALL)
    monkeypatch.setattr(PagedBatch, "unit", SMALL)


def paged(model: Any, slots: int, pages: int, kernel: Kernel | None = None) -> SlotDecoder:
    """A decoder with a pool of pages."""
    decoder = SlotDecoder(model, slots)
    decoder._cache = PagedKVCache(len(decoder._cache._kept), pages * paged_cache.PAGE, kernel)
    decoder._prefixes._cache = decoder._cache
    return decoder


def assert_sound(decoder: SlotDecoder) -> None:
    """Each page is free or in as many tables as it says, and each running answer has room for its longest."""
    cache: Any = decoder._cache
    users = Counter(page for table in cache._tables for page in table)
    assert cache._users == [1, *(users[page] for page in range(1, len(cache._users)))]
    assert cache._free == [page for page in range(len(cache._users)) if not cache._users[page]]
    for running in decoder.running:
        assert len(cache._tables[running.slot]) * paged_cache.PAGE >= running.longest
        assert len(set(cache._tables[running.slot])) == len(cache._tables[running.slot])
    # What is written to next is nobody else's.
    for running in decoder.running:
        for page in cache._tables[running.slot][running.held // paged_cache.PAGE :]:
            assert users[page] == 1


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_answers_are_those_given_alone(
    kind: str, kernel: str, small_pages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_module, "PROMPT_PART", 16)
    monkeypatch.setattr(decoder_module, "PROMPT_TOKENS", 64)
    model = random_model(CONFIGS[kind])
    lengths = [12, 3, 20, 1, 15, 8, 30]
    expected = [greedy(model, prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=True)]
    decoder = paged(model, 4, 20, KERNELS[kernel])
    asked = [RunningSequence(p, Sampling(max_new_tokens=n), frozenset()) for p, n in zip(PROMPTS, lengths, strict=True)]
    assert run(decoder, asked) == expected
    assert_sound(decoder)


@pytest.mark.parametrize("kernel", KERNELS)
def test_adapters_and_losses_are_as_with_slots(kernel: str, small_pages: None) -> None:
    model = adapted()
    names = ["default", "other", BASE, "default", BASE, "other", "default"]
    sampling, found = Sampling(max_new_tokens=20), []
    for opening in (partial(SlotDecoder, model, 4), partial(paged, model, 4, 20, KERNELS[kernel])):
        decoder = opening()
        asked = [RunningSequence(p, sampling, frozenset(), n) for p, n in zip(PROMPTS, names, strict=True)]
        found.append((run(decoder, asked), decoder.loss(PROMPTS[1], PROMPTS[3], "other")))
        decoder.close()
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_course_of_questions_keeps_its_promises(small_pages: None, data: st.DataObject) -> None:
    model = random_model(CONFIGS["qwen2"])
    # No more than the longest question and its answer need, or some more.
    kernel = KERNELS[data.draw(st.sampled_from(sorted(KERNELS)))]
    decoder = paged(model, data.draw(st.integers(1, 4)), data.draw(st.integers(10, 20)), kernel)
    check_any_course(data, model, decoder, longest=140, after=assert_sound)


def test_beginnings_are_shared_and_not_read_again(small_pages: None) -> None:
    model = random_model(CONFIGS["qwen2"])
    decoder, sampling = paged(model, 4, 40), Sampling(max_new_tokens=6)
    beginning = [*range(20, 20 + 3 * SMALL)]
    first = RunningSequence([*beginning, 7, 8], sampling, frozenset())
    run(decoder, [first])
    others = [RunningSequence([*beginning, number], sampling, frozenset()) for number in (9, 10, 11)]
    for other in others:
        decoder.add(other)
    decoder.step()
    assert [other.read for other in others] == [len(beginning) + 1] * 3
    tables = decoder._cache._tables  # type: ignore[attr-defined]
    assert tables[0][:3] == tables[1][:3] == tables[2][:3]
    assert len({tables[slot][3] for slot in range(3)}) == 3
    while not decoder.is_idle:
        decoder.step()
    decoder.close()
    assert [other.tokens for other in others] == [greedy(model, other.prompt, 6) for other in others]


@pytest.mark.parametrize(("kernel", "held"), [("tables", 81), ("runs", 0)])
def test_a_beginning_makes_way_where_its_copy_finds_no_room(small_pages: None, kernel: str, held: int) -> None:
    model = random_model(CONFIGS["qwen2"])
    decoder = paged(model, 2, 10, KERNELS[kernel])
    first = RunningSequence(PROMPTS[5], Sampling(max_new_tokens=12), frozenset())
    run(decoder, [first])
    following = RunningSequence([*first.ids, 5, 6], Sampling(max_new_tokens=60), frozenset())
    decoder.add(following)
    before = decoder._cache.begin
    found: list[int] = []
    decoder._cache.begin = lambda *known: found.append(before(*known)) or found[-1]  # type: ignore[method-assign]
    while not decoder.is_idle:
        decoder.step()
        assert_sound(decoder)
    decoder.close()
    assert found == [held]
    assert following.tokens == greedy(model, following.prompt, 60)


def test_the_pool_is_made_once_and_nothing_in_it_moves(small_pages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made, copies = random_model(CONFIGS["qwen2"]), list[Any](), list[Any]()
    pool, copy = paged_cache._pool, PagedKVCache._copy
    monkeypatch.setattr(paged_cache, "_pool", lambda *arguments: made.append(arguments) or pool(*arguments))
    monkeypatch.setattr(PagedKVCache, "_copy", lambda *arguments: copies.append(arguments) or copy(*arguments))
    decoder = paged(model, 8, 30)
    prompts = [[prompt[0] + place, *prompt] for place, prompt in enumerate(PROMPTS)]  # none begins like another
    for length in (5, 60, 30):
        asked = [RunningSequence(prompt, Sampling(max_new_tokens=length), frozenset()) for prompt in prompts]
        for running in asked:
            decoder.add(running)
        decoder.step()
        decoder.remove(asked[0])
        run(decoder, [])
        size = decoder._cache.size_bytes
        assert size == 31 * SMALL * token_bytes(model)
        decoder._prefixes.forget()
    assert (len(made), copies) == (2 * 2, [])


def test_answers_wait_for_pages_and_one_alone_always_runs(small_pages: None) -> None:
    model = random_model(CONFIGS["qwen3"])
    sampling = Sampling(max_new_tokens=20)
    expected = [greedy(model, prompt, 20) for prompt in PROMPTS]
    asked = [RunningSequence(prompt, sampling, frozenset()) for prompt in PROMPTS]
    needed = sorted(-(-running.longest // SMALL) for running in asked)
    decoder = paged(model, 8, needed[-1])
    for running in asked:
        decoder.add(running)
    most = 0
    while not decoder.is_idle:
        decoder.step()
        assert_sound(decoder)
        most = max(most, len(decoder.running))
    assert 1 < most < len(PROMPTS)
    assert [running.tokens for running in asked] == expected
    assert len(decoder._cache._users) == needed[-1] + 1  # type: ignore[attr-defined]
    decoder.close()
    asked = [RunningSequence(prompt, sampling, frozenset()) for prompt in PROMPTS]
    assert run(paged(model, 8, 1), asked) == expected


def test_a_pool_that_finds_no_memory_is_tried_smaller(small_pages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIGS["qwen2"])
    pool, sampling, room = paged_cache._pool, Sampling(max_new_tokens=12), 50
    expected = [greedy(model, prompt, 12) for prompt in PROMPTS]

    def within_room(like: torch.Tensor, pages: int) -> torch.Tensor:
        held = sum(len(storage) for kept in decoder._cache._kept for storage in kept)
        if held + pages > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pool(like, pages)

    monkeypatch.setattr(paged_cache, "_pool", within_room)
    decoder, sizes = paged(model, 8, 24), list[int]()
    while len(sizes) < 5:
        asked = [RunningSequence(prompt, sampling, frozenset()) for prompt in PROMPTS]
        sizes.append(len(decoder._cache._users))  # type: ignore[attr-defined]
        try:
            assert run(decoder, asked) == expected
            break
        except torch.OutOfMemoryError:  # as the engine does it
            for running in asked:
                decoder.remove(running)
            decoder.reset()
    assert sizes == [25, 13]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_kernel_is_used_if_it_gives_what_sdpa_gives(kind: str) -> None:
    model = random_model(CONFIGS[kind])

    def without_window(*arguments: Any, **settings: Any) -> torch.Tensor:
        return varlen_attention(*arguments, **(settings | {"window_size": (-1, settings["window_size"][1])}))

    def elsewhere(query: Any, key: Any, *arguments: Any, **settings: Any) -> torch.Tensor:
        return varlen_attention(query, key.roll(1, 0), *arguments, **settings)

    def not_at_all(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("paged KV is not supported")

    for reads_tables in (True, False):
        assert works(Kernel(varlen_attention, reads_tables), model)
        for kernel in (without_window, elsewhere, not_at_all):
            assert not works(Kernel(kernel, reads_tables), model)


@pytest.mark.parametrize(
    ("dtype", "capability", "working", "expected"),
    [
        (torch.bfloat16, (9, 0), {True, False}, True),
        (torch.float16, (8, 0), {False}, False),
        (torch.bfloat16, (8, 9), set(), None),
        (torch.float32, (9, 0), {True}, None),
        (torch.float16, (7, 5), {True}, None),
    ],
)
def test_a_gpu_gets_a_pool_within_its_budget(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    capability: tuple[int, int],
    working: set[bool],
    expected: bool | None,
) -> None:
    config = CONFIGS["qwen2"]  # with a context of 512 tokens
    model: Any = types.SimpleNamespace(config=config, dtype=dtype, device=torch.device("cuda"))
    free = 40 * paged_cache.PAGE * token_bytes(model)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2 * free))
    monkeypatch.setattr(cache_choice, "works", lambda kernel, _: kernel.reads_tables in working)
    measured: Any = types.SimpleNamespace(token_bytes=token_bytes(model), states=SlotStates())
    for budget, slots, pages in ((free, 32, 39), (free + 1, 4, 8), (None, 32, 27), (1, 32, 1)):
        cache: Any = make_cache(model, slots, budget, lambda: measured)
        assert cache.tokens == pages * paged_cache.PAGE
        assert cache._kernel == (None if expected is None else Kernel(cache_choice.varlen_attn, expected))
        assert len(cache._users) * paged_cache.PAGE * token_bytes(model) <= max(budget or free, 2 * free / 40)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("reads_tables", [True, False])
def test_torch_s_kernel_takes_the_arguments(count: int, reads_tables: bool) -> None:
    """As far as shapes go: the device "meta" runs what torch has declared of its operator."""
    kernel = Kernel(pytest.importorskip("torch.nn.attention.varlen").varlen_attn, reads_tables)
    numbers = torch.zeros(2, 2, dtype=torch.int32, device="meta")
    batch = PagedBatch([0, 1], [4, 300], [count] * 2, "meta", tables=[[1], [2, 3]], numbers=numbers, kernel=kernel)
    query = torch.zeros(2, 4, batch.width, 16, dtype=torch.bfloat16, device="meta")
    pool = torch.zeros(4, paged_cache.PAGE, 2, 16, dtype=torch.bfloat16, device="meta")
    with OperatorCount() as counted:
        output = batch.attend(query, pool, pool, None, None)
    assert output.shape == (2, batch.width, 4, 16)
    assert counted.names == {"_varlen_attn": 1} | ({} if count == 1 else {"clone": 1})
