"""Renders the first rows of a config as its tool does and as loratune does, and compares ids and labels one by one."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Annotated, Any, Literal, TypeAlias

from typing_extensions import TypedDict

from loratune.data.checked_rows import check_rows
from loratune.data.encoding.encoder import IGNORED, Encoder
from loratune.data.formats.conversation import Conversation
from loratune.data.formats.registry import renamed
from loratune.data.reading.files import Row, open_rows
from loratune.data.sources import parse_source
from loratune.errors import LoratuneError, agreeing, counted
from loratune.migration.peer_forms import NotComparableError, PeerForm, form_of
from loratune.migration.translation import Translation, TranslationValues
from loratune.model.files import find_tokenizer
from loratune.model.tokenizer import load_tokenizer
from loratune.recipe.sections import Recipe
from loratune.runs.typed_json import WRITTEN_BESIDE

SHOWN = 3
"""Differences shown of a row."""
Part: TypeAlias = Literal["after the end", "prompt", "trained"]
EFFECTS: dict[Part, str] = {
    "after the end": "differ only in blanks after the end token, which count in the mean loss of one of them: prompts "
    "and answers are the same, and generation stops before the blanks",
    "prompt": "differ in text that is not trained, so that the answers are learnt after another one",
    "trained": "differ in what is trained, so that the result is another",
}
"""Where rows differ, the least first → what is said of them."""
Tokens = list[tuple[int, bool]]
"""Ids, each with whether it is trained."""


@dataclass(frozen=True)
class Difference:
    """A place where two renderings of a row differ."""

    token: int
    """Number of tokens before it, there."""
    there: str
    here: str
    part: Part
    """What it concerns: trained tokens, only blanks of them after an end token, or none."""


@dataclass(frozen=True)
class ComparedRow:
    """One row, rendered by both tools."""

    place: str
    """File and line."""
    tokens_there: int = 0
    tokens_here: int = 0
    trained_there: int = 0
    trained_here: int = 0
    differences: tuple[Difference, ...] = ()
    problem: str = ""
    """Why it is not compared."""

    @property
    def is_same(self) -> bool:
        return not self.differences and not self.problem

    @property
    def part(self) -> Part | None:
        """Where the difference is that matters most; None if there is none."""
        parts = {one.part for one in self.differences}
        return next((part for part in reversed(EFFECTS) if part in parts), None)


@dataclass
class Comparison:
    """The rows that were compared, or why none was."""

    tool: str
    rows: list[ComparedRow] = field(default_factory=list)
    problem: str = ""

    @property
    def lines(self) -> list[str]:
        """What is told in the terminal."""
        if self.problem:
            return [f"rows are not compared: {self.problem}"]
        same = sum(row.is_same for row in self.rows)
        lines = [
            f"rendered by {self.tool}'s form and by loratune: {same} of {counted(len(self.rows), 'row')} "
            f"{agreeing(same, 'have equal ids and labels')}"
        ]
        for row in self.rows:
            if row.problem:
                lines.append(f"  {row.place}: not compared: {row.problem}")
            elif not row.is_same:
                counts = f"{row.tokens_there} tokens there, {row.trained_there} trained; "
                lines.append(f"  {row.place}: {counts}{row.tokens_here} here, {row.trained_here} trained")
                lines += [
                    f"    after {one.token}: {one.there} there, {one.here} here" for one in row.differences[:SHOWN]
                ]
        return lines + self._effects

    @property
    def _effects(self) -> list[str]:
        """Say of the rows that differ whether that changes what is learnt."""
        counts = Counter(row.part for row in self.rows)
        told = ((counts[part], effect) for part, effect in EFFECTS.items())
        return [f"{counted(count, 'row')} {agreeing(count, effect)}" for count, effect in told if count]

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as JSON types, as `ComparisonValues`."""
        rows = [asdict(row) | {"same": row.is_same} for row in self.rows]
        return {"problem": self.problem or None, "rows": rows}


class ComparedRowValues(TypedDict):
    """One row, rendered by both tools."""

    row: Annotated[ComparedRow, WRITTEN_BESIDE]
    same: bool


class ComparisonValues(TypedDict):
    """The rows that were compared."""

    problem: str | None
    """Why none was."""
    rows: list[ComparedRowValues]


class ComparedTranslation(TranslationValues):
    """What became of a config, and the comparison of --rows."""

    file: str | None
    """Where the recipe was written; null if it was not."""
    rows: ComparisonValues | None


def compare_rows(found: Translation, count: int) -> Comparison:
    """Compare the first rows of a translated config.

    Args:
        found: the translation.
        count: number of rows.

    Returns:
        The comparison; without rows or the tokenizer's files at hand, the reason why there is none.
    """
    compared = Comparison(found.tool)
    if found.recipe is None:
        compared.problem = "the config names no base or no rows"
        return compared
    try:
        tokenizer = load_tokenizer(find_tokenizer(found.recipe.model))
        encoder = Encoder(tokenizer, found.recipe.prompt).at_a_day()  # tries a template before it is used elsewhere
        form = form_of(found.tool, dict(found.sheet.known), tokenizer)
        if form is None:
            compared.problem = f"{found.tool}'s form of these rows is not known here"
            return compared
        for place, row, spoken in islice(_rows(found.recipe), count):
            compared.rows.append(_compared(place, row, spoken, form, encoder, found.recipe))
    except LoratuneError as error:
        compared.problem = error.message
    return compared


def _rows(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any], Conversation | str]]:
    """Yield place, row and conversation of each row of the training sources."""
    for entry in recipe.data.train:
        source = parse_source(entry)
        file = open_rows(source.name, recipe.data.encoding)
        reader = check_rows(file, recipe.data, source.system).reader
        for row in file:
            if isinstance(row, Row) and isinstance(row.value, dict):
                yield file.place(row.number), renamed(row.value, recipe.data.columns), reader.read(row.value)


def _compared(
    place: str, row: dict[str, Any], spoken: Conversation | str, form: PeerForm, encoder: Encoder, recipe: Recipe
) -> ComparedRow:
    if isinstance(spoken, str):
        return ComparedRow(place, problem=spoken)
    try:
        trained = spoken.trained_answers(recipe.data.train_on_turns)
        answers = {at for at, message in enumerate(spoken.messages) if message["role"] == "assistant"}
        there = _tokens(*form(encoder.tokenizer, row, replace(spoken, untrained=frozenset(answers - set(trained)))))
        examples = encoder.encode(spoken, recipe.data.train_on_turns, recipe.data.train_thinking)
    except (NotComparableError, LoratuneError) as error:
        return ComparedRow(place, problem=str(error))
    here = [token for example in examples for token in _tokens(list(example.input_ids), list(example.labels))]
    changes = difflib.SequenceMatcher(a=there, b=here, autojunk=False).get_opcodes()
    differences = tuple(
        Difference(
            a,
            _told(there[a:b], encoder.tokenizer),
            _told(here[c:d], encoder.tokenizer),
            _part(there[a:b] + here[c:d], there[a - 1 : a], encoder),
        )
        for tag, a, b, c, d in changes
        if tag != "equal"
    )
    there_trained, here_trained = (sum(is_trained for _, is_trained in tokens) for tokens in (there, here))
    return ComparedRow(place, len(there), len(here), there_trained, here_trained, differences)


def _part(tokens: Tokens, before: Tokens, encoder: Encoder) -> Part:
    """Return what a difference concerns, from its tokens of both tools and the one before them."""
    trained = [token for token, is_trained in tokens if is_trained]
    if not trained:
        return "prompt"
    is_after_end = [token for token, _ in before] == [encoder.end_id]
    return "after the end" if is_after_end and not encoder.tokenizer.decode(trained).strip() else "trained"


def _tokens(ids: list[int], labels: list[int]) -> Tokens:
    """Return the tokens of a sequence up to the last trained one; what follows it changes nothing."""
    tokens = [(token, label != IGNORED) for token, label in zip(ids, labels, strict=True)]
    while tokens and not tokens[-1][1]:
        tokens.pop()
    return tokens


def _told(tokens: Tokens, tokenizer: Any) -> str:
    """Return tokens as their text, with what is trained of them."""
    if not tokens:
        return "nothing"
    text = repr(tokenizer.decode([token for token, _ in tokens]))
    shown = text if len(text) <= 80 else f"{text[:60]}…{text[-18:]}"
    count = sum(is_trained for _, is_trained in tokens)
    part = "trained" if count == len(tokens) else f"{count} of {len(tokens)} trained" if count else "not trained"
    return f"{shown} ({part})"
