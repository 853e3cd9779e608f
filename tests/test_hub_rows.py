"""Data sets of a hub, with a stand-in for the libraries that fetch them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import datasets
import pytest

from loratune.data.reading.files import RowFile, open_rows
from loratune.errors import Exit, LoratuneError, hub_reason_of

ROWS = [{"instruction": f"第{n}", "input": None if n % 2 else "x", "turns": [{"a": n}]} for n in range(600)]
Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


def loader(result: Any, calls: Calls) -> Callable[..., Any]:
    def load(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options))
        if isinstance(result, Exception):
            raise result
        return result

    return load


@pytest.fixture
def calls() -> Calls:
    return []


@pytest.fixture
def hugging_face(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> Callable[[Any], None]:
    return lambda result: monkeypatch.setattr(datasets, "load_dataset", loader(result, calls))


@pytest.fixture
def modelscope(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> Callable[[Any], None]:
    def give(result: Any) -> None:
        module = ModuleType("modelscope.msdatasets")
        module.MsDataset = type("MsDataset", (), {"load": staticmethod(loader(result, calls))})  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "modelscope", ModuleType("modelscope"))
        monkeypatch.setitem(sys.modules, "modelscope.msdatasets", module)

    return give


def values(file: RowFile) -> list[Any]:
    found = list(file)
    assert [row.number for row in found] == list(range(1, len(found) + 1))
    return [row[0] for row in found]


def refusal(name: str) -> str:
    with pytest.raises(LoratuneError) as caught:
        list(open_rows(name))
    assert caught.value.exit_code == Exit.DATA
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hf:org/name", (("org/name", None), {"split": "train"})),
        ("hf:org/name:test", (("org/name", None), {"split": "test"})),
        ("hf:org/name:zh:test", (("org/name", "zh"), {"split": "test"})),
    ],
)
def test_a_split_of_the_hugging_face_hub_is_asked_for_by_its_name_alone(
    name: str, asked: Any, hugging_face: Callable[[Any], None], calls: Calls
) -> None:
    hugging_face(datasets.Dataset.from_list(ROWS))
    file = open_rows(name)
    assert values(file) == values(file) == ROWS
    assert file.place(3) == f"{name} row 3"
    assert calls == [asked]


def test_a_split_of_modelscope_is_taken_as_the_data_set_in_it(modelscope: Callable[[Any], None], calls: Calls) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    for result in (dataset, type("MsDataset", (), {"to_hf_dataset": lambda _: dataset})()):
        modelscope(result)
        assert values(open_rows("ms:org/name:zh:test")) == ROWS
    assert calls == [(("org/name",), {"subset_name": "zh", "split": "test"})] * 2


def test_the_hash_of_a_data_set_follows_its_name_and_content(hugging_face: Callable[[Any], None]) -> None:
    hugging_face(datasets.Dataset.from_list(ROWS))
    first = open_rows("hf:org/name").sha256
    assert len(bytes.fromhex(first)) == 32
    assert open_rows("hf:org/name").sha256 == first
    assert open_rows("hf:org/name:train").sha256 != first
    hugging_face(datasets.Dataset.from_list(ROWS[:-1]))
    assert open_rows("hf:org/name").sha256 != first


def test_a_data_set_has_no_file_that_could_change(hugging_face: Callable[[Any], None]) -> None:
    hugging_face(datasets.Dataset.from_list(ROWS))
    open_rows("hf:org/name").check_unchanged()


def test_a_data_set_without_rows_is_refused(hugging_face: Callable[[Any], None]) -> None:
    hugging_face(datasets.Dataset.from_dict({"a": []}))
    assert refusal("hf:org/name") == "hf:org/name: 0 rows"


def test_what_a_hub_cannot_give_is_told_with_the_first_line_of_its_reason(
    hugging_face: Callable[[Any], None], modelscope: Callable[[Any], None]
) -> None:
    hugging_face(ConnectionError("no route\nand a long story"))
    modelscope(ValueError())
    message = refusal("hf:org/name")
    assert message.startswith("hf:org/name: loading from the Hugging Face hub failed: no connection (no route)\n")
    assert "long story" not in message
    assert refusal("ms:org/name").startswith(
        "ms:org/name: loading from ModelScope failed: ValueError: no reason given\n"
    )


def raised(name: str, text: str, cause: Exception | None = None) -> Exception:
    """An error of a class with this name, as a hub's client or its HTTP library raises it."""
    error: Exception = type(name, (OSError,), {})(text)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (raised("LocalEntryNotFoundError", "x", raised("OfflineModeIsEnabled", "y")), "HF_HUB_OFFLINE is set"),
        (ConnectionError("Couldn't reach it (OfflineModeIsEnabled)"), "HF_HUB_OFFLINE is set"),
        (raised("GatedRepoError", "401"), "it is gated: ask for access"),
        (raised("RepositoryNotFoundError", "404"), "the hub has none of this name"),
        (raised("ConnectError", "[Errno 111] x", ConnectionRefusedError(111, "refused")), "no connection (refused)"),
        (raised("LocalEntryNotFoundError", "Got: ConnectTimeout: 10 s"), "the hub does not answer in time"),
        (ConnectionError("Couldn't reach it (LocalEntryNotFoundError)"), "no connection (Couldn't reach it)"),
    ],
)
def test_what_the_errors_of_a_hub_mean_is_told_in_words(error: Exception, words: str) -> None:
    assert words in hub_reason_of(error)
    assert "Error" not in hub_reason_of(error)


def test_a_missing_library_is_told_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    why = "(No module named {!r})"
    modelscope, datasets = refusal("ms:org/name"), refusal("hf:org/name")
    assert why.format("modelscope.msdatasets") in modelscope
    assert modelscope.endswith(': pip install "loratune[modelscope]"')
    assert why.format("datasets") in datasets
    assert datasets.endswith(": pip install datasets")
