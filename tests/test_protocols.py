"""What is said of attributes of transformers' and PEFT's objects, against such objects."""

from __future__ import annotations

import inspect
from typing import Any, Protocol, get_type_hints

import pytest
from conftest import TINY_QWEN
from transformers import CONFIG_MAPPING

from loratune.model.adapter.attach import attach_adapter
from loratune.model.architecture.families import FAMILIES
from loratune.model.architecture.structure import decoder_of, text_config
from loratune.model.config import empty_model
from loratune.model.tokenizer import load_tokenizer
from loratune.protocols import AdaptedModel, AddedToken, CausalModel, Decoder, ModelConfig, TextConfig, Tokenizer
from loratune.recipe.method_sections import LoraSettings


def unlike(stated: Any, found: Any) -> list[str]:
    """What a protocol states and an object doesn't have, or has with other names of arguments."""
    problems = [name for name in get_type_hints(stated) if not hasattr(found, name)]
    kinds = [kind for kind in stated.__mro__ if kind not in (Protocol, object) and "Generic" not in kind.__name__]
    for name, method in ((name, method) for kind in kinds for name, method in vars(kind).items()):
        if not inspect.isfunction(method) or name in ("__init__", "__subclasshook__"):
            continue
        if not callable(getattr(found, name, None)):
            problems.append(f"{name}()")
            continue
        taken = inspect.signature(getattr(found, name)).parameters
        takes_all = any(one.kind is one.VAR_KEYWORD for one in taken.values())
        asked = [one for one in inspect.signature(method).parameters.values() if one.kind is not one.VAR_KEYWORD][1:]
        problems += [f"{name}({one.name})" for one in asked if one.name not in taken and not takes_all]
    return problems


def test_a_tokenizer_has_everything_that_loratune_asks_of_one() -> None:
    tokenizer = load_tokenizer(TINY_QWEN)
    assert isinstance(tokenizer, Tokenizer)
    for token in tokenizer.added_tokens_decoder.values():
        assert all(hasattr(token, name) for name in get_type_hints(AddedToken))


def test_a_tokenizer_that_was_not_set_up_is_none() -> None:
    tokenizer = load_tokenizer(TINY_QWEN)
    del tokenizer.chat_control_tokens
    assert not isinstance(tokenizer, Tokenizer)


@pytest.mark.parametrize("family", [kind for kind, family in FAMILIES.items() if family.gguf])
def test_models_with_and_without_an_adapter_have_everything_that_loratune_asks_of_them(family: str) -> None:
    config = CONFIG_MAPPING[family](num_hidden_layers=2)
    model = empty_model(config)
    assert unlike(ModelConfig, config) == []
    assert unlike(TextConfig, text_config(config)) == []
    assert unlike(CausalModel, model) == []
    assert unlike(Decoder, decoder_of(model)) == []
    adapted = attach_adapter(model, LoraSettings(target_modules=["q_proj"]), "base", 0)
    assert unlike(AdaptedModel, adapted) == []
    assert unlike(CausalModel, adapted) == []


def test_what_is_stated_and_not_there_is_seen() -> None:
    class Stated(Protocol):
        there: int
        lacking: int

        def call(self, here: int, gone: int) -> None: ...

        def none(self) -> None: ...

    class Found:
        there = 1

        def call(self, here: int) -> None: ...

    assert unlike(Stated, Found()) == ["lacking", "call(gone)", "none()"]
    assert set(unlike(AdaptedModel, empty_model(CONFIG_MAPPING["qwen2"](num_hidden_layers=1)))) >= {
        "active_adapter",
        "get_base_model()",
    }
