"""One answer on its way through the decoder."""

from __future__ import annotations

from dataclasses import dataclass, field

from loratune.engine.sampling import Sampling
from loratune.engine.token_choice import TokenChooser
from loratune.model.adapter.own_parameters import BASE


@dataclass(eq=False)
class RunningSequence:
    """An answer on its way."""

    prompt: list[int]
    """Token ids, at least one."""
    sampling: Sampling
    ends: frozenset[int]
    """Token ids that end an answer."""
    adapter: str = BASE
    """PEFT's name of it."""
    version: str = ""
    """What PEFT's name stands for, if that changes; keys and values are shared within a version."""
    tokens: list[int] = field(default_factory=list)
    """Made so far, the one that ends it included."""
    finish: str | None = None
    """Why no more come: "stop" at an end token, "length" at max_new_tokens."""
    slot: int = -1
    read: int = 0
    """Tokens of the prompt that its slot holds."""
    chooser: TokenChooser | None = None

    @property
    def ids(self) -> list[int]:
        """Of prompt and answer."""
        return [*self.prompt, *self.tokens]

    @property
    def shares_with(self) -> tuple[str, str]:
        """What sequences have in common whose keys and values of the same tokens are the same."""
        return self.adapter, self.version

    @property
    def longest(self) -> int:
        """Tokens of the prompt and of the longest answer it may get."""
        return len(self.prompt) + self.sampling.max_new_tokens

    @property
    def held(self) -> int:
        """Tokens whose keys its slot holds: all but the newest."""
        return len(self.prompt) + len(self.tokens) - 1 if self.tokens else self.read
