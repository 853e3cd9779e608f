"""Continuous batching says what `generate` says to each prompt alone, and draws as transformers' own warpers do."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import pytest
import torch
from decoding import CONFIGS, PROMPTS, SIZES, adapted, check_any_course, greedy, random_model, run, token_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import shortlisted
from torch.nn import functional
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    Qwen2Config,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loratune.engine import kv_cache, slot_decoder, token_choice
from loratune.engine import scheduler as decoder_module
from loratune.engine.sampling import Sampling
from loratune.engine.sequence import RunningSequence
from loratune.engine.slot_decoder import SlotDecoder
from loratune.engine.token_choice import BatchChooser, TokenChooser
from loratune.errors import LoratuneError
from loratune.model.adapter.own_parameters import BASE


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("slots", [2, 8])
def test_answers_in_a_batch_are_those_given_alone(kind: str, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "PROMPT_PART", 16)  # most prompts are read in several parts
    monkeypatch.setattr(decoder_module, "PROMPT_TOKENS", 64)
    model = random_model(CONFIGS[kind])
    lengths = [12, 3, 20, 1, 15, 8, 30]
    expected = [greedy(model, prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=True)]
    decoder = SlotDecoder(model, slots)
    asked = [RunningSequence(p, Sampling(max_new_tokens=n), frozenset()) for p, n in zip(PROMPTS, lengths, strict=True)]
    assert run(decoder, asked) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    assert [running.finish for running in asked] == ["length"] * len(asked)


def test_end_tokens_end_an_answer_and_an_answer_may_be_taken_out_of_the_middle() -> None:
    model = random_model(CONFIGS["qwen2"])
    free = [greedy(model, prompt, 20) for prompt in PROMPTS]
    ends = {free[1][4], free[3][7]}
    expected = [greedy(model, prompt, 20, sorted(ends)) for prompt in PROMPTS]
    assert len({len(tokens) for tokens in expected}) > 1
    decoder = SlotDecoder(model, slots=4)
    asked = [RunningSequence(prompt, Sampling(max_new_tokens=20), frozenset(ends)) for prompt in PROMPTS]
    for running in asked:
        decoder.add(running)
    decoder.step()
    decoder.step()
    decoder.remove(asked[0])  # runs
    decoder.remove(asked[6])  # waits
    while not decoder.is_idle:
        decoder.step()
    assert [running.tokens for running in asked[1:6]] == expected[1:6]
    assert len(asked[0].tokens) == 2
    assert asked[6].tokens == []
    assert [running.finish == "stop" for running in asked[1:6]] == [tokens[-1] in ends for tokens in expected[1:6]]


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_in_one_batch_do_not_mix(settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    names = ["default", "other", BASE, "default", BASE, "other", "default"]
    expected = []
    for prompt, name in zip(PROMPTS, names, strict=True):
        model.base_model.set_adapter("default" if name == BASE else name)
        if name == BASE:
            with model.disable_adapter():
                expected.append(greedy(model, prompt, 10))
        else:
            expected.append(greedy(model, prompt, 10))
    decoder = SlotDecoder(model, slots=4)
    sampling = Sampling(max_new_tokens=10)
    asked = [RunningSequence(prompt, sampling, frozenset(), name) for prompt, name in zip(PROMPTS, names, strict=True)]
    assert run(decoder, asked) == expected
    # One after the other, which switches adapters rather than mixing them.
    asked = [RunningSequence(prompt, sampling, frozenset(), name) for prompt, name in zip(PROMPTS, names, strict=True)]
    assert [run(decoder, [running])[0] for running in asked] == expected
    with model.disable_adapter():
        assert expected[0] != greedy(model, PROMPTS[0], 10)


def test_the_loss_of_an_answer_is_that_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "PROMPT_PART", 16)
    model = adapted()
    for prompt, answer in ((PROMPTS[1], PROMPTS[3]), (PROMPTS[0], [7]), (PROMPTS[2], PROMPTS[5])):
        model.set_adapter("other")
        model.get_base_model().set_attn_implementation("eager")
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        expected = float(functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").detach())
        decoder = SlotDecoder(model)
        assert decoder.loss(prompt, answer, "other") == pytest.approx(expected, rel=1e-5)
        assert decoder.loss(prompt, answer) != pytest.approx(expected, rel=1e-3)
        decoder.close()  # the adapters are on again


def test_what_is_drawn_does_not_depend_on_what_else_runs() -> None:
    model = random_model(CONFIGS["qwen2"])
    hot = Sampling(temperature=2.0, top_p=0.9, seed=7, max_new_tokens=12)
    decoder = SlotDecoder(model, slots=8)
    (alone,) = run(decoder, [RunningSequence(PROMPTS[1], hot, frozenset())])
    others = [RunningSequence(p, Sampling(temperature=2.0, max_new_tokens=9, seed=3), frozenset()) for p in PROMPTS]
    together = run(decoder, [*others, RunningSequence(PROMPTS[1], hot, frozenset())])
    assert together[-1] == alone
    assert run(
        decoder, [RunningSequence(PROMPTS[1], Sampling(temperature=2.0, seed=8, max_new_tokens=12), frozenset())]
    ) != [alone]


HOT = [
    Sampling(temperature=2.0, seed=3),
    Sampling(temperature=0.7, top_k=20, top_p=0.8, seed=4, repetition_penalty=1.3),
    Sampling(temperature=1.5, top_p=0.9, seed=5),
    Sampling(temperature=1.0, min_p=0.05, seed=6),
    Sampling(repetition_penalty=1.2),
    Sampling(),
    Sampling(temperature=1.0, top_k=20, seed=7),
    Sampling(temperature=0.7, top_k=20, top_p=0.95, seed=8),
]


def drawn_alone(sampling: Sampling, prompt: list[int], scores: torch.Tensor) -> list[int]:
    """The tokens for successive scores [steps, vocabulary], by transformers' warpers and torch's own sampling."""
    said, generator = [*prompt], torch.Generator().manual_seed(sampling.seed or 0)
    warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty or 1))])
    if sampling.temperature:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p and sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    for row in scores:
        left, ids = warpers(torch.tensor([said]), row[None].clone())[0].sort(descending=True)
        kept = left.softmax(-1)[left > -torch.inf]
        draw = torch.multinomial(kept, 1, generator=generator) if sampling.temperature else kept.argmax()
        said.append(int(ids[draw]))
    return said[len(prompt) :]


@pytest.mark.parametrize("vocabulary", [50, 3000])
def test_answers_chosen_together_are_those_that_torch_draws_for_each_alone(vocabulary: int) -> None:
    """Also for a seed of an earlier version, which drew each answer's tokens by themselves."""
    torch.manual_seed(0)
    # A top_p of 1 cuts the end of a wide distribution, where the sum of all before is rounded to 1.
    settled = [one.with_defaults(None) for one in HOT if vocabulary < 1000 or one.seed != 3]
    scores = torch.randn(len(settled), 90, vocabulary) * 3
    expected = [drawn_alone(one, PROMPTS[0], row) for one, row in zip(settled, scores, strict=True)]
    choosers = [TokenChooser(one, PROMPTS[0], "cpu") for one in settled]
    batch, tokens = BatchChooser("cpu"), [list[int]() for _ in settled]
    for step in range(90):
        # Some pause now and then, so that the others are a batch of their own.
        rows = [row for row in range(len(settled)) if len(tokens[row]) < 90 and (step + row) % 7]
        logits = torch.stack([scores[row, len(tokens[row])] for row in rows])
        chosen = batch.choose([choosers[row] for row in rows], [tokens[row] for row in rows], logits)
        for row, token in zip(rows, chosen, strict=True):
            tokens[row].append(token)
    assert all(len(own) > 70 for own in tokens)
    assert tokens == [whole[: len(own)] for whole, own in zip(expected, tokens, strict=True)]


def test_scores_that_are_not_numbers_draw_no_token() -> None:
    choosers = [TokenChooser(one.with_defaults(None), [1], "cpu") for one in (HOT[0], HOT[5])]
    batch = BatchChooser("cpu")
    with pytest.raises(LoratuneError, match="not numbers"):
        batch.choose(choosers, [[], []], torch.full((2, 9), torch.nan))
    assert len(batch.choose(choosers, [[], []], torch.zeros(2, 9))) == 2


def test_the_model_s_own_generation_settings_hold_where_nothing_is_said() -> None:
    model = random_model(CONFIGS["qwen2"])
    model.generation_config = GenerationConfig(repetition_penalty=1.7)
    # generate counts the prompt's tokens as well.
    expected = greedy(model, PROMPTS[1], 25)
    without = greedy(model, PROMPTS[1], 25, repetition_penalty=1.0)
    assert expected != without
    decoder = SlotDecoder(model)
    asked = [RunningSequence(PROMPTS[1], Sampling(max_new_tokens=25), frozenset())]
    asked += [RunningSequence(PROMPTS[1], Sampling(max_new_tokens=25, repetition_penalty=1.0), frozenset())]
    assert run(decoder, asked) == [expected, without]
    config = GenerationConfig(top_k=20, top_p=0.8)
    assert Sampling(top_k=0).with_defaults(config) == Sampling(top_k=0, top_p=0.8, min_p=0.0, repetition_penalty=1.0)


@settings(max_examples=60, deadline=None)
@given(
    temperature=st.floats(0.1, 5),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 3000),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 1000),
    width=st.sampled_from([1, 7, 500, 2500]),
    spread=st.sampled_from([0.01, 1.0, 20.0]),
)
def test_the_shortlist_is_what_transformers_warpers_leave(
    temperature: float, top_p: float, top_k: int, min_p: float, seed: int, width: int, spread: float
) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(width) * spread
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    ids, probabilities = shortlisted(scores, sampling)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    warpers.append(TopPLogitsWarper(top_p))
    warpers.append(MinPLogitsWarper(min_p))
    expected = warpers(None, scores[None])[0].softmax(-1)  # type: ignore[arg-type]
    found = torch.zeros(width).index_put((ids,), probabilities)
    # At the border of top-p or min-p a rounding may decide about one token; what it could weigh is bounded.
    border = max(float(probabilities.min()), float(expected[expected > 0].min()))
    assert float((found - expected).abs().max()) <= 1e-5 + 2 * border * ((found > 0) != (expected > 0)).any()


def test_a_flat_distribution_is_looked_at_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_choice, "_CANDIDATES", 8)
    scores = torch.linspace(0, 0.1, 100)  # -ln 0.99 is 9.9 of its steps
    neutral = Sampling(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
    assert len(shortlisted(scores, neutral)[0]) == 100
    assert 49 <= len(shortlisted(scores, Sampling(temperature=1.0, top_p=0.5, top_k=0, min_p=0.0))[0]) <= 51
    assert len(shortlisted(scores, Sampling(temperature=1.0, top_p=1.0, top_k=30, min_p=0.0))[0]) == 30
    assert len(shortlisted(scores, Sampling(temperature=1.0, top_p=1.0, top_k=0, min_p=0.99))[0]) == 10


def test_the_penalty_is_transformers_and_leaves_the_logits_alone() -> None:
    torch.manual_seed(0)
    logits, prompt = torch.randn(50), [3, 3, 9]
    choosers, batch = [TokenChooser(Sampling(repetition_penalty=10.0), prompt, "cpu")], BatchChooser("cpu")
    before, said = logits.clone(), list(prompt)
    for _ in range(80):  # more than room is made for at once
        penalised = RepetitionPenaltyLogitsProcessor(10.0)(torch.tensor([said]), logits[None].clone())
        (token,) = batch.choose(choosers, [said[len(prompt) :]], logits[None])
        assert token == int(penalised.argmax())
        said.append(token)
    assert torch.equal(logits, before)


def test_draws_follow_the_probabilities() -> None:
    chooser = TokenChooser(Sampling(temperature=1.0, top_p=1.0, seed=5, repetition_penalty=1.0), [1], "cpu")
    probabilities, batch = torch.tensor([0.6, 0.3, 0.1]), BatchChooser("cpu")
    draws = torch.tensor([batch.choose([chooser], [[]], probabilities.log()[None]) for _ in range(4000)])[:, 0]
    assert torch.allclose(draws.bincount(minlength=3) / 4000, probabilities, atol=0.03)


def test_memory_of_keys_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_decoder, "KEPT_BYTES", 1000)
    model = random_model(CONFIGS["qwen2"])
    decoder = SlotDecoder(model)
    decoder.add(RunningSequence(PROMPTS[1], Sampling(max_new_tokens=3), frozenset()))
    decoder.step()
    assert decoder._cache.size_bytes > 1000
    while not decoder.is_idle:
        decoder.step()
    assert decoder._cache.size_bytes == 0


def test_answers_wait_where_keys_and_values_would_take_too_much() -> None:
    model = random_model(CONFIGS["qwen3"])
    assert token_bytes(model) == 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head size, float32
    sampling = Sampling(max_new_tokens=20)
    expected = [greedy(model, prompt, 20) for prompt in PROMPTS]
    bound = 4 * 128 * token_bytes(model)  # four answers of 128 tokens; eight of 64
    decoder = SlotDecoder(model, slots=8, cache_budget_bytes=bound)
    assert decoder.filled_cache().token_bytes == token_bytes(model)
    asked = [RunningSequence(prompt, sampling, frozenset()) for prompt in PROMPTS]
    for running in asked:
        decoder.add(running)
    most = 0
    while not decoder.is_idle:
        decoder.step()
        most = max(most, len(decoder.running))
    assert [running.tokens for running in asked] == expected
    assert 4 <= most < len(PROMPTS)
    assert decoder._cache.size_bytes <= bound
    alone = SlotDecoder(model, slots=8, cache_budget_bytes=1)  # one at a time always runs
    asked = [RunningSequence(prompt, sampling, frozenset()) for prompt in PROMPTS]
    assert run(alone, asked) == expected


def test_memory_that_runs_out_while_the_cache_grows_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIGS["qwen2"])
    expected = [greedy(model, prompt, 12) for prompt in PROMPTS]
    decoder = SlotDecoder(model, slots=8)
    sampling = Sampling(max_new_tokens=12)
    first, *others = (RunningSequence(prompt, sampling, frozenset()) for prompt in PROMPTS)
    decoder.add(first)
    decoder.step()
    storage, made = kv_cache._storage, 0

    def fail_in_the_middle(*arguments: Any) -> torch.Tensor:
        nonlocal made
        made += 1
        if made == 4:  # keys and values of the first layer have grown, and the keys of the second
            raise torch.OutOfMemoryError("CUDA out of memory")
        return storage(*arguments)

    monkeypatch.setattr(kv_cache, "_storage", fail_in_the_middle)
    for running in others:
        decoder.add(running)
    with pytest.raises(torch.OutOfMemoryError):
        decoder.step()
    for running in list(decoder.running)[1:]:
        decoder.remove(running)
    decoder.waiting.clear()
    monkeypatch.setattr(kv_cache, "_storage", storage)
    while not first.finish:
        decoder.step()
    assert first.tokens == expected[0]
    decoder.reset()
    assert decoder._cache.size_bytes == 0
    assert run(decoder, [RunningSequence(prompt, sampling, frozenset()) for prompt in PROMPTS]) == expected


def test_growing_holds_one_old_tensor_beside_the_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = kv_cache.BatchedKVCache(4)
    cache.reserve(1, 64)
    new = torch.ones(1, 2, 1, 8)
    for layer in range(4):
        cache.feed = kv_cache.ForwardBatch([0], [0], [1], torch.device("cpu"))
        cache.update(new, new, layer)
    storage, alive, most = kv_cache._storage, weakref.WeakSet[Any](), 0

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal most
        made = storage(*arguments)
        alive.add(made)
        held = [tensor for kept in cache._kept for tensor in kept]
        most = max(most, sum(tensor.nbytes for tensor in {*held, *alive}))
        return made

    monkeypatch.setattr(kv_cache, "_storage", counted)
    cache.reserve(1, 640)
    one = 2 * 640 * 8 * 4
    assert cache.size_bytes == 8 * one
    assert most <= 8 * one + one / 10


def test_a_chat_alone_takes_the_memory_of_one() -> None:
    assert [kv_cache.reserved_tokens(slots, 64) // 64 for slots in (1, 2, 4, 5, 9)] == [1, 4, 4, 8, 12]


@pytest.mark.parametrize("layers", [2, 6])
def test_a_step_copies_few_tensors_to_the_device_however_many_layers(
    layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU waits for each such copy: one for places and lengths, one for the tokens."""
    model = random_model(Qwen2Config(**(SIZES | {"num_hidden_layers": layers})))
    decoder = SlotDecoder(model, slots=8)
    asked = [RunningSequence(prompt, Sampling(max_new_tokens=9), frozenset()) for prompt in PROMPTS[:3]]
    for running in asked:
        decoder.add(running)
    while not all(running.tokens for running in asked):
        decoder.step()
    decoder.remove(asked[1])
    copies, plain = 0, torch.tensor

    def counted(*arguments: Any, **settings: Any) -> torch.Tensor:
        nonlocal copies
        copies += 1
        return plain(*arguments, **settings)

    monkeypatch.setattr(torch, "tensor", counted)
    decoder.step()
    assert 0 < copies <= 2


def test_a_temperature_near_zero_takes_the_likeliest_token() -> None:
    model = random_model(CONFIGS["qwen2"])
    (tokens,) = run(
        SlotDecoder(model), [RunningSequence(PROMPTS[1], Sampling(temperature=1e-300, max_new_tokens=9), frozenset())]
    )
    assert tokens == greedy(model, PROMPTS[1], 9)


def read_tokens(decoder: SlotDecoder, asked: list[RunningSequence]) -> int:
    """How many prompt tokens were put through the model for these."""
    read = 0
    forward = decoder._pass

    def counted(cache: Any, feed: Any, *rest: Any, **more: Any) -> Any:
        nonlocal read
        read += sum(feed.counts)
        return forward(cache, feed, *rest, **more)

    decoder._pass = counted  # type: ignore[method-assign]
    run(decoder, asked)
    decoder._pass = forward  # type: ignore[method-assign]
    return read - sum(len(running.tokens) - 1 for running in asked)


def test_what_a_conversation_has_said_is_not_read_again() -> None:
    model = adapted()
    decoder, sampling = SlotDecoder(model, slots=4), Sampling(max_new_tokens=10)
    turns: dict[str, list[int]] = {"default": PROMPTS[1], BASE: PROMPTS[1], "other": PROMPTS[5]}
    for turn in range(4):
        asked = {name: RunningSequence(prompt, sampling, frozenset(), name) for name, prompt in turns.items()}
        read = read_tokens(decoder, list(asked.values()))
        alone = {name: RunningSequence(prompt, sampling, frozenset(), name) for name, prompt in turns.items()}
        for name, running in alone.items():
            fresh = SlotDecoder(model, slots=1)
            assert run(fresh, [running]) == [asked[name].tokens]
            fresh.close()
        decoder._adapters._selected = None  # the others have switched the model's adapters
        if turn:
            # The last token of each answer, and the next question; one conversation's slot may have been taken.
            assert read <= 3 * (1 + len(PROMPTS[3])) + max(map(len, turns.values()))
        turns = {name: [*running.ids, *PROMPTS[3]] for name, running in asked.items()}


def test_a_beginning_that_a_running_answer_has_read_is_not_read_again() -> None:
    model, sampling = random_model(CONFIGS["qwen2"]), Sampling(max_new_tokens=30)
    decoder, beginning = SlotDecoder(model, slots=4), PROMPTS[1]
    first = RunningSequence([*beginning, 3, 4], sampling, frozenset())
    decoder.add(first)
    decoder.step()
    others = [RunningSequence([*beginning, 9, number], sampling, frozenset()) for number in (7, 8)]
    running_on = sampling.max_new_tokens - 1  # one token of the first answer is there
    assert read_tokens(decoder, others) - running_on == 2 + 2  # what is new in each
    assert [one.tokens for one in (first, *others)] == [greedy(model, one.prompt, 30) for one in (first, *others)]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_course_of_questions_gets_the_answers_given_alone(data: st.DataObject) -> None:
    model = shared_model()
    decoder = SlotDecoder(model, slots=data.draw(st.integers(1, 3)))
    check_any_course(data, model, decoder)


@functools.cache
def shared_model() -> Any:
    return random_model(CONFIGS["qwen2"])
