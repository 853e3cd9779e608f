"""What must be known of a template before rows are looked up in the cache; kept there too, to load no tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass

from loratune.data.encoding.cache import cache_key, entry_lock, mark_used, new_entry
from loratune.data.encoding.encoder import Encoder
from loratune.recipe.sections import PromptSettings

FACTS = "template.json"


@dataclass(frozen=True)
class TemplateFacts:
    """What a template does under some prompt settings."""

    is_dated: bool
    """Whether it writes the date or the time into prompts."""
    remarks: list[str]
    """What the user should know of it."""


def template_facts(prompt: PromptSettings, tokenizer_sha256: str, make_encoder: Callable[[], Encoder]) -> TemplateFacts:
    """What is known of a template, or found out now.

    Args:
        prompt: the settings; their day makes no difference.
        tokenizer_sha256: of all files that the tokenizer and its template come from.
        make_encoder: called where nothing is known yet.

    Raises:
        LoratuneError: there is no template, or it cannot be used.
    """
    settings = prompt.model_dump(exclude={"date"})
    with entry_lock(cache_key({"template": settings, "tokenizer": tokenizer_sha256})) as entry:
        try:
            facts = TemplateFacts(**json.loads((entry / FACTS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # new, or damaged
            shutil.rmtree(entry, ignore_errors=True)
            encoder = make_encoder()
            facts = TemplateFacts(encoder.is_dated, encoder.remarks)
            with new_entry(entry) as folder:
                (folder / FACTS).write_text(json.dumps(asdict(facts)), encoding="utf-8")
        mark_used(entry)
    return facts
