"""Whether the tokenizer can be loaded and the template renders a question."""

from __future__ import annotations

from typing import Any

from loratune.data.encoding.encoder import Encoder
from loratune.doctor.probes.base import folder_of
from loratune.errors import Exit, LoratuneError
from loratune.model.tokenizer import load_tokenizer
from loratune.recipe.sections import ModelSettings, PromptSettings


def check_template(settings: dict[str, Any], prompt: dict[str, Any]) -> bool:
    """Encode a question as training would.

    Raises:
        LoratuneError: tokenizer or template cannot be used.
    """
    folder = folder_of(ModelSettings.model_validate(settings))
    if folder is None:
        raise LoratuneError("the base is not on this machine", Exit.MODEL)
    encoder = Encoder(load_tokenizer(folder), PromptSettings.model_validate(prompt, strict=False))
    return bool(encoder.prompt_ids([{"role": "user", "content": "Are you there?"}]))
