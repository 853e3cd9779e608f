"""An adapter's file of any program: what its names say about the modules of the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.foreign_names import LORA, places_of
from loratune.model.adapter.stacks import WRAPPED, wrapped_places
from loratune.model.adapter.tensors import PREFIX
from loratune.model.architecture.other_names import MEGATRON, Matrix, matrix_of, sides_of
from loratune.model.architecture.vocabulary import vocabulary_of

Places = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class LoraName:
    """The name of a matrix of LoRA."""

    module: str
    """As the file has it."""
    side: str
    """A or B."""
    matrix: Matrix
    """What the module stands for."""
    inner: int = 0
    """How often PEFT has wrapped the module."""


@dataclass(frozen=True)
class ForeignFile:
    """An adapter's file."""

    folder: Path
    shapes: Mapping[str, Sequence[int]]
    """Tensor name → shape."""
    lora: Mapping[str, LoraName]
    """Of LoRA's matrices: tensor name → what it says."""
    places: Places
    """Result of `places_of` for the base."""
    hidden: int
    """Width of the base."""

    @classmethod
    def of(cls, folder: Path, shapes: Mapping[str, Sequence[int]], base: Mapping[str, Sequence[int]]) -> ForeignFile:
        """Interpret the names in an adapter's file.

        Args:
            folder: the adapter's folder, for messages.
            shapes: tensor name → shape.
            base: parameter name → shape, of the base.

        Raises:
            LoratuneError: the file is a checkpoint of Megatron itself.
        """
        places = places_of(base)
        if strange := [name for name in shapes if MEGATRON.search(name)]:
            raise LoratuneError(
                f"{folder}: its tensors have the names of Megatron's own checkpoints, first {strange[0]}; export the "
                "adapter in PEFT's layout there",
                Exit.MODEL,
            )
        endings = {_ending(place) for place in places}
        found = {}
        for name in shapes:
            if match := LORA.fullmatch(name):
                wrapped = match["module"]
                module = wrapped
                while module.endswith(WRAPPED):
                    module = module.removesuffix(WRAPPED)
                matrix = Matrix(module) if _ending(module) in endings else matrix_of(module)
                found[name] = LoraName(module, match["side"], matrix, wrapped.count(WRAPPED))
        embedding = base.get(vocabulary_of(base).embedding, (0, 0))
        return cls(folder, shapes, found, places, embedding[1])

    @property
    def has_peft_s_names(self) -> bool:
        """Whether the names of LoRA's matrices are as PEFT writes them, for any base."""
        return all(name == peft_name(one.module, one.side, one.inner) for name, one in self.lora.items()) and not any(
            one.matrix != Matrix(one.module) for one in self.lora.values()
        )

    @property
    def is_peft_s(self) -> bool:
        """Whether PEFT can have written the file for this base."""
        are_known = all(one.matrix.target in self.places for one in self.lora.values())
        return self.has_peft_s_names and are_known and not self.has_exchanged_sides

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Target, as the file names it → (columns, rows) of its LoRA; -1 where they are not those of the matrix."""
        found: dict[str, tuple[int, int]] = {}
        for name, one in self.lora.items():
            columns, rows = found.get(one.matrix.target, (-1, -1))
            if len(self.shapes[name]) == 2 and not one.matrix.is_share:
                columns, rows = (self.shapes[name][1], rows) if one.side == "A" else (columns, self.shapes[name][0])
            found[one.matrix.target] = columns, rows
        return found

    @property
    def has_exchanged_sides(self) -> bool:
        """Whether LoRA on stacks has inputs and outputs exchanged, as PEFT had them before 0.19."""
        for name, one in self.lora.items():
            is_on_stack = self.places.get(one.module) == ()
            stack = self.stack_of(one.module, one.inner) if is_on_stack else None
            sides = sides_of(stack, self.places[stack], self.hidden) if stack else None
            axis = 1 if one.side == "A" else 0
            if sides and sides[0] != sides[1] and len(self.shapes[name]) == 2:
                return self.shapes[name][axis] != sides[one.side == "B"]
        return False

    def stack_of(self, module: str, inner: int) -> str | None:
        """Return the parameter with a stack that LoRA in PEFT's layout is on; None if it is on no stack.

        Args:
            module: the module's name in the base.
            inner: see `LoraName`.
        """
        given = {name.removeprefix(PREFIX): shape for name, shape in self.shapes.items()}
        places = wrapped_places(module, self.stacks_of(module), self.places, given)
        return places.get(module + WRAPPED * inner)

    def stacks_of(self, module: str) -> list[str]:
        """Return the parameters of a module of the base that are stacks, in the base's order."""
        return [name for name, shape in self.places.items() if len(shape) == 3 and name.rpartition(".")[0] == module]


def peft_name(module: str, side: str, inner: int = 0) -> str:
    """Return PEFT's name of a matrix of LoRA.

    Args:
        module: the module's name in the base.
        side: A or B.
        inner: how often PEFT has wrapped the module; see `LoraName`.
    """
    return f"{PREFIX}{module}{WRAPPED * inner}.lora_{side}.weight"


def _ending(name: str) -> str:
    """Return the last parts of a name, which stay the same in every class of a model."""
    return ".".join(name.split(".")[-3:])
