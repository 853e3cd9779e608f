"""Prepares and checks a recipe's rows without loading the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date
from functools import cache
from typing import Any

from loratune.data.checks.findings import Found
from loratune.data.encoding.encoder import Encoder
from loratune.data.encoding.loaded_source import Rendering
from loratune.data.loading import problems_of_sources
from loratune.data.preparation import PreparedData, prepare_data
from loratune.data.template.facts import TemplateFacts, template_facts
from loratune.errors import Exit, LoratuneError, joined
from loratune.model.files import find_tokenizer
from loratune.model.stop_tokens import stop_ids
from loratune.recipe.sections import PromptSettings, Recipe
from loratune.runs.tokenizer_files import tokenizer_sha256

TEMPLATE = "template"
"""Name of findings about the template instead of the rows."""


def pass_gate(recipe: Recipe, day: str | None = None) -> PreparedData:
    """Prepare the rows of a recipe as they would be trained.

    Cached rows are reused, without loading the tokenizer.

    Args:
        recipe: the whole recipe.
        day: date for templates that write today's date, unless the recipe has one; None for today.

    Raises:
        LoratuneError: rows or tokenizer cannot be read. Findings only raise in `PreparedData.checked`.
    """

    @cache
    def tokenizer() -> Any:
        from loratune.model.tokenizer import load_tokenizer  # takes transformers, which takes seconds

        return load_tokenizer(folder)

    prompt = recipe.prompt
    try:
        folder = find_tokenizer(recipe.model)
        sha256 = tokenizer_sha256(folder)
        facts = template_facts(prompt, sha256, lambda: Encoder(tokenizer(), prompt))
    except LoratuneError as error:
        problems = problems_of_sources([*recipe.data.train, *recipe.data.validation_sources], recipe.data)
        if not problems:
            raise
        raise joined([*problems], Exit.DATA, error.commands, others=[error.message]) from error
    if facts.is_dated and not prompt.date:
        prompt = prompt.model_copy(update={"date": day or date.today().isoformat()})
    remarks = list(_about_template(facts, prompt, stop_ids(folder)))
    rendering = Rendering(prompt, sha256, lambda: Encoder(tokenizer(), prompt), recipe.training.max_length)
    seed = recipe.seed if recipe.data.seed is None else recipe.data.seed
    prepared = prepare_data(recipe.data, rendering, seed)
    prepared.found[:0] = remarks
    prepared.reasoning, prepared.reasoning_form = facts.reasoning, facts.form
    return prepared


def _about_template(facts: TemplateFacts, prompt: PromptSettings, stops: Sequence[int]) -> Iterator[Found]:
    for remark in facts.remarks:
        yield Found(TEMPLATE, "warn", 0, remark)
    # A base model may have a chat template too, but it does not stop as that one ends answers.
    if facts.replaced_end is not None and facts.replaced_end in stops:
        text = (
            f"prompt.template is {prompt.template}, but the model has a chat template of its own and stops on its end "
            "token, so it has most likely been trained on that template; --prompt.template chat uses it"
        )
        yield Found(TEMPLATE, "warn", 0, text)
    if facts.is_dated:
        text = (
            f"the chat template writes the date into prompts: that of {prompt.date} (prompt.date) all through the "
            "run, also after a resume; infer and serve write the current one"
        )
        yield Found(TEMPLATE, "note", 0, text)
    elif prompt.date:
        yield Found(TEMPLATE, "warn", 0, "prompt.date has no effect, because the chat template writes no date")
