"""Every family says what transformers' `generate` says to each prompt alone, whichever decoder it gets."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import CONFIGS as DENSE
from decoding import check_any_course, greedy, random_model, run
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import CONFIGS, make_tiny_model
from torch.nn import functional

from loratune.engine import decoder_choice, forward_batch, paged_cache, scheduler
from loratune.engine.decoder_choice import open_decoder
from loratune.engine.forward_batch import ForwardBatch
from loratune.engine.paged_cache import PagedBatch, PagedKVCache
from loratune.engine.plain_decoder import PlainDecoder
from loratune.engine.prefix_cache import PrefixCache, _common
from loratune.engine.sampling import Sampling
from loratune.engine.scheduler import PROMPT_PART, Decoder
from loratune.engine.sequence import RunningSequence
from loratune.engine.slot_decoder import SlotDecoder
from loratune.engine.slot_states import SlotStates
from loratune.errors import LoratuneError
from loratune.model.adapter.own_parameters import BASE
from loratune.model.architecture.cache_argument import cache_argument
from loratune.model.architecture.structure import output_layer
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
    assert not output_layer(model)._forward_pre_hooks
    assert greedy(model, asked[0], 8) == expected[0]


def test_layers_that_share_keys_and_heads_of_several_sizes(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    model = tiny(
        "gemma4_text", tmp_path, num_hidden_layers=4, layer_types=kinds, num_kv_shared_layers=2, global_head_dim=16
    )
    asked = prompts()
    expected = [greedy(model, prompt, 8) for prompt in asked]
    decoder = open_decoder(model, slots=3)
    assert isinstance(decoder, SlotDecoder)
    assert answer(decoder, asked, 8) == expected
    # Two layers keep keys and values of two heads of 8 and of 16 numbers.
    assert decoder.filled_cache().token_bytes == 2 * 2 * (8 + 16) * 4


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
    paths = (path for path, _ in model.named_modules() if "vision" not in path)
    names = [path for path in paths if path.rpartition(".")[2] in ADAPTED]
    torch.manual_seed(4)
    wide, narrow = (LoraConfig(r=rank, lora_alpha=32, target_modules=names, init_lora_weights=False) for rank in (4, 2))
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


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # which PEFT sets itself
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
    assert max(abs(loss - losses[-1]) for loss in losses) > 1e-4 * losses[-1]


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


HYBRIDS = [
    pytest.param("qwen3_5_text"),
    pytest.param("granitemoehybrid"),
    pytest.param("lfm2", marks=pytest.mark.slow),
    pytest.param("qwen3_next", marks=pytest.mark.slow),
]


def course(
    model: Any, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[SlotDecoder], object] = id
) -> tuple[list[list[int]], list[list[int]]]:
    """What a hybrid says, and what it should say, in a course in which slots are taken over, moved and shared."""
    start, other = prompts()[1], prompts()[6]
    asked = [start, other, [*start, 9], [*start[:20], 8, 7], other[:5], [*other[:9], 6], prompts()[3]]
    lengths = [9, 3, 6, 8, 2, 7, 5]
    decoder = SlotDecoder(model, slots=3)
    prepare(decoder)
    running = [RunningSequence(p, Sampling(max_new_tokens=n), frozenset()) for p, n in zip(asked, lengths, strict=True)]
    run(decoder, running)
    more = [[*running[3].ids, 5, 6], [*running[5].ids, 5], [4, 1], [*running[4].prompt, *prompts()[5]]]
    following = [RunningSequence(prompt, Sampling(max_new_tokens=6), frozenset()) for prompt in more]
    monkeypatch.setattr(scheduler, "PROMPT_TOKENS", 1)  # one prompt per step
    for one in following:
        decoder.add(one)
    decoder.step()
    decoder.remove(following[0])  # and one of which nothing was read yet takes its slot
    run(decoder, [])
    monkeypatch.setattr(scheduler, "PROMPT_TOKENS", 2048)
    monkeypatch.setattr(scheduler, "PROMPT_PART", 100)
    apart = [RunningSequence(prompts()[place], Sampling(max_new_tokens=9), frozenset()) for place in (5, 4, 3)]
    run(decoder, apart)  # the first and the third are answered while the second is read
    decoder.close()
    every = [*running, *following, *apart]
    return [one.tokens for one in every], [greedy(model, one.prompt, len(one.tokens)) for one in every]


@pytest.mark.parametrize("kind", HYBRIDS)
def test_slots_with_states_are_taken_over_moved_and_shared(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, expected = course(tiny(kind, tmp_path), monkeypatch)
    assert said == expected


@pytest.mark.parametrize("pages", [40, 9])
def test_states_beside_pages_are_those_beside_slots(
    pages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_cache, "PAGE", 64)
    monkeypatch.setattr(PagedBatch, "unit", 64)

    def on_pages(decoder: SlotDecoder) -> None:
        decoder._cache = PagedKVCache(2, pages * 64, has_states=True)
        decoder._prefixes._cache = decoder._cache

    said, expected = course(tiny("qwen3_5_text", tmp_path), monkeypatch, on_pages)
    assert said == expected


def begin_with_what_is_there(states: SlotStates, slot: int, source: int | None) -> None:
    BEGIN(states, slot, slot if source is None else source)


def fill_up(batch: ForwardBatch, *where: Any, **_: Any) -> None:
    MAKE(batch, *where[:4])


BEGIN, MAKE = SlotStates.begin, ForwardBatch.__init__
FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "states are not zeroed": (SlotStates, "begin", begin_with_what_is_there),
    "states are not moved": (SlotStates, "move", lambda *_: None),
    "states that are changed in place are lost": (SlotStates, "take_back", lambda *_: None),
    "a beginning is used in part": (PrefixCache, "_usable", lambda _, prompt, ids: _common(prompt[:-1], ids)),
    "rows are filled up": (ForwardBatch, "__init__", fill_up),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_states_are_seen(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    said, expected = course(tiny("qwen3_5_text", tmp_path), monkeypatch)
    assert said != expected


def test_a_conversation_with_states_reads_what_is_new(tmp_path: Path) -> None:
    decoder, read = SlotDecoder(tiny("qwen3_5_text", tmp_path), slots=2), list[int]()
    forward = decoder._logits
    decoder._logits = lambda rows, new: read.append(sum(map(len, new))) or forward(rows, new)  # type: ignore[method-assign]
    first = RunningSequence(prompts()[1], Sampling(max_new_tokens=6), frozenset())
    run(decoder, [first])
    for new in ([7, 8, 9], [5]):
        read.clear()
        asked = RunningSequence([*first.ids, *new], Sampling(max_new_tokens=4), frozenset())
        run(decoder, [asked])
        assert read == [1 + len(new), 1, 1, 1]  # the last token of the answer, and what is new
        first = asked
    read.clear()
    run(decoder, [RunningSequence([*first.ids[:-3], 3], Sampling(max_new_tokens=1), frozenset())])
    assert read == [len(first.ids) - 2]


@pytest.mark.parametrize(("spare", "most"), [(0, 4), (-1, 1)])
def test_answers_wait_where_states_would_take_too_much(spare: int, most: int, tmp_path: Path) -> None:
    model = tiny("qwen3_5_text", tmp_path)
    # A layer keeps two heads of 16 numbers; another one four inputs of 64 channels, and four heads of 8 · 8 numbers.
    token, states = 2 * 2 * 16 * 4, (4 * 64 + 4 * 8 * 8) * 4
    decoder = SlotDecoder(model, slots=8, cache_budget_bytes=4 * (64 * token + states) + spare)
    measured = decoder.filled_cache()
    assert (measured.token_bytes, measured.states.slot_bytes) == (token, states)
    asked, at_once = [prompt[:50] for prompt in prompts()], 0
    for prompt in asked:
        decoder.add(RunningSequence(prompt, Sampling(max_new_tokens=3), frozenset()))
    while not decoder.is_idle:
        decoder.step()
        at_once = max(at_once, len(decoder.running))
    assert at_once == most


@settings(max_examples=12, deadline=None)
@given(st.data())
@pytest.mark.parametrize("opening", [PlainDecoder, SlotDecoder])
def test_any_course_of_questions_gets_the_answers_given_alone(opening: Callable[..., Decoder], data: Any) -> None:
    model = shared_model()
    decoder = opening(model, slots=data.draw(st.integers(1, 3)))
    check_any_course(data, model, decoder)


@functools.cache
def shared_model() -> Any:
    return tiny("qwen3_5_text", Path(tempfile.mkdtemp()))


ATTEND = forward_batch.attend_slots


def without_window(*where: Any, sliding_window: int | None = None, **given: Any) -> Any:
    return ATTEND(*where, **given)


def with_another_scale(*where: Any, scaling: float, **given: Any) -> Any:
    return ATTEND(*where, scaling=1.1 * scaling, **given)


def failing(*_: Any, **__: Any) -> Any:
    raise KeyError("a surprise")


CHOICES: dict[str, tuple[str, tuple[Any, str, Callable[..., Any]], str]] = {
    "no window": ("gemma3_text", (forward_batch, "attend_slots", without_window), "a window of no limit, and its conf"),
    "another scale": ("qwen2", (forward_batch, "attend_slots", with_another_scale), "logits that are off by"),
    "an exception": ("qwen2", (forward_batch, "attend_slots", failing), "KeyError: 'a surprise'"),
    "rows that are filled up": ("qwen3_5_text", (ForwardBatch, "__init__", fill_up), "logits that are off by"),
    "states that are lost": ("lfm2", (SlotStates, "write", lambda *_: None), "logits that are off by"),
}


@pytest.mark.parametrize("fault", CHOICES)
def test_a_decoder_that_is_wrong_is_not_chosen(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, planted, reason = CHOICES[fault]
    model = tiny(kind, tmp_path)
    attention = model.config._attn_implementation
    decoder = open_decoder(model, slots=3)
    assert isinstance(decoder, SlotDecoder)
    decoder.close()
    monkeypatch.setattr(*planted)
    decoder = open_decoder(model, slots=3)
    assert isinstance(decoder, PlainDecoder)
    assert reason in str(decoder.notice)
    asked = prompts()[:4]
    assert answer(decoder, asked, 4) == [greedy(model, prompt, 4) for prompt in asked]
    decoder.close()
    model.set_attn_implementation(attention)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "the longest sequence"),
        ({"layer_types": ["indexed_attention", "full_attention"]}, "DynamicIndexedLayer"),
    ],
)
def test_what_a_few_tokens_cannot_show_is_read_from_the_config(changes: dict[str, Any], reason: str) -> None:
    model = random_model(DENSE["llama"])
    for name, value in changes.items():
        setattr(model.config, name, value)
    assert reason in str(open_decoder(model).notice)


def test_a_model_with_a_cache_of_its_own_is_refused_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(DENSE["llama"])
    forward = model.forward

    def fail_with_a_cache(*inputs: Any, **given: Any) -> Any:
        if given.get(cache_argument(model)) is not None:
            raise ValueError("a cache of its own, please")
        return forward(*inputs, **given)

    monkeypatch.setattr(model, "forward", fail_with_a_cache)
    with pytest.raises(LoratuneError, match="LlamaForCausalLM cannot be decoded by loratune"):
        open_decoder(model)
    assert not output_layer(model)._forward_pre_hooks
    assert model.config._attn_implementation == "sdpa"


def test_rounding_does_not_make_a_decoder_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3_5_moe_text", tmp_path, dtype=torch.bfloat16)
    monkeypatch.setattr(decoder_choice, "_tolerance", lambda *_: -1.0)  # on some CPUs, nothing is rounded otherwise
    decoder = open_decoder(model)
    assert isinstance(decoder, SlotDecoder)
    decoder.close()
    monkeypatch.setattr(decoder_choice, "_rounding", lambda *_: -1.0)
    assert isinstance(open_decoder(model), PlainDecoder)


def test_memory_that_runs_out_in_the_trial_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(SlotDecoder, "score", fail)
    model = random_model(DENSE["llama"])
    with pytest.raises(MemoryError):
        open_decoder(model)
    assert model.config._attn_implementation == "sdpa"
