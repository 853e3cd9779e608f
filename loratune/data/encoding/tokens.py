"""Tokenises text exactly as the tokenizer does, but looks up each word only once.

A byte-level BPE tokenizer encodes words independently, so a text's ids are the concatenated ids of its words. This is
verified for each tokenizer; where it does not hold, whole texts are passed to the library.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, TypeAlias

from tokenizers.models import BPE
from tokenizers.normalizers import NFC

from loratune.protocols import Tokenizer

Ids: TypeAlias = "array[int]"
"""Token ids packed as int32: one Python object per id would dominate the run time."""
MOST_PIECES = 400_000
"""Takes about 80 MB."""
LONGEST_PIECE = 64
"""In characters; longer pieces rarely recur."""
PIECES_PER_TEXT = 32

NormalForm: TypeAlias = Literal["NFC", "NFKC", "NFD", "NFKD"]
NORMAL_FORMS: tuple[NormalForm, ...] = ("NFC", "NFKC", "NFD", "NFKD")
UNNORMALIZED = "e\u0301\u00e9\ufb01"
"""A text that each normal form writes differently."""

# Characters that may follow a word. None of `<=>`, which NFC joins with a following mark, and no apostrophe, which may
# belong to the word.
FOLLOWERS = ' \n\t\r.,:;!?()[]{}"-/*&%$#@+_|\\^`~'
LEFT_CONTEXTS = (
    "word",
    "a",
    "WORD",
    "I'm",
    "we'll",
    "two words",
    "5word",
    "你word",
    "éword",
    "\n\nword",
    "  .word",
    "$a",
)
RIGHT_CONTEXTS = (
    "", "word", " word", "  word", "5", " 12", "你好", " 你", "'s", " 's", ".", ". W", "\n", "\n\nword", " \n ", "\r\n",
    "\u0301", "\u00a0", "😀",
)  # fmt: skip
# Other contexts that may precede a space; never another space.
BEFORE_SPACES = (*LEFT_CONTEXTS, "5", "a.", "(", "'", "你", "。", "\u00e9", "e\u0301", "😀", "_", "a's", "word-", "\0")
RUNS = ("  ", "\n ", "\t ", "\r ", "\v ", "\f ", "\0")
UNUSUAL_RUN = re.compile(r"\s ")
SAMPLES = (
    "Hello, world! It's 2024: don't (really) worry -- we'll see.\n\n\tif x == 1:\n        return a.b[0]  \n",
    "I'm here;you're   there.\r\nNA\u00efve caf\u00e9 cafe\u0301 a=\u0338b 你好，world。 Это word 😀word\u200d!",
    " leading and trailing ", "http://a.b/c?d=e&f=1_2-3#x", "A'S B'LL ''' word's\n'word' \"word\"",
)  # fmt: skip


class TokenMemo:
    """Memoises the ids of text pieces.

    Args:
        tokenizer: a transformers tokenizer; later changes to it are not noticed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, bytes] = {}
        added = tokenizer.added_tokens_decoder
        self._added_ids = {token.content: number for number, token in added.items()}
        self._added_packed = {content: _packed([number]) for content, number in self._added_ids.items()}
        self._special = {token.content for token in added.values() if token.special}
        longest_first = sorted(self._added_ids, key=len, reverse=True)
        # (?!) matches nowhere.
        self._added = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._pieces = _find_pieces(tokenizer)
        if self._pieces and not all(self._agrees(keep_special) for keep_special in (True, False)):
            self._pieces = None

    @property
    def is_in_use(self) -> bool:
        """Whether texts are split into memoised pieces; otherwise the library encodes whole texts."""
        return self._pieces is not None

    def all_ids(self, texts: Sequence[str], keep_special: bool) -> list[Ids]:
        """Return the ids of texts, without the tokens that the tokenizer may add around them.

        Unknown pieces are encoded in one batch, which the library runs in parallel.

        Args:
            texts: the texts to encode.
            keep_special: True to encode special tokens in the texts as tokens, False to encode them as characters;
                other added tokens stay tokens either way.
        """
        if not self.is_in_use:
            return self._of_library(texts, keep_special)
        splits = [self._added.split(text) for text in texts]
        forged = [] if keep_special else [n for n, split in enumerate(splits) if not self._special.isdisjoint(split)]
        # A special token that is encoded as characters merges with the words around it, so such texts are not split.
        exact = dict(zip(forged, self._of_library([texts[n] for n in forged], keep_special), strict=True))
        segments = {segment for n, split in enumerate(splits) if n not in exact for segment in split[::2]}
        ids_of = self._ids_of_segments(segments)
        return [exact[n] if n in exact else self._joined(split, ids_of) for n, split in enumerate(splits)]

    def _joined(self, split: list[str], ids_of: dict[str, bytes]) -> Ids:
        parts = [ids_of[segment] for segment in split[::2]]
        if len(split) > 1:
            between = [self._added_packed[token] for token in split[1::2]]
            parts = [parts[0], *chain.from_iterable(zip(between, parts[1:], strict=True))]
        return array("i", b"".join(parts))

    def _ids_of_segments(self, segments: Iterable[str]) -> dict[str, bytes]:
        """Return the ids of segments, the texts between added tokens."""
        words_of = {segment: self._words(segment) for segment in segments}
        fresh = list(set(chain.from_iterable(words_of.values())).difference(self._known))
        pieces_of = {word: self._pieces_of(word) for word in fresh}
        fresh_pieces = list(set(chain.from_iterable(pieces_of.values())).difference(self._known))
        known = self._known
        known.update(zip(fresh_pieces, self._encoded(fresh_pieces), strict=True))
        known.update((word, b"".join(map(known.__getitem__, pieces))) for word, pieces in pieces_of.items())
        ids_of = {segment: b"".join(map(known.__getitem__, words)) for segment, words in words_of.items()}
        self._forget(list({*fresh, *fresh_pieces}))
        return ids_of

    def _words(self, segment: str) -> list[str]:
        """Split a segment before its spaces; if it has runs of whitespace, use the slower pattern."""
        if any(run in segment for run in RUNS) or (not segment.isascii() and UNUSUAL_RUN.search(segment)):
            return self._pieces_of(segment)
        return segment.replace(" ", "\0 ").split("\0")

    def _pieces_of(self, text: str) -> list[str]:
        assert self._pieces is not None
        return self._pieces.findall(text)

    def _encoded(self, pieces: list[str]) -> Iterator[bytes]:
        """Encode pieces with the library; it is faster on many pieces joined by an added token than on single ones."""
        backend, separator = self._tokenizer.backend_tokenizer, next(iter(self._added_ids), None)
        # Every call of the tokenizer starts by resetting these; an earlier call may have set them.
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = False
        step = PIECES_PER_TEXT if separator else 1
        groups = [pieces[start : start + step] for start in range(0, len(pieces), step)]
        texts = [(separator or "").join(group) for group in groups]
        for group, encoding in zip(groups, backend.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            ids = encoding.ids
            if separator and ids.count(self._added_ids[separator]) == len(group) - 1:
                yield from _parts(ids, self._added_ids[separator])
            else:
                alone = backend.encode_batch_fast(group, add_special_tokens=False)
                yield from (_packed(encoding.ids) for encoding in alone)

    def _forget(self, fresh: list[str]) -> None:
        """Drop new pieces that are long, or do not fit into the memo."""
        room = MOST_PIECES - (len(self._known) - len(fresh))
        for piece in fresh:
            if len(piece) > LONGEST_PIECE or room <= 0:
                del self._known[piece]
            else:
                room -= 1

    def _of_library(self, texts: Sequence[str], keep_special: bool) -> list[Ids]:
        if not texts:
            return []
        options = {} if keep_special else {"split_special_tokens": True}
        return [array("i", ids) for ids in self._tokenizer(list(texts), add_special_tokens=False, **options).input_ids]

    def _agrees(self, keep_special: bool) -> bool:
        """Return whether split samples get the same ids as from the library."""
        samples = [*SAMPLES, *(sample + token + sample for token in self._added_ids for sample in SAMPLES[-1:])]
        return self.all_ids(samples, keep_special) == self._of_library(samples, keep_special)


def normal_form(tokenizer: Tokenizer) -> NormalForm | None:
    """Return the Unicode normal form that a tokenizer applies; None if it applies none, or changes texts otherwise."""
    ids = tokenizer(UNNORMALIZED, add_special_tokens=False).input_ids
    read = str(tokenizer.decode(ids)).strip()
    if read == UNNORMALIZED:
        return None
    return next((form for form in NORMAL_FORMS if read == unicodedata.normalize(form, UNNORMALIZED)), None)


def _packed(ids: list[int]) -> bytes:
    return array("i", ids).tobytes()


def _parts(ids: list[int], separator: int) -> Iterator[bytes]:
    start = 0
    for _ in range(ids.count(separator)):
        end = ids.index(separator, start)
        yield _packed(ids[start:end])
        start = end + 1
    yield _packed(ids[start:])


def _find_pieces(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return the pattern of the pieces of a text: it is split between an ASCII letter and one of FOLLOWERS.

    None if the tokenizer may encode a piece differently within a text.
    """
    if not getattr(tokenizer, "is_fast", False) or tokenizer.split_special_tokens:
        return None
    backend, added = tokenizer.backend_tokenizer, tokenizer.added_tokens_decoder.values()
    is_normalized = {token.normalized for token in added}
    is_plain = (
        isinstance(backend.model, BPE)
        and not backend.model.dropout
        and (backend.normalizer is None or isinstance(backend.normalizer, NFC))
        and not any(token.lstrip or token.rstrip or token.single_word for token in added)
        # The library matches added tokens with normalized=True in a second pass, over the normalised text.
        and (is_normalized <= {False} or (backend.normalizer is None and is_normalized == {True}))
    )
    if not is_plain or backend.pre_tokenizer is None or _depends_on_place(backend.pre_tokenizer):
        return None
    followers = "".join(character for character in FOLLOWERS if _begins_a_word(backend.pre_tokenizer, character))
    if " " not in followers or not _begins_a_word(backend.pre_tokenizer, " ", BEFORE_SPACES):
        return None
    follower, other = f"[{re.escape(followers)}]", f"[^{re.escape(followers)}]"
    return re.compile(f"(?s:.){other}*(?:(?<![A-Za-z]){follower}{other}*)*")


def _depends_on_place(pre_tokenizer: Any) -> bool:
    """Return whether a word's split can depend on what precedes it: by a look-behind or an added prefix space."""
    state: bytes = pre_tokenizer.__getstate__()
    return any(sign in state for sign in (b"(?<", b"Metaspace", b'"add_prefix_space":true'))


def _begins_a_word(pre_tokenizer: Any, character: str, contexts: Sequence[str] = LEFT_CONTEXTS) -> bool:
    """Return whether a text always splits into words before a character that follows one of the contexts."""

    def words(text: str) -> list[str]:
        return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]

    lefts = [(left, words(left)) for left in contexts]
    rights = [(right, words(right)) for right in (character + rest for rest in (*RIGHT_CONTEXTS, character + "word"))]
    return all(words(left + right) == before + behind for left, before in lefts for right, behind in rights)
