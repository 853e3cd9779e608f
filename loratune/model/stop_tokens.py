"""The tokens on which a model stops, as its files have them."""

from __future__ import annotations

from pathlib import Path

from loratune.model.architecture.structure import text_value
from loratune.model.files import CONFIG
from loratune.plain_files import CONFIG_BYTES, read_json_object


def stop_ids(folder: Path) -> list[int]:
    """Return the ids of the tokens on which a model stops, from generation_config.json or else from config.json."""
    for path in (folder / "generation_config.json", folder / CONFIG):
        values = read_json_object(path, CONFIG_BYTES) if path.is_file() else {}
        found = text_value(values, "eos_token_id")
        if found is not None:
            return found if isinstance(found, list) else [found]
    return []
