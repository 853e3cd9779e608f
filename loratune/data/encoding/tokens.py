"""Text → token ids, exactly as the tokenizer gives them, but each word is looked up only once.

A byte-level BPE tokenizer works on words apart from each other, so that the ids of a text are those of its words one
after another. Whether that holds for a tokenizer is found out first; where it does not, the library gets whole texts.
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
"""Token ids packed as int32: a Python object for each would cost more than everything else here."""
MOST_PIECES = 400_000
"""Some 80 MB."""
LONGEST_PIECE = 64
"""Characters; longer pieces hardly ever come again."""
PIECES_PER_TEXT = 32

NormalForm: TypeAlias = Literal["NFC", "NFKC", "NFD", "NFKD"]
NORMAL_FORMS: tuple[NormalForm, ...] = ("NFC", "NFKC", "NFD", "NFKD")
UNNORMALIZED = "e\u0301\u00e9\ufb01"
"""A text that each form writes in another way."""

# What may follow a word: none of `<=>`, which NFC joins with a mark behind them, and no apostrophe, which may belong to
# the word.
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
# Before a space other things may stand too, but no other space.
BEFORE_SPACES = (*LEFT_CONTEXTS, "5", "a.", "(", "'", "你", "。", "\u00e9", "e\u0301", "😀", "_", "a's", "word-", "\0")
RUNS = ("  ", "\n ", "\t ", "\r ", "\v ", "\f ", "\0")
UNUSUAL_RUN = re.compile(r"\s ")
SAMPLES = (
    "Hello, world! It's 2024: don't (really) worry -- we'll see.\n\n\tif x == 1:\n        return a.b[0]  \n",
    "I'm here;you're   there.\r\nNA\u00efve caf\u00e9 cafe\u0301 a=\u0338b 你好，world。 Это word 😀word\u200d!",
    " leading and trailing ", "http://a.b/c?d=e&f=1_2-3#x", "A'S B'LL ''' word's\n'word' \"word\"",
)  # fmt: skip


class TokenMemo:
    """The ids of texts, and a memory of those of their pieces.

    Args:
        tokenizer: a transformers tokenizer; what changes in it later is not noticed.
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
        """Whether texts of this tokenizer may be cut; the library gets whole texts otherwise."""
        return self._pieces is not None

    def all_ids(self, texts: Sequence[str], keep_special: bool) -> list[Ids]:
        """The ids of texts, without any that the tokenizer would set around them.

        What is not known yet is encoded in parallel.

        Args:
            texts: any.
            keep_special: whether special tokens in them become tokens. If not they are encoded like words; of added
                tokens only ordinary ones stay whole then.
        """
        if not self.is_in_use:
            return self._of_library(texts, keep_special)
        splits = [self._added.split(text) for text in texts]
        forged = [] if keep_special else [n for n, split in enumerate(splits) if not self._special.isdisjoint(split)]
        # A special token that is only text belongs to the words around it, so that such texts are not split.
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
        """Ids of everything that stands between added tokens."""
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
        """A segment cut before its spaces, where each of them stands alone; else by the slower pattern."""
        if any(run in segment for run in RUNS) or (not segment.isascii() and UNUSUAL_RUN.search(segment)):
            return self._pieces_of(segment)
        return segment.replace(" ", "\0 ").split("\0")

    def _pieces_of(self, text: str) -> list[str]:
        assert self._pieces is not None
        return self._pieces.findall(text)

    def _encoded(self, pieces: list[str]) -> Iterator[bytes]:
        """Ids from the library, which takes many pieces in a text with added tokens between them more quickly."""
        backend, separator = self._tokenizer.backend_tokenizer, next(iter(self._added_ids), None)
        # As every call of the tokenizer itself begins; an earlier one may have left them set.
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
        """Keep of the newest pieces those that may come again, as far as there is room."""
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
        """Whether cut samples have the library's ids."""
        samples = [*SAMPLES, *(sample + token + sample for token in self._added_ids for sample in SAMPLES[-1:])]
        return self.all_ids(samples, keep_special) == self._of_library(samples, keep_special)


def normal_form(tokenizer: Tokenizer) -> NormalForm | None:
    """The Unicode normal form that a tokenizer brings texts into; None where it keeps them, or does something else."""
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
    """What the pieces of a text without added tokens are: it is cut between an ASCII letter and one of FOLLOWERS."""
    if not getattr(tokenizer, "is_fast", False) or tokenizer.split_special_tokens:
        return None
    backend, added = tokenizer.backend_tokenizer, tokenizer.added_tokens_decoder.values()
    is_normalized = {token.normalized for token in added}
    is_plain = (
        isinstance(backend.model, BPE)
        and not backend.model.dropout
        and (backend.normalizer is None or isinstance(backend.normalizer, NFC))
        and not any(token.lstrip or token.rstrip or token.single_word for token in added)
        # The library finds those of normalized text in a second pass.
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
    """Whether what stands before a word, or that nothing does, can change it: by a look-behind or a set space."""
    state: bytes = pre_tokenizer.__getstate__()
    return any(sign in state for sign in (b"(?<", b"Metaspace", b'"add_prefix_space":true'))


def _begins_a_word(pre_tokenizer: Any, character: str, contexts: Sequence[str] = LEFT_CONTEXTS) -> bool:
    """Whether the words of a text are those before a character and those from it on, wherever it follows a context."""

    def words(text: str) -> list[str]:
        return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]

    lefts = [(left, words(left)) for left in contexts]
    rights = [(right, words(right)) for right in (character + rest for rest in (*RIGHT_CONTEXTS, character + "word"))]
    return all(words(left + right) == before + behind for left, before in lefts for right, behind in rights)
