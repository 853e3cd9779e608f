"""Guesses the encoding of text that is not UTF-8, by the characters that languages use."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from functools import cache

from charset_normalizer import from_bytes
from charset_normalizer.utils import is_multi_byte_encoding

UNKNOWN_TO_ICONV = [
    *("cp720", "cp1006", "euc_jis_2004", "hz", "kz1048", "latin_1", "mac_greek", "mac_iceland", "mac_latin2"),
    *("mac_roman", "mac_turkish", "ptcp154", "shift_jis_2004", "shift_jisx0213"),
]
"""Encodings whose names glibc's iconv does not know; they are excluded from guesses."""
PAIRED = re.compile(rb"[\xa1-\xfe]+")
BEYOND_ASCII = re.compile(r"[^\0-\x7f]")

WESTERN = (
    *("äöüß", "àâæçéèêëîïôœùûüÿ", "áéíñóúü", "àáâãçéêíóôõúü", "àèéìíîòóù", "àçèéíïòóúü", "áèéêëïíóöúü"),
    *("åäöæøéèòóôâ", "áéíóúýðþæö", "åäöšž", "äöõüšž"),
)
CENTRAL = ("ąćęłńóśźż", "áčďéěíňóřšťúůýž", "áäčďéíĺľňóôŕšťúýž", "áéíóöőúüű", "čćđšž", "ăâîşţ")
ALPHABETS = {
    "cp1252": WESTERN,
    "cp1250": CENTRAL,
    "cp1257": ("ąčęėįšųūž", "āčēģīķļņšūž", "äöõüšž"),
    "cp1254": ("çğıöşüâîûİ",),
    "iso-8859-2": CENTRAL,
    "iso-8859-16": ("ăâîșț",),
    "macintosh": WESTERN,
    "cp850": WESTERN,
    "cp852": CENTRAL,
}
"""Encoding → the letters beyond ASCII of each language that is written in it; the most likely encoding comes first."""
LETTER = r"[^\W\d_]"
QUOTES = "“”„‚‘’«»…"
MARKS = f"{QUOTES}–—¿¡§°€£©®™•·×½²³\u00a0\u00ad"
READ = 1 << 17
"""Bytes of a sample whose characters are counted."""
USUAL = 0.9
"""Share of the characters beyond ASCII that one alphabet has to explain; it has half of those of another script."""

COMMON = {
    "cp949": re.compile(rb"[\xa1-\xa3\xb0-\xc8][\xa1-\xfe]"),
    "cp932": re.compile(rb"[\x81-\x83\x88-\x97][\x40-\xfc]"),
    "gb18030": re.compile(rb"[\xa1-\xa3\xb0-\xd7][\xa1-\xfe]"),
    "euc-jp": re.compile(rb"[\xa1\xa4\xa5\xb0-\xcf][\xa1-\xfe]"),
    "big5": re.compile(rb"[\xa1-\xc6][\x40-\x7e\xa1-\xfe]"),
}
"""Encoding → matches what most text in it is made of: punctuation, Korean syllables, kana, frequent Chinese characters.

GB18030, which Chinese Excel and Notepad write, comes before Big5 where both fit alike.
"""
EAST_ASIAN = {*COMMON, "gbk", "gb2312", "big5hkscs", "cp950", "euc_kr", "johab", "shift_jis"}
FEWEST_SYLLABLES = 8
"""Fewer characters may be Chinese ones that all have the codes of Korean syllables, as about half of them have."""


def guess_encoding(sample: bytes) -> str:
    """Return a name of the most likely encoding that iconv and Python know; a placeholder if none is likely."""
    name = _by_alphabet(sample)
    if not name:
        best = from_bytes(sample, cp_exclusion=UNKNOWN_TO_ICONV).best()
        name = best.encoding if best else ""
        if not name or name in EAST_ASIAN or _has_pairs(sample, name):
            name = _by_common_characters(sample) or name or "ENCODING"
    return re.sub("-([BL]E)$", r"\1", name.upper().replace("_", "-"))  # iconv's spelling is UTF-16LE


def _by_alphabet(sample: bytes) -> str:
    """Return the encoding in which a sample has the letters of one language, or of one in each line; empty if none has.

    A short text may have them in several encodings, of which the most likely one by itself is taken.
    """
    if b"\0" in sample:  # UTF-16, whose letters of ASCII and Latin-1 have their own codes beside a zero
        return ""
    texts = {name: _decoded(sample[:READ], name) for name in ALPHABETS}
    for split in (lambda text: [text], str.splitlines):
        shares = {name: _explained(split(text), ALPHABETS[name]) for name, text in texts.items()}
        best = max(shares, key=lambda name: shares[name])
        if shares[best] >= USUAL:
            return best
    return ""


def _explained(pieces: list[str], alphabets: Sequence[str]) -> float:
    """Return the share of the characters beyond ASCII that are usual in the language of their piece."""
    pieces = [one for one in pieces if not one.isascii()]
    usual = sum(max(len(_usual(letters).findall(one)) for letters in alphabets) for one in pieces)
    return usual / max(1, sum(len(BEYOND_ASCII.findall(one)) for one in pieces))


@cache
def _usual(letters: str) -> re.Pattern[str]:
    """Match the characters beyond ASCII of a language: no capital behind a small letter, and no mark within a word."""
    capitals = "".join(one.upper() for one in letters if len(one.upper()) == 1 and not one.upper().isascii())
    capital = f"(?<![a-z{letters}])[{capitals}]"
    mark = f"(?<!{LETTER})[{MARKS}]|(?:[{QUOTES}]|(?<=m)[²³])(?!{LETTER})|(?<={LETTER})[’·](?={LETTER})"
    return re.compile(f"[{letters}]|{capital}|{mark}")


def _has_pairs(sample: bytes, guess: str) -> bool:
    """Return whether bytes beyond ASCII come in pairs, as Chinese does, where a guess has a byte for each character.

    Letters with accents mostly stand alone.
    """
    runs = PAIRED.findall(sample.rstrip(bytes(range(0xA1, 0xFF))))  # the sample may end within a pair
    return not is_multi_byte_encoding(guess) and bool(runs) and all(len(run) % 2 == 0 for run in runs)


def _by_common_characters(sample: bytes) -> str:
    """Return the East Asian encoding in which most characters of a sample are common ones; empty if none fits."""
    shares = {}
    for name, common in COMMON.items():
        characters = [one.encode(name) for one in BEYOND_ASCII.findall(_decoded(sample[:READ], name))]
        if len(characters) >= (FEWEST_SYLLABLES if name == "cp949" else 1):
            shares[name] = sum(bool(common.fullmatch(one)) for one in characters) / len(characters)
    return max(shares, key=lambda name: shares[name], default="")


def _decoded(sample: bytes, encoding: str) -> str:
    """Return a sample's text, which may end within a character; empty if it is not in the encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeDecodeError:
        return ""
