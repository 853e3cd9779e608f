"""Rows about pictures, videos and sound, of which the texts alone would be trained."""

from __future__ import annotations

import re
from typing import Any

from loratune.data.formats.conversation import texts_in

NAMES = {
    "image": "a picture", "images": "pictures", "video": "a video", "videos": "videos", "audio": "sound",
    "audios": "sound",
}  # fmt: skip
"""Columns that hold nothing else."""
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
    """What is in the columns of a row that are called after pictures, videos or sound."""
    return [f"{key!r} holds {NAMES[key]}, and only texts are trained here" for key in NAMES if _holds_any(row.get(key))]


def referred_media(unread: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """Pictures and the like in columns that are not read, whatever these are called, where a text refers to them.

    Args:
        unread: name of a column, or of a key of turns → what it holds.
        row: as it was given.
    """
    kinds = {key: kind for key, value in unread.items() if (kind := _kind_of(value))}
    place = next((found for text in texts_in(row) if (found := PLACEHOLDER.search(text))), None) if kinds else None
    if not place:
        return []
    return [
        f"{key!r} holds {kind}, to which {place[0]} in a text refers, and only texts are trained here"
        for key, kind in kinds.items()
    ]


def _holds_any(value: Any) -> bool:
    """Whether a value is more than nulls, empty texts, and lists and objects of them."""
    if isinstance(value, dict | list):
        return any(map(_holds_any, value.values() if isinstance(value, dict) else value))
    return value not in (None, "", b"")


def _kind_of(value: Any) -> str:
    """What a value is, if it looks like a picture, a video or sound, or a list with one; else empty."""
    if isinstance(value, str):
        data = DATA_URL.match(value)
        if data:
            return DATA_KINDS[data[1].lower()]
        is_short = len(value) <= LONGEST_PATH
        return next((kind for kind, path in PATHS.items() if is_short and path.fullmatch(value.strip())), "")
    if isinstance(value, bytes):
        return "the bytes of a file" if value else ""
    if isinstance(value, dict):
        # As datasets writes a picture.
        if value.keys() >= {"bytes", "path"} and _holds_any([value["bytes"], value["path"]]):
            return _kind_of(value["path"]) or "a file"
        return next(filter(None, map(_kind_of, value.values())), "")
    return next(filter(None, map(_kind_of, value)), "") if isinstance(value, list) else ""
