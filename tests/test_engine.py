"""The engine: many who ask at once, one model, and nobody's fault or leaving touches the others."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Program
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune.engine.engine import Engine, load_engine
from loratune.engine.request_handle import make_handle
from loratune.engine.sampling import Sampling
from loratune.engine.types import Delta, GenerationRequest
from loratune.errors import Exit, LoratuneError
from tests.conftest import TINY_QWEN

QUESTIONS = ["Who are you?", "What is 2+3?", "Hi", "Tell me about rivers", "你是谁？", "What is the capital of France?"]


@pytest.fixture(scope="module")
def tiny() -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        engine = load_engine([], "tiny-qwen", slots=4)
    engine.model.float()
    yield engine
    engine.close()


def ask(text: str, **sampling: Any) -> GenerationRequest:
    return GenerationRequest([{"role": "user", "content": text}], Sampling(**sampling))


def plain(text: str, tokens: int = 40) -> str:
    """What plain transformers says."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    model = AutoModelForCausalLM.from_pretrained(TINY_QWEN, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_many_questions_get_the_answers_of_plain_transformers(tiny: Engine) -> None:
    expected = {text: plain(text) for text in QUESTIONS}
    asked = QUESTIONS * 5
    answers = dict(tiny.answers(ask(text, max_new_tokens=40) for text in asked))
    assert [answers[index].text for index in range(len(asked))] == [expected[text] for text in asked]
    first = answers[0]
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    assert first.finish == "stop"
    assert first.tokens == len(tokenizer(first.text).input_ids) + 1
    assert first.prompt_tokens == tiny.prompt_tokens(ask(QUESTIONS[0]))


def test_threads_that_ask_at_once_get_their_own_answers(tiny: Engine) -> None:
    found: dict[int, str] = {}

    def client(number: int) -> None:
        pieces = tiny.stream(ask(QUESTIONS[number % len(QUESTIONS)], max_new_tokens=40))
        found[number] = "".join(piece.text for piece in pieces)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {number: plain(text) for number, text in enumerate(QUESTIONS)}
    assert found == {number: expected[number % len(QUESTIONS)] for number in range(18)}


def test_adapters_are_switched_per_question(short_run: Path, random_qwen: Path) -> None:
    engine = load_engine([("run", short_run), ("step", next((short_run / "checkpoints").iterdir()))], None)
    assert engine.adapters == ["run", "step"]
    assert engine.base_name == random_qwen.name

    def said(adapter: str | None, **other: Any) -> str:
        question = GenerationRequest([{"role": "user", "content": "Hi"}], Sampling(max_new_tokens=12), adapter, **other)
        return next(iter(engine.answers([question])))[1].text

    assert said("run") == said("step")  # the last checkpoint is the run's end
    assert said("run") != said(None)
    assert said("run", use_adapter=False) == said(None)  # no settings of its own, so the same prompt
    with pytest.raises(LoratuneError, match="no adapter is called third; there are run, step"):
        said("third")
    engine.close()


def test_a_text_is_a_prompt_as_it_stands(tiny: Engine) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    text = "<|im_start|> rivers and"
    assert tiny.prompt_ids(GenerationRequest(text)) == tokenizer(text, split_special_tokens=True).input_ids


def test_leaving_ends_an_answer_and_no_other(tiny: Engine) -> None:
    long = tiny.stream(ask("Tell me", temperature=5.0, max_new_tokens=1500))
    next(long)
    other = tiny.stream(ask("Who are you?"))
    next(other)
    long.close()
    assert "tiny-qwen" in "".join(piece.text for piece in other)
    told: queue.SimpleQueue[Delta] = queue.SimpleQueue()
    handle = tiny.submit(ask("Tell me", temperature=5.0, max_new_tokens=1500), told.put)
    told.get()
    handle.cancel()
    while not (last := told.get()).finish:
        pass
    assert last.finish == "cancelled"
    assert last.tokens < 1500
    assert tiny.decoder.is_idle


@pytest.mark.parametrize("place", ["push", "finish"])
def test_an_answer_that_cannot_be_read_ends_alone(tiny: Engine, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise TypeError("cannot be read")

    def make_broken(question: GenerationRequest, *rest: Any) -> Any:
        handle = make_handle(question, *rest)
        if question.messages[0]["content"] == "Hi":  # type: ignore[index]
            for name in {"push": ("push", "finish"), "finish": ("finish",)}[place]:
                monkeypatch.setattr(handle.text, name, fail)
        return handle

    monkeypatch.setattr("loratune.engine.engine.make_handle", make_broken)
    told: queue.SimpleQueue[tuple[str, Delta]] = queue.SimpleQueue()
    for text in (QUESTIONS[0], "Hi", QUESTIONS[1]):
        tiny.submit(ask(text), lambda piece, text=text: told.put((text, piece)))  # type: ignore[misc]
    texts, ended = dict.fromkeys((QUESTIONS[0], "Hi", QUESTIONS[1]), ""), dict[str, Delta]()
    while len(ended) < 3:
        text, piece = told.get(timeout=300)
        texts[text] += piece.text
        if piece.finish:
            ended[text] = piece
    assert isinstance(ended["Hi"].error, TypeError)
    assert ended["Hi"].finish == "error"
    for text in (QUESTIONS[0], QUESTIONS[1]):
        assert (texts[text], ended[text].error) == (plain(text), None)
    assert "".join(piece.text for piece in tiny.stream(ask(QUESTIONS[0]))) == plain(QUESTIONS[0])


def test_a_listener_that_fails_costs_nobody_else_anything(tiny: Engine) -> None:
    def broken(_: Delta) -> None:
        raise ZeroDivisionError("broken")

    tiny.submit(ask("Tell me", temperature=5.0, max_new_tokens=1500), broken)
    assert "tiny-qwen" in "".join(piece.text for piece in tiny.stream(ask("Who are you?")))


def test_prompts_that_do_not_fit_are_told_at_once(tiny: Engine) -> None:
    with pytest.raises(LoratuneError, match="context has 2,048; shorten it") as caught:
        list(tiny.stream(ask("long " * 3000)))
    assert caught.value.exit_code == Exit.USAGE
    with pytest.raises(LoratuneError, match="the prompt is empty"):
        list(tiny.stream(GenerationRequest("")))


def test_an_answer_ends_where_the_context_does(tiny: Engine) -> None:
    question = ask("a b c " * 600, temperature=5.0, max_new_tokens=100_000, seed=1)
    used = tiny.prompt_tokens(question)
    assert used < 2048
    (answer,) = (answer for _, answer in tiny.answers([question]))
    assert answer.finish in ("length", "stop")
    assert used + answer.tokens <= 2048


def test_a_failure_reaches_all_who_wait_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine([], "tiny-qwen", slots=2)
    forward = engine.model.forward
    monkeypatch.setattr(engine.model, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(engine.stream(ask("hi")))
    with pytest.raises(ZeroDivisionError):
        list(engine.answers(ask("hi") for _ in range(9)))

    def without_memory(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(engine.model, "forward", without_memory)
    with pytest.raises(LoratuneError, match="out of memory") as caught:
        list(engine.stream(ask("hi")))
    assert caught.value.exit_code == Exit.IO
    monkeypatch.setattr(engine.model, "forward", forward)
    assert "tiny-qwen" in "".join(piece.text for piece in engine.stream(ask("Who are you?")))
    engine.close()


def test_closing_ends_what_runs() -> None:
    engine = load_engine([], "tiny-qwen")
    pieces: queue.SimpleQueue[Delta] = queue.SimpleQueue()
    for _ in range(40):
        engine.submit(ask("Tell me", temperature=5.0, max_new_tokens=1500), pieces.put)
    engine.close()
    ends = []
    while not pieces.empty():
        if finish := pieces.get().finish:
            ends.append(finish)
    assert ends == ["cancelled"] * 40


def test_the_likelier_answer_has_the_smaller_loss(tiny: Engine) -> None:
    right, tokens = tiny.reference_loss(ask("What is 2+3?"), "2+3 = 5.")
    wrong, _ = tiny.reference_loss(ask("What is 2+3?"), "2+3 = 6.")
    assert 0 < right < 0.1 < wrong
    assert tokens == len(AutoTokenizer.from_pretrained(TINY_QWEN)("2+3 = 5.").input_ids) + 1


def test_threads_that_ask_at_once_do_not_disturb_each_other_s_token_ids(tiny: Engine) -> None:
    asked = [ask(f"{number} <|im_end|> {'word ' * number}") for number in range(40)]
    raw = [GenerationRequest(f"{number} <|im_start|> {'word ' * number}") for number in range(40)]
    expected = [tiny.prompt_ids(question) for question in (*asked, *raw)]
    wrong: list[int] = []

    def read() -> None:
        for _ in range(10):
            for number, question in enumerate((*asked, *raw)):
                if tiny.prompt_ids(question) != expected[number]:
                    wrong.append(number)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_program_may_end_while_answers_are_on_their_way(start: Callable[..., Program]) -> None:
    program = start(
        code="from loratune.engine.engine import load_engine\n"
        "from loratune.engine.types import GenerationRequest, Sampling\n"
        "engine = load_engine([], 'tiny-qwen')\n"
        "asked = GenerationRequest('Tell me', Sampling(temperature=5.0, max_new_tokens=1500))\n"
        "engine.submit(asked, lambda piece: None)\n"
    )
    assert program.exit_code() == 0, program.stderr
