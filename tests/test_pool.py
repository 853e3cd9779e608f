"""Rows of several sources: mixed in proportion, repeated, split; numbers checked against plain counting."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_QWEN
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.data.assembly.dataset import as_dataset
from loratune.data.assembly.pool import earlier_copies
from loratune.data.encoding.encoder import Encoder
from loratune.data.encoding.loaded_source import Rendering
from loratune.data.preparation import PreparedData, prepare_data
from loratune.errors import Exit, LoratuneError
from loratune.recipe.data_sections import DataSettings, SourceSettings
from loratune.recipe.sections import PromptSettings


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    from loratune.model.tokenizer import load_tokenizer

    return Encoder(load_tokenizer(TINY_QWEN), PromptSettings())


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Files of 4, 30 and 7 rows whose answers begin with the file's name."""
    places = {}
    for name, count in {"few": 4, "many": 30, "some": 7}.items():
        path = tmp_path / f"{name}.json"
        rows = [{"instruction": f"{name} {n}?", "output": f"{name} {n}."} for n in range(count)]
        path.write_text(json.dumps(rows))
        places[name] = str(path)
    return places


def prepare(encoder: Encoder, seed: int = 0, **data: Any) -> PreparedData:
    rendering = Rendering(encoder.settings, "tiny", lambda: encoder, 256)
    return prepare_data(DataSettings(**data), rendering, seed).checked()


def answers(encoder: Encoder, split: Any) -> list[str]:
    """The answers of a split, from the ids that would be trained."""
    if split is None:
        return []
    texts = [encoder.tokenizer.decode(ids, skip_special_tokens=True) for ids in as_dataset(split)["input_ids"]]
    return [text.rpartition("\n")[2].removesuffix(".") for text in texts]


def counts(encoder: Encoder, split: Any) -> Counter[str]:
    return Counter(answer.split()[0] for answer in answers(encoder, split))


def test_weights_mix_in_their_proportion_and_take_the_scarcest_whole(encoder: Encoder, files: dict[str, str]) -> None:
    train = [SourceSettings(path=files["few"], weight=1), SourceSettings(path=files["many"], weight=5)]
    taken = answers(encoder, prepare(encoder, train=train, validation=0.0).train)
    assert Counter(answer.split()[0] for answer in taken) == {"few": 4, "many": 20}
    assert len(set(taken)) == 24
    other = answers(encoder, prepare(encoder, seed=1, train=train, validation=0.0).train)
    assert set(other) != set(taken)


def test_a_repeated_source_stands_so_often_and_mixes_as_if_it_were_larger(
    encoder: Encoder, files: dict[str, str]
) -> None:
    twice = answers(encoder, prepare(encoder, train=[files["few"] + "#2x", files["some"]], validation=0.0).train)
    assert Counter(Counter(twice).values()) == {2: 4, 1: 7}
    train = [SourceSettings(path=files["few"] + "#3x", weight=1), SourceSettings(path=files["many"], weight=2)]
    assert counts(encoder, prepare(encoder, train=train, validation=0.0).train) == {"few": 12, "many": 24}


def test_repeated_rows_are_never_in_training_and_validation_both(encoder: Encoder, files: dict[str, str]) -> None:
    prepared = prepare(encoder, train=[files["some"] + "#5x", files["many"]], validation=0.2)
    held_out = answers(encoder, prepared.validation)
    assert len(set(held_out)) == len(held_out) == 7
    assert not set(held_out) & set(answers(encoder, prepared.train))
    assert prepared.warnings == []


def test_validation_rows_are_not_repeated(encoder: Encoder, files: dict[str, str]) -> None:
    with pytest.raises(LoratuneError, match="never repeated") as caught:
        prepare(encoder, train=[files["few"]], validation=[files["some"] + "#2x"])
    assert caught.value.exit_code == Exit.USAGE


def test_a_weight_too_small_for_a_row_is_told(encoder: Encoder, files: dict[str, str]) -> None:
    train = [SourceSettings(path=files["few"], weight=1000), SourceSettings(path=files["many"], weight=1)]
    prepared = prepare(encoder, train=train, validation=0.0)
    assert counts(encoder, prepared.train) == {"few": 4}
    assert prepared.warnings == [
        f"{files['many']}: its weight leaves it no row; raise it, or repeat the scarcest source (#2x)"
    ]


def test_validation_holds_the_same_share_of_every_source(encoder: Encoder, files: dict[str, str]) -> None:
    prepared = prepare(encoder, train=[files["some"], files["many"]], validation=0.5)
    assert counts(encoder, prepared.validation) == {"some": 3, "many": 15}


def test_files_tell_how_many_of_their_rows_are_used(encoder: Encoder, files: dict[str, str]) -> None:
    train = [SourceSettings(path=files["few"], weight=1), SourceSettings(path=files["many"], weight=5)]
    prepared = prepare(encoder, train=train, validation=[files["some"] + "#5"])
    assert [(use.rows, use.seen) for use in prepared.files] == [(4, 4), (20, 30), (5, 7)]


def test_a_source_s_system_prompt_reaches_its_rows_alone(encoder: Encoder, files: dict[str, str]) -> None:
    train = [SourceSettings(path=files["few"], system="Be brief."), files["some"]]
    split = prepare(encoder, train=train, validation=0.0).train
    texts = [encoder.tokenizer.decode(ids) for ids in as_dataset(split)["input_ids"]]
    assert ["Be brief." in text for text in texts] == [True] * 4 + [False] * 7


@settings(deadline=None)
@given(st.lists(st.integers(0, 5)))
def test_the_first_of_equal_rows_is_found(digests: list[int]) -> None:
    import numpy as np

    found = earlier_copies(np.array(digests, np.uint64))
    assert found.tolist() == [digests.index(digest) for digest in digests]
