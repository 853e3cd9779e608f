"""The sampling settings are declared once: flags, `/set`, the API and the page take the same values."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from pydantic import ValidationError
from sampling import shortlisted

import loratune
from loratune.cli.sampling import flag
from loratune.engine.sampling import NUMBERS, Sampling
from loratune.errors import Exit, LoratuneError
from loratune.generation.chat.settings import changed
from loratune.generation.server.schemas import ChatRequest

PAGE = Path(loratune.__file__).parent / "generation" / "server" / "page" / "index.html"
IN_REQUESTS = {"max_new_tokens": "max_tokens"}


def described(model: Any, name: str) -> dict[str, Any]:
    """What pydantic says of a field: its range, where it has one."""
    found: dict[str, Any] = model.model_json_schema()["properties"][name]
    return {**found, **found["anyOf"][0]} if "anyOf" in found else found


RANGES = {
    name: (schema["minimum"], schema["maximum"], 1 if schema["type"] == "integer" else 0.001)
    for name in Sampling.model_fields
    if "minimum" in (schema := described(Sampling, name))
}
"""Setting → smallest and largest value, and a step."""


def test_every_setting_but_the_stop_texts_has_a_range() -> None:
    assert {*RANGES, "stop"} == set(Sampling.model_fields)
    assert list(NUMBERS) == list(RANGES)


@pytest.mark.parametrize("name", RANGES)
def test_the_settings_themselves_hold_their_range(name: str) -> None:
    low, high, step = RANGES[name]
    for value in (low, high):
        assert getattr(Sampling(**{name: value}), name) == value
    for value in (low - step, high + step, float("nan"), "1", True):
        with pytest.raises(ValidationError):
            Sampling(**{name: value})


@pytest.mark.parametrize("name", RANGES)
def test_the_flags_of_infer_take_the_range_and_nothing_else(cli: Callable[..., Result], name: str) -> None:
    low, high, step = RANGES[name]
    for value in (low, high):  # read, and then the model is looked for
        assert "no such folder" in cli("infer", "--model", "./nowhere", "-p", "hi", flag(name), value).stderr
    for value in (low - step, high + step, "nan", "inf", "one", ""):
        result = cli("infer", "--model", "./nowhere", "-p", "hi", f"{flag(name)}={value}")
        assert result.exit_code == Exit.USAGE
        assert flag(name) in result.stderr
        assert f"{low:,g} to {high:,}" in " ".join(result.stderr.split())


def test_the_longest_answer_of_serve_has_the_range_of_the_setting(cli: Callable[..., Result]) -> None:
    low, high, _ = RANGES["max_new_tokens"]
    asked = ("serve", "--model", "./nowhere", "--port", 0, "--max-new-tokens")
    for value in (low, high):
        assert "no such folder" in cli(*asked, value).stderr
    for value in (low - 1, high + 1):
        result = cli(*asked, value)
        assert result.exit_code == Exit.USAGE
        assert "--max-new-tokens" in result.stderr


@pytest.mark.parametrize("name", RANGES)
def test_set_takes_the_range_and_nothing_else(name: str) -> None:
    low, high, step = RANGES[name]
    for value in (low, high):
        assert getattr(changed(Sampling(), f"{name}={value}"), name) == value
    for value in (low - step, high + step, "nan", "inf", "one"):
        with pytest.raises(LoratuneError, match="from"):
            changed(Sampling(), f"{name}={value}")


@pytest.mark.parametrize("name", RANGES)
def test_the_fields_of_a_request_have_the_range_and_the_words(name: str) -> None:
    field = described(ChatRequest, IN_REQUESTS.get(name, name))
    if name == "seed":  # clients send 64 bits with a sign, which are counted modulo 2**32
        assert "minimum" not in field
        for seed in (-1, 7, 2**32 + 7, -(2**63), 2**64):
            sent = ChatRequest(model="m", messages=[{"role": "user", "content": "hi"}], seed=seed)  # type: ignore[list-item]
            assert sent.sampling(10) == Sampling(max_new_tokens=10, seed=seed % 2**32)
        return
    assert (field["minimum"], field["maximum"]) == RANGES[name][:2]
    if name not in IN_REQUESTS:
        assert field["description"].startswith(" ".join(str(described(Sampling, name)["description"]).split())[:-1])


class Inputs(HTMLParser):
    """The page's inputs with a range: name → attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, dict[str, str | None]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "input" and "min" in values:
            self.found[str(values["name"])] = values


def test_the_page_s_inputs_have_the_ranges() -> None:
    page = Inputs()
    page.feed(PAGE.read_text("utf-8"))
    assert set(page.found) == {IN_REQUESTS.get(name, name) for name in RANGES}
    for name, (low, high, step) in RANGES.items():
        shown = page.found[IN_REQUESTS.get(name, name)]
        assert (float(shown["min"] or "nan"), float(shown["max"] or "nan")) == (low, high), name
        assert (shown["step"] == "1") == (step == 1), name


def test_a_top_p_of_zero_leaves_the_likeliest_token() -> None:
    torch.manual_seed(0)
    scores = torch.randn(5000)
    ids, probabilities = shortlisted(scores, Sampling(temperature=5.0, top_p=0.0, top_k=0, min_p=0.0))
    assert ids.tolist() == [int(scores.argmax())]
    assert probabilities.tolist() == [1.0]


def test_declaring_the_settings_takes_no_torch() -> None:
    code = "import sys, loratune.engine.sampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
