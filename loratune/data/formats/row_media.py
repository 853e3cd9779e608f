"""Rejects rows with images, video or audio, of which only the text would be trained."""

from __future__ import annotations

import re
from typing import Any

from loratune.data.formats.conversation import texts_in

NAMES = {
    "image": "a picture", "images": "pictures", "video": "a video", "videos": "videos", "audio": "sound",
    "audios": "sound",
}  # fmt: skip
"""Columns that by convention hold only media."""
PLACEHOLDER = re.compile(r"<\|?(?:image|video|audio)\w*\|?>", re.IGNORECASE)
SUFFIXES = {
    "a picture": "avif bmp gif heic jfif jpe?g png svg tiff? webp",
    "a video": "avi flv m4v mkv mov mp4 mpe?g webm wmv",
    "sound": "aac aiff flac m4a mp3 oga ogg opus wav wma",
}
PATHS = {
    kind: re.compile(rf"[^\n<>]*[\w)\]]\.(?:{endings.replace(' ', '|')})(?:[?#]\S*)?", re.IGNORECASE)
    for kind, endings in SUFFIXES.items()
}
DATA_URL = re.compile(r"data:(image|video|audio)/", re.IGNORECASE)
DATA_KINDS = dict(zip(("image", "video", "audio"), SUFFIXES, strict=True))
LONGEST_PATH = 4096


def named_media(row: dict[str, Any]) -> list[str]:
    """Return problems of columns that are named after media."""
    return [f"{key!r} holds {NAMES[key]}, and only text is trained" for key in NAMES if _holds_any(row.get(key))]


def referred_media(unread: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """Return problems of unused columns that look like media, if a text of the row refers to media.

    Args:
        unread: name of a column, or of a key of turns → its value.
        row: the row as given.
    """
    kinds = {key: kind for key, value in unread.items() if (kind := _kind_of(value))}
    place = next((found for text in texts_in(row) if (found := PLACEHOLDER.search(text))), None) if kinds else None
    if not place:
        return []
    return [
        f"{key!r} holds {kind}, to which {place[0]} in a text refers, and only text is trained"
        for key, kind in kinds.items()
    ]


def _holds_any(value: Any) -> bool:
    """Return whether a value contains anything but nulls and empty strings."""
    if isinstance(value, dict | list):
        return any(map(_holds_any, value.values() if isinstance(value, dict) else value))
    return value not in (None, "", b"")


def _kind_of(value: Any) -> str:
    """Return the kind of media that a value, or an element of it, looks like; otherwise an empty string."""
    if isinstance(value, str):
        data = DATA_URL.match(value)
        if data:
            return DATA_KINDS[data[1].lower()]
        is_short = len(value) <= LONGEST_PATH
        return next((kind for kind, path in PATHS.items() if is_short and path.fullmatch(value.strip())), "")
    if isinstance(value, bytes):
        return "the bytes of a file" if value else ""
    if isinstance(value, dict):
        # how the datasets library stores an image
        if value.keys() >= {"bytes", "path"} and _holds_any([value["bytes"], value["path"]]):
            return _kind_of(value["path"]) or "a file"
        return next(filter(None, map(_kind_of, value.values())), "")
    return next(filter(None, map(_kind_of, value)), "") if isinstance(value, list) else ""
