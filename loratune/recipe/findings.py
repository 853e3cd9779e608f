"""The findings of the data gate: what each is called, what is said of its rows, and what it does."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

Finding: TypeAlias = Literal[
    "empty",
    "short",
    "garbled",
    "control_tokens",
    "control_tokens_in_answers",
    "repetitive",
    "thinking",
    "no_reasoning",
    "open_reasoning",
    "broken_off",
    "only_reasoning",
    "normalized",
    "long_answers",
    "duplicates",
    "near_duplicates",
    "other_answers",
    "overlap",
]
"""data.severity and data.remove take these names."""


class About(NamedTuple):
    """One finding."""

    sentence: str
    """Predicate of the message "3 of 100 rows of data.train …", in the plural."""
    usual: Literal["refuse", "warn"] = "warn"
    """Default severity."""
    of_removed: str = ""
    """Sentence for rows that data.remove removed; empty if it is the same."""
    of_pair: str = "is"
    """What stands between such a row and the other one that it is compared with."""


FINDINGS: dict[Finding, About] = {
    "empty": About("have an answer without text", "refuse"),
    "short": About("have an answer of a single character"),
    "garbled": About("hold garbled characters, as of a text read in a wrong encoding"),
    "control_tokens": About("hold control tokens such as <|im_end|> in what is asked; they are encoded as plain text"),
    "control_tokens_in_answers": About(
        "hold control tokens such as <|im_end|> in an answer, as if rendered by a chat template already",
        "refuse",
    ),
    "repetitive": About("have an answer that repeats itself"),
    "thinking": About("have a <think> block, though prompt.enable_thinking is false and so the prompt asks for none"),
    "no_reasoning": About(
        "have an answer without reasoning, though the prompt asks for it (prompt.enable_thinking, or a template that "
        "always does): the model learns to leave it out"
    ),
    "open_reasoning": About(
        "have an answer within a <think> block that is never closed; the model would learn to reason without an end",
        "refuse",
    ),
    "broken_off": About(
        "have an answer that breaks off: in a sentence or a code block, or with a mark such as [truncated]"
    ),
    "only_reasoning": About(
        "have an answer of a <think> block alone; with data.train_thinking false only its end is trained"
    ),
    "normalized": About(
        "hold characters that the tokenizer rewrites, such as a letter and an accent that it joins; the model reads "
        "and learns the rewritten form"
    ),
    "long_answers": About("have an answer more than ten times as long as half of all answers"),
    "duplicates": About("are the same as an earlier row"),
    "near_duplicates": About("are nearly the same as an earlier row"),
    "other_answers": About(
        "have the same question as an earlier row and another answer; the model learns a mixture of both",
        of_pair="asks the same as",
    ),
    "overlap": About(
        "are in training too, so that the validation loss says less than it seems to",
        of_removed="are in validation too",
    ),
}
