"""Decodes a file's bytes in the configured encoding; for undecodable bytes, the error names the likely one."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path

from loratune.data.reading.encoding_guess import guess_encoding
from loratune.errors import Exit, LoratuneError

UNPACKERS = {".gz": "gzip -dc", ".zst": "zstd -dc"}
SAMPLE = 1 << 20
BEFORE_FAULT = 1 << 16


def check_encoding(encoding: str) -> None:
    """Raise if a name is not that of a text encoding.

    Raises:
        LoratuneError: with examples of valid names.
    """
    try:
        "".encode(encoding)  # raises for codecs that do not encode text, such as rot13
        known = codecs.lookup(encoding).incrementaldecoder is not None
    except (LookupError, ValueError):
        known = False
    if not known:
        raise LoratuneError(
            f"data.encoding {encoding!r}: no such text encoding; gb18030, big5, utf-16 and cp1252 are some", Exit.USAGE
        )


def decode_blocks(name: str, encoding: str, blocks: Callable[[], Iterator[bytes]]) -> Iterator[str]:
    """Yield the text of a file in pieces, without its byte order mark.

    Args:
        name: name of the file, for errors.
        encoding: a name that `check_encoding` accepts.
        blocks: returns the file's bytes; called a second time to guess the encoding of undecodable bytes.

    Raises:
        LoratuneError: the bytes are not in the encoding.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    fed, at_start = 0, True
    for block in _then_empty(blocks()):
        fed += len(block)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeError as error:
            # Positions count from the bytes that the decoder kept of the previous block.
            start = fed - len(error.object) + error.start if isinstance(error, UnicodeDecodeError) else 0
            raise _not_in_encoding(name, encoding, start, blocks()) from error
        if text and at_start:
            text, at_start = text.removeprefix("\ufeff"), False
        if text:
            yield text


def _then_empty(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the blocks and an empty one, which finishes decoding."""
    yield from blocks
    yield b""


def _not_in_encoding(name: str, encoding: str, start: int, blocks: Iterator[bytes]) -> LoratuneError:
    if codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig"):
        return LoratuneError(
            f"{name}: not {encoding} (byte {start}), which data.encoding says; "
            "give the encoding that all the files are in, or convert this one to it with iconv",
            Exit.DATA,
        )
    guess = guess_encoding(_sample(blocks, start))
    path = Path(name)
    unpacker = UNPACKERS.get(path.suffix.lower())
    source, target = f" {path.name}", path.stem if unpacker else path.name
    unpack = f"{unpacker} {path.name} | " if unpacker else ""
    return LoratuneError(
        f"{name}: not UTF-8 (byte {start}), probably {guess}; convert it with\n"
        f"  {unpack}iconv -f {guess} -t UTF-8{'' if unpacker else source} > utf8-{target}\n"
        f"or, to train on it as it is, {_setting_for(guess)}",
        Exit.DATA,
    )


def _setting_for(guess: str) -> str:
    try:
        codecs.lookup(guess)
    except LookupError:
        return "set data.encoding (--data.encoding NAME)"
    return f"set data.encoding: {guess.lower()} (--data.encoding {guess.lower()})"


def _sample(blocks: Iterator[bytes], position: int) -> bytes:
    """Return bytes from a fault on, or from the start of its line, since much ASCII before it misleads the guess."""
    wanted = max(0, position - BEFORE_FAULT)
    start, kept = 0, b""
    for block in blocks:
        if not kept and start + len(block) <= wanted:
            start += len(block)
            continue
        kept += block
        if len(kept) >= SAMPLE + BEFORE_FAULT:
            break
    if not wanted:
        return kept[:SAMPLE]
    line = kept.rfind(b"\n", 0, position - start) + 1
    return kept[line or position - start :][:SAMPLE]
