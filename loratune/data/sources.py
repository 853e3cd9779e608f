"""Files of rows: JSON or JSONL in, plain dicts with their file positions out."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charset_normalizer import from_bytes

from loratune.errors import Exit, LoratuneError, bullet_list

ENDINGS = (".json", ".jsonl")
UNKNOWN_TO_ICONV = [
    *("cp720", "cp1006", "euc_jis_2004", "hz", "kz1048", "latin_1", "mac_greek", "mac_iceland", "mac_latin2"),
    *("mac_roman", "mac_turkish", "ptcp154", "shift_jis_2004", "shift_jisx0213"),
]
"""Encodings that would be guessed under names that glibc's iconv does not take."""


@dataclass(frozen=True)
class Source:
    """One entry of data.train or data.validation."""

    path: Path
    sample: int | None = None
    """How many rows to draw; None takes all."""


@dataclass(frozen=True)
class Row:
    """One raw row and where it stands."""

    value: Any
    place: str
    """`file.json row 3` or `file.jsonl:3`, counted from 1."""


def parse_source(text: str) -> Source:
    """Read `path` or `path#500`.

    Raises:
        LoratuneError: an address, an odd count, or a kind of file that is not read.
    """
    if "://" in text or text.startswith(("hf:", "ms:")):
        raise LoratuneError(f"{text}: nothing is fetched from the network; download the file first", Exit.DATA)
    # A # before the ending belongs to the name.
    has_count = "#" in text and Path(text).suffix.lower() not in ENDINGS
    name, hash_sign, count = text.rpartition("#") if has_count else (text, "", "")
    if hash_sign and not re.fullmatch("0*[1-9][0-9]{0,17}", count):
        raise LoratuneError(f"{text}: after # a number of rows is expected, such as rows.json#500", Exit.DATA)
    path = Path(name)
    if path.suffix.lower() not in ENDINGS:
        raise LoratuneError(f"{name}: not a .json or .jsonl file", Exit.DATA)
    return Source(path, int(count) if count else None)


def read_rows(source: Source, seed: int) -> list[Row]:
    """All rows of a file, or a sample of them in file order.

    Raises:
        LoratuneError: the file is missing, empty, not UTF-8, or not JSON; with line and column.
    """
    text = _read_text(source.path)
    is_lines = source.path.suffix.lower() == ".jsonl" or _looks_like_lines(text)
    rows = list(_parse_lines(source.path, text)) if is_lines else _parse_document(source.path, text)
    if not rows:
        raise LoratuneError(f"{source.path}: 0 rows", Exit.DATA)
    if source.sample is not None and source.sample < len(rows):
        chosen = random.Random(seed).sample(range(len(rows)), source.sample)
        rows = [rows[index] for index in sorted(chosen)]
    return rows


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, ValueError) as error:  # ValueError: a NUL in the name
        raise LoratuneError(f"{path}: no such file (looked from {Path.cwd()})", Exit.DATA) from error
    except OSError as error:
        raise LoratuneError(f"{path}: cannot be read: {error.strerror}", Exit.IO) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        guess = _guess_encoding(raw)
        raise LoratuneError(
            f"{path}: not UTF-8 (byte {error.start}), probably {guess}; convert it with\n"
            f"  iconv -f {guess} -t UTF-8 {path.name} > utf8-{path.name}",
            Exit.DATA,
        ) from error
    if not text.strip():
        raise LoratuneError(f"{path}: 0 rows, the file is empty", Exit.DATA)
    return text


def _guess_encoding(raw: bytes) -> str:
    """Name for iconv of the encoding that bytes are probably in."""
    best = from_bytes(raw[: 1 << 20], cp_exclusion=UNKNOWN_TO_ICONV).best()
    name = best.encoding if best else "ENCODING"
    if name in ("big5", "big5hkscs", "cp949", "euc_kr", "johab"):
        # In a few characters these cannot be told from GBK, which is what Chinese Excel and Notepad write.
        with suppress(UnicodeDecodeError):
            raw.decode("gb18030")
            name = "gb18030"
    return re.sub("-([BL]E)$", r"\1", name.upper().replace("_", "-"))  # iconv knows UTF-16LE


def _looks_like_lines(text: str) -> bool:
    """A .json file that holds one object per line, as many tools write it."""
    first, _, rest = text.lstrip().partition("\n")
    if not first.startswith("{") or not rest.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _parse_document(path: Path, text: str) -> list[Row]:
    value = _parse_json(path, text, first_line=1)
    if isinstance(value, dict):
        lists = [key for key, inner in value.items() if isinstance(inner, list)]
        hint = f"; its rows seem to be under {lists[0]!r}: save that list alone" if lists else ""
        raise LoratuneError(f"{path}: holds one object where a list of rows is expected{hint}", Exit.DATA)
    if not isinstance(value, list):
        raise LoratuneError(f"{path}: holds {type(value).__name__} where a list of rows is expected", Exit.DATA)
    return [Row(inner, f"{path} row {number}") for number, inner in enumerate(value, start=1)]


def _parse_lines(path: Path, text: str) -> Iterator[Row]:
    problems = []
    # Only \n ends a line: str.splitlines would also cut at characters that JSON allows inside a text.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield Row(_parse_json(path, line, first_line=number), f"{path}:{number}")
        except LoratuneError as error:
            problems.append(str(error))
    if problems:
        raise LoratuneError(f"{path}: lines that are not JSON:\n{bullet_list(problems, limit=5)}", Exit.DATA)


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} stands twice in one row")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _parse_json(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_refuse_repeated_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        excerpt = text[max(0, error.pos - 30) : error.pos + 30].replace("\n", "⏎")
        raise LoratuneError(
            f"{path}:{first_line + error.lineno - 1}:{error.colno}: not valid JSON: {error.msg}, near «{excerpt}»",
            Exit.DATA,
        ) from error
    except RecursionError as error:
        raise LoratuneError(f"{path}:{first_line}: nested too deep to be rows", Exit.DATA) from error
    except ValueError as error:
        raise LoratuneError(f"{path}:{first_line}: {error}", Exit.DATA) from error
