"""The data gate: what of a recipe's rows would be trained, and what stands against it, without loading the model."""

from __future__ import annotations

import importlib

from loratune.data.encoding import Encoder
from loratune.data.loaded_source import Rendering
from loratune.data.preparation import PreparedData, check_sources, prepare_data
from loratune.errors import LoratuneError
from loratune.model.files import find_tokenizer
from loratune.recipe.sections import Recipe
from loratune.runs.tokenizer_files import tokenizer_sha256


def pass_gate(recipe: Recipe) -> PreparedData:
    """The rows of a recipe as they would be trained.

    Rows that have been encoded before come from the cache, and the tokenizer is then not even loaded.

    Raises:
        LoratuneError: rows or tokenizer cannot be read. `PreparedData.checked` raises for what is found in the rows.
    """
    try:
        folder = find_tokenizer(recipe.model)
    except LoratuneError:
        check_sources(recipe.data)  # so that wrong rows are told even where there is no tokenizer yet
        raise

    def make_encoder() -> Encoder:
        load_tokenizer = importlib.import_module("loratune.model.tokenizer").load_tokenizer  # transformers: seconds
        return Encoder(load_tokenizer(folder), recipe.prompt)

    rendering = Rendering(recipe.prompt, tokenizer_sha256(folder), make_encoder, recipe.training.max_length)
    return prepare_data(recipe.data, rendering, recipe.seed)
