"""What a comparison of an export's logits with the merged model's has to show."""

from __future__ import annotations

from dataclasses import dataclass

from loratune.choices import GgufType
from loratune.delivery.verification.proof import check_parity
from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.runs.verification import Bounds, Parity

SAME = Bounds(1e-5, 1e-5, 0.0)
GGUF_BOUNDS: dict[GgufType, Bounds] = {
    "f32": SAME,
    "bf16": Bounds(0.1, 5e-3, 0.005),
    "f16": Bounds(0.02, 3e-4, 0.005),
    # Measured on Qwen2.5 0.5B: logits differ by 0.01 of the largest.
    "q8_0": Bounds(0.2, 0.05, 0.02),
}


@dataclass(frozen=True)
class FileProof:
    """What a comparison of a GGUF file's logits has shown."""

    logits: Parity
    """Beside the merged model's."""
    read_by: str
    """What read the file: transformers, or loratune where transformers does not read the architecture."""
    parameters: int
    """Number of parameters that are the merged model's but for rounding; 0 where logits alone were compared."""
    rounding: list[str]
    """How the type of the weights changes the logits beyond its usual bounds, although the file is right."""


def require_same(parity: Parity, bounds: Bounds, what: str) -> None:
    """Raise if logits are out of bounds.

    Args:
        parity: of the merged model and what was written of it.
        bounds: for the type of the written weights.
        what: name of what was written.

    Raises:
        LoratuneError: they are.
    """
    problems = check_parity(parity, bounds)
    if problems:
        raise LoratuneError(
            f"{what} is not the merged model, and has been removed:\n{bullet_list(problems)}", Exit.MODEL
        )
