"""The tokens on which a model stops, as its files have them."""

from __future__ import annotations

from pathlib import Path

from loratune.model.architecture.structure import text_value
from loratune.model.files import CONFIG, GENERATION_CONFIG
from loratune.plain_files import CONFIG_BYTES, read_json_object

KEY = "eos_token_id"


def stop_ids(folder: Path) -> list[int]:
    """Return the ids of the tokens on which a model stops, from generation_config.json or else from config.json."""
    generation, config = (
        read_json_object(path, CONFIG_BYTES) if path.is_file() else {}
        for path in (folder / GENERATION_CONFIG, folder / CONFIG)
    )
    found = generation.get(KEY, text_value(config, KEY))
    return found if isinstance(found, list) else [] if found is None else [found]
