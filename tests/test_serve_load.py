"""`loratune serve` with many clients at once: every answer is the one given alone, and nobody waits for another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import Served, benchmark_figures, events, served

from loratune.engine.engine import load_engine

TEXTS = ["Once upon a time", "The river", "def main():", "从前", "1 2 3 4", "Dear all,"]


@pytest.fixture(scope="module")
def running() -> Iterator[Served]:
    engine = load_engine([], "tiny-qwen", slots=4)
    engine.model.float()  # a draw between tokens that are as likely could fall to the rounding of bfloat16
    with served(engine, slots=4, waiting=100) as one:
        yield one
    engine.close()


def bodies() -> list[dict[str, Any]]:
    """Texts to be continued for 4 to 24 tokens, by the likeliest token or by chance."""
    plain = [{"prompt": text, "max_tokens": 4 + 4 * n} for n, text in enumerate(TEXTS)]
    drawn = [{"prompt": text, "max_tokens": 16, "temperature": 2.0, "seed": n} for n, text in enumerate(TEXTS)]
    return [{"model": "tiny-qwen", **body} for body in plain + drawn]


def said(running: Served, body: dict[str, Any]) -> str:
    status, _, text = running.request("/v1/completions", body)
    assert status == 200, text
    if not body.get("stream"):
        return str(json.loads(text)["choices"][0]["text"])
    *chunks, last = events(text)
    assert last == "[DONE]"
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def test_answers_given_together_are_those_given_alone(running: Served) -> None:
    alone = [said(running, body) for body in bodies()]
    assert len(set(alone)) > 8
    together = [{**body, "stream": stream} for stream in (True, False) for body in bodies()]
    with ThreadPoolExecutor(len(together)) as clients:
        assert list(clients.map(lambda body: said(running, body), together)) == alone * 2


def test_a_short_answer_does_not_wait_for_a_long_one(running: Served) -> None:
    long = {"model": "tiny-qwen", "prompt": "Once upon a time", "max_tokens": 1500, "temperature": 5.0, "seed": 1}
    with running.connect("/v1/completions", json.dumps({**long, "stream": True}).encode()) as opened:
        assert opened.recv(4096).startswith(b"HTTP/1.1 200")
        for _ in range(3):
            said(running, {"model": "tiny-qwen", "prompt": "The river", "max_tokens": 2})
        assert len(running.queue.replies) == 1  # the long one is still on its way
    running.wait_until(lambda: not running.queue.replies)


@pytest.mark.slow
def test_a_storm_of_clients_that_come_and_go(tmp_path: Path) -> None:
    found = benchmark_figures(tmp_path, "serve", "--clients", "50", "--seconds", "20", "--rate-seconds", "10")
    assert set(found["outcomes"]) <= {"right", "left", "429"}
    assert found["outcomes"]["right"] > 20
    assert found["wrong"] == []
    assert found["still_running"] == 0
    # Of processor time, which other programs on the machine do not take away.
    one, eight = (found["tokens_per_second"][clients][1] for clients in ("1", "8"))
    assert eight > 3 * one
