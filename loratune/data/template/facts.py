"""Caches what the cache key of rows needs to know of a template, so that no tokenizer has to be loaded for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass

from loratune.data.encoding.cache import cache_key, entry_lock, mark_used, new_entry
from loratune.data.encoding.encoder import Encoder
from loratune.data.template.reasoning_form import ReasoningForm
from loratune.data.template.thinking import Reasoning
from loratune.recipe.sections import PromptSettings

FACTS = "template.json"


@dataclass(frozen=True)
class TemplateFacts:
    """A template's behaviour under some prompt settings."""

    is_dated: bool
    """Whether it writes the current date or time into prompts."""
    remarks: list[str]
    """Warnings about the template."""
    reasoning: Reasoning | None
    """How it asks for reasoning; None if it has no thinking mode."""
    form: ReasoningForm
    """How it writes reasoning."""
    replaced_end: int | None
    """Id of the token with which the tokenizer's template ends answers, if the settings have another template."""


def template_facts(prompt: PromptSettings, tokenizer_sha256: str, make_encoder: Callable[[], Encoder]) -> TemplateFacts:
    """Return the facts of a template, from the cache or determined now.

    Args:
        prompt: the settings; their date is ignored.
        tokenizer_sha256: hash of all files of the tokenizer and its template.
        make_encoder: called if the facts are not cached.

    Raises:
        LoratuneError: there is no template, or it cannot be used.
    """
    settings = prompt.model_dump(exclude={"date"})
    with entry_lock(cache_key({"template": settings, "tokenizer": tokenizer_sha256})) as entry:
        try:
            known = json.loads((entry / FACTS).read_text(encoding="utf-8"))
            reasoning = known["reasoning"] and Reasoning(**known["reasoning"])
            facts = TemplateFacts(**{**known, "reasoning": reasoning, "form": ReasoningForm(**known["form"])})
        except (OSError, ValueError, TypeError, LookupError):  # new, or damaged
            shutil.rmtree(entry, ignore_errors=True)
            encoder = make_encoder()
            facts = TemplateFacts(
                encoder.is_dated, encoder.remarks, encoder.reasoning, encoder.reasoning_form, encoder.replaced_end
            )
            with new_entry(entry) as folder:
                (folder / FACTS).write_text(json.dumps(asdict(facts)), encoding="utf-8")
        mark_used(entry)
    return facts
