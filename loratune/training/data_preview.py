"""Prints training rows token by token, for `loratune data preview`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict

from loratune import console
from loratune.data.assembly.split import Split
from loratune.data.assembly.steps import PassLayout, StepSampler
from loratune.data.encoding.encoder import IGNORED
from loratune.data.preparation import PreparedData
from loratune.errors import Exit, LoratuneError, agreeing, counted
from loratune.model.files import find_tokenizer
from loratune.model.tokenizer import load_tokenizer
from loratune.protocols import Tokenizer
from loratune.recipe.sections import Recipe
from loratune.training.gate import TEMPLATE, pass_gate

SHOWN_PLACES = 5
"""Rows that are named of those held for validation."""


class SequenceValues(TypedDict):
    """One training sequence."""

    row: str
    """File and line of its row."""
    text: str
    input_ids: list[int]
    labels: list[int]
    """The ids of trained tokens, and -100 for the others."""


class SequencesValues(TypedDict):
    """The first training sequences."""

    sequences: list[SequenceValues]


class PassesValues(TypedDict):
    """The sequences of the first packed passes (--packed)."""

    passes: list[list[SequenceValues]]


@dataclass(frozen=True)
class Preview:
    """One training sequence."""

    place: str
    """File and line of its row."""
    input_ids: list[int]
    labels: list[int]
    tokenizer: Tokenizer

    def as_json(self) -> SequenceValues:
        """Return the sequence as JSON types."""
        text = self.tokenizer.decode(self.input_ids)
        return {"row": self.place, "text": text, "input_ids": self.input_ids, "labels": self.labels}

    def spans(self) -> list[tuple[str, str]]:
        """Return runs of tokens with the same style, as text and style.

        Tokens of a run are decoded together, because one token may be only a part of a character.
        """
        tokens = zip(self.input_ids, self.labels, strict=True)
        groups = groupby(tokens, lambda one: self.style(*one))
        return [(self.tokenizer.decode([token for token, _ in group]), style) for style, group in groups]

    def style(self, token: int, label: int) -> str:
        """Return a token's style for `console.write_spans`."""
        is_control = token in self.tokenizer.added_tokens_decoder
        return ("context" if label == IGNORED else "trained") + (" control" if is_control else "")


def preview_rows(recipe: Recipe, count: int) -> list[Preview]:
    """Return the first training sequences of a recipe, and print of how many, and which rows are none.

    Raises:
        LoratuneError: any error of training before the model is loaded.
    """
    data = _checked_rows(recipe)
    firsts = _without_repeats(data.train.parts)
    total = sum(map(len, firsts))
    of_all = counted(total, "training sequence")
    told = f"the first {count:,} of {of_all} (--rows shows more)" if count < total else f"all of {of_all}"
    if count < total and len(firsts) > 1:
        told += ", of each file in turn"
    console.say(told + _held_out(data))
    return _previews(recipe, data.train, [_in_turn(firsts, count)])[0]


def _without_repeats(parts: Sequence[NDArray[np.int64]]) -> list[list[int]]:
    """Return the places of each source's sequences in the split; of one that #2x repeats, only the first."""
    starts = np.cumsum([0, *map(len, parts)])
    return [
        (start + np.sort(np.unique(part, return_index=True)[1])).tolist()
        for start, part in zip(starts, parts, strict=False)
    ]


def _in_turn(firsts: Sequence[Sequence[int]], count: int) -> list[int]:
    """Return so many places, one of each source after the other, in the order of the sources."""
    ranked = sorted((rank, place) for places in firsts for rank, place in enumerate(places[:count]))
    return sorted(place for _, place in ranked[:count])


def preview_passes(recipe: Recipe, count: int) -> list[list[Preview]]:
    """Return the sequences of the first packed passes of a recipe, in the order of the first epoch.

    A pass is a whole optimizer step unless training.tokens_per_pass is set; training also divides a step whose
    activations do not fit into memory.

    Raises:
        LoratuneError: any error of training before the model is loaded; or packing is disabled.
    """
    training = recipe.training
    if not training.packing:
        raise LoratuneError("training.packing is false; there are no packed passes", Exit.USAGE)
    train = _checked_rows(recipe).train
    layout = PassLayout(training.tokens_per_pass or train.tokens, efficient_tokens=0, is_packed=True)
    steps = StepSampler(train.lengths, training.batch_size, recipe.seed, layout)
    return _previews(recipe, train, list(islice(chain.from_iterable(steps), count)))


def _checked_rows(recipe: Recipe) -> PreparedData:
    """Return the rows of a recipe, and print warnings about the template, since the preview shows its output."""
    data = pass_gate(recipe).checked()
    for found in data.found:
        if found.name == TEMPLATE:
            console.warn(found.text)
    return data


def _held_out(data: PreparedData) -> str:
    """Return which rows of the files that are trained on are held for validation; empty if none are."""
    rows = data.validation.pool if data.validation else None
    if rows is None or rows.sources is not data.train.pool.sources:
        return ""
    places = [rows.short_place(row) for row in range(min(SHOWN_PLACES, len(rows)))]
    more = ", …" if len(rows) > SHOWN_PLACES else ""
    held = agreeing(len(rows), "are held for validation")
    return f"; {counted(len(rows), 'row')} {held}: {', '.join(places)}{more}"


def _previews(recipe: Recipe, train: Split, groups: list[list[int]]) -> list[list[Preview]]:
    """Return groups of sequences of a split, by their indices."""
    tokenizer = load_tokenizer(find_tokenizer(recipe.model))
    sources = zip(train.pool.sources, train.parts, strict=True)
    places = [(loaded, sequence) for loaded, sequences in sources for sequence in sequences.tolist()]

    def preview(place: int) -> Preview:
        loaded, sequence = places[place]
        (line,) = loaded.rows.table.slice(sequence, 1).select(["number", "input_ids", "labels"]).to_pylist()
        return Preview(loaded.file.place(line["number"]), line["input_ids"], line["labels"], tokenizer)

    return [[preview(place) for place in group] for group in groups]


def show_pass(number: int, previews: Sequence[Preview], with_ids: bool) -> None:
    """Print the sequences of a packed pass."""
    tokens = sum(len(preview.input_ids) for preview in previews)
    title = f"pass {number}: {counted(len(previews), 'row')}, {tokens} tokens, each row attends to itself alone\n\n"
    console.write_spans([(title, "title")])
    for preview in previews:
        show_tokens(preview, with_ids)


def show_tokens(preview: Preview, with_ids: bool) -> None:
    """Print a sequence as text, or as a list of tokens."""
    trained = sum(label != IGNORED for label in preview.labels)
    console.write_spans([(f"{preview.place}: {len(preview.input_ids)} tokens, {trained} trained\n", "title")])
    if with_ids:
        for place, (token, label) in enumerate(zip(preview.input_ids, preview.labels, strict=True)):
            mark = "" if label == IGNORED else "trained"
            text = preview.tokenizer.decode([token]).replace("\n", "⏎")
            spans = [(f"{place:6} {token:8} {mark:8} ", "title"), (f"{text}\n", preview.style(token, label))]
            console.write_spans(spans, brackets=False)
    else:
        console.write_spans([(text.replace("\n", "⏎\n"), style) for text, style in preview.spans()])
    console.write_spans([("\n\n", "context")])
