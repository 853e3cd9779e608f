"""The class that servers load a model folder in, and the names that the trained modules have there.

loratune trains a language model without the parts that read images, if transformers has a class for that. vLLM and
SGLang load the whole, in which the same modules have other names, and apply no adapter with the names of the training.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from loratune.model.architecture.file_layout import file_layout
from loratune.model.config import empty_model, load_config
from loratune.model.files import weight_files
from loratune.model.weights.tensor_files import TensorFiles


@dataclass(frozen=True)
class ServedClass:
    """A model folder in the class that servers load."""

    name: str
    """transformers' name of the class."""
    trained: str
    """transformers' name of the class that loratune trains."""
    auto: Any
    """transformers' class that loads it; None for that of `auto_class`."""
    shapes: dict[str, tuple[int, ...]]
    """Parameter name → shape."""
    trained_shapes: dict[str, tuple[int, ...]]
    """Parameter name → shape, in the class that loratune trains."""
    parameters: dict[str, str]
    """Parameter name in the class that loratune trains → name in this one."""

    @property
    def modules(self) -> dict[str, str]:
        """Module name in the class that loratune trains → name in this one, of modules with parameters."""
        return {_module(name): _module(served) for name, served in self.parameters.items()}

    @property
    def as_trained(self) -> ServedClass:
        """The class that loratune trains, as programs load it that want the language model."""
        names = {name: name for name in self.parameters}
        shapes = self.trained_shapes
        return ServedClass(self.trained, self.trained, None, shapes, shapes, names)

    @property
    def has_own_names(self) -> bool:
        """Whether a module has another name than in the training."""
        return any(name != served for name, served in self.parameters.items())


def served_class(folder: Path) -> ServedClass:
    """Compare the names in both classes, by the tensors of the files that each makes its parameters of.

    Args:
        folder: model folder; only its config and the headers of its weights are read.

    Raises:
        LoratuneError: the config is not supported, or transformers cannot make a model of it.
    """
    config = load_config(folder)
    held = TensorFiles(weight_files(folder)).infos
    auto = _auto_class(type(config))
    trained_model, served_model = empty_model(config), empty_model(config, auto)
    trained, served = (file_layout(model, held) for model in (trained_model, served_model))
    of_tensor = {tensor: name for name in served.parts for tensor in served.tensors_of(name)}
    parameters = {
        name: of_tensor[tensor]
        for name in trained.parts
        for tensor in trained.tensors_of(name)[:1]
        if tensor in of_tensor
    }
    shapes, trained_shapes = _shapes(served_model), _shapes(trained_model)
    # A tied head is in no file.
    parameters |= {name: name for name in trained_shapes if name not in parameters and name in shapes}
    return ServedClass(
        type(served_model).__name__, type(trained_model).__name__, auto, shapes, trained_shapes, parameters
    )


def longest_known(name: str, modules: Iterable[str]) -> str | None:
    """Return the longest beginning of a dotted name that is a known module; None if there is none."""
    known, parts = set(modules), name.split(".")
    return next((part for end in range(len(parts), 0, -1) if (part := ".".join(parts[:end])) in known), None)


def _auto_class(config_class: Any) -> Any:
    """Return transformers' class that loads all of a folder."""
    is_nested = config_class in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if is_nested else AutoModelForCausalLM


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(values.shape) for name, values in model.state_dict().items()}
