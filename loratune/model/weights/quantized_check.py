"""Checks a loaded model: what is quantised is what was meant to be, and each matrix of a stack is in its place."""

from __future__ import annotations

from pathlib import Path

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

from loratune.errors import Exit, LoratuneError, agreeing, bullet_list
from loratune.model.architecture.file_layout import FileLayout, file_layout
from loratune.model.files import weight_files
from loratune.model.weights.quantized_stack import QuantizedParameter, is_quantized_stack
from loratune.model.weights.tensor_files import TensorFiles
from loratune.protocols import CausalModel

COMPARED_VALUES = 64
"""First values of each matrix that are compared with the files: a block with a scale."""
MOST_APART = 0.2
"""Largest error of a quantised value, in relation to the largest of its block: codes are 0.3 apart at most."""


def check_quantised(model: CausalModel, matrices: set[str], stacks: set[str], folder: Path) -> None:
    """Compare a quantised model with what was to be quantised, and its stacks with the files.

    Args:
        model: the model on its device.
        matrices: names of the parameters that bitsandbytes was to quantise.
        stacks: names of the stacks that were to be quantised.
        folder: the model's folder.

    Raises:
        LoratuneError: a parameter is quantised that should not be, or is not, or a stack's matrices are mixed up.
    """
    found = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)
    }
    held = {name: parameter for name, parameter in model.named_parameters() if is_quantized_stack(parameter)}
    wanted, quantised = matrices | stacks, found | held.keys()
    problems = [f"{name} is quantised, and should not be" for name in quantised - wanted]
    problems += [f"{name} is not quantised" for name in wanted - quantised]
    if held and not problems:
        files = TensorFiles(weight_files(folder))
        layout = file_layout(model, files.infos)
        for name, parameter in held.items():
            wrong = _misplaced(name, parameter, layout, files)
            differ = agreeing(len(wrong), "differ from the files")
            problems += [f"{name}: {len(wrong)} of its matrices {differ}, first {one}" for one in wrong[:1]]
    if problems:
        raise LoratuneError(
            f"{folder}: quantised otherwise than it was meant to be:\n{bullet_list(sorted(problems), limit=5)}\n"
            "please report this with the versions that `loratune --version` and pip list show",
            Exit.MODEL,
        )


def _misplaced(name: str, parameter: QuantizedParameter, layout: FileLayout, files: TensorFiles) -> list[int]:
    """Return the matrices of a stack whose first values are not those of the files, but for rounding."""
    wrong = []
    for number in range(len(parameter)):
        original = layout.first_part(name, number, files).reshape(-1)[:COMPARED_VALUES].float()
        found = parameter.first_values(number, len(original)).cpu().float()
        if not torch.all((found - original).abs() <= MOST_APART * original.abs().max()):
            wrong.append(number)
    return wrong
