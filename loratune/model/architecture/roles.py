"""Determines the roles of a model's modules from what its classes declare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from loratune.model.architecture.recurrent import recurrent_modules
from loratune.model.architecture.structure import causal_model, decoder_of, output_layer
from loratune.protocols import CausalModel


class Role(Enum):
    """The role of a module with a matrix or a stack of matrices."""

    ATTENTION = "attention"
    """Projects the inputs or the output of attention, or of a layer with a recurrent state."""
    MLP = "mlp"
    """Projects within a layer's dense MLP."""
    SHARED_EXPERT = "shared-experts"
    """Projects within an expert that reads every token, beside those that a router selects."""
    LINEAR = "other"
    """Another projection of a layer."""
    EXPERTS = "experts"
    """Has the matrices of several experts in one parameter, so that there is no module per expert."""
    ROUTER = "router"
    """Selects experts."""
    GATE = "gate"
    """Computes one value per token, or per head of a recurrent state, such as its decay."""
    EMBEDDING = "embedding"
    HEAD = "head"


ADAPTED_BY_DEFAULT = (Role.ATTENTION, Role.MLP, Role.SHARED_EXPERT, Role.LINEAR)
"""Linear modules of the decoder that are no gates and no routers."""


def is_linear(module: Any) -> bool:
    """Return whether a module multiplies by a matrix; GPT-2's `Conv1D` holds it transposed."""
    return isinstance(module, nn.Linear | Conv1D)


def module_roles(model: CausalModel) -> dict[str, Role]:
    """Return name → role of each module that has one.

    Args:
        model: a causal language model without an adapter; quantised layers have the role of the originals.
    """
    modules, decoder = dict(model.named_modules()), decoder_of(model)
    embedding, head = model.get_input_embeddings(), output_layer(model)
    path = next(name for name, module in modules.items() if module is decoder)
    declared, routers = _recorded(model, "attentions"), _recorded(model, "router_logits")
    recurrent = {id(module) for module in recurrent_modules(decoder)}
    attention = declared + [name for name, module in modules.items() if id(module) in recurrent]
    mixtures = [name.rpartition(".")[0] for name, module in modules.items() if _holds_stacks(module)]
    roles: dict[str, Role] = {}
    for name, module in modules.items():
        if module is head or module is embedding:
            roles[name] = Role.HEAD if module is head else Role.EMBEDDING
        elif not is_within(name, [path]):  # a vision module, or an unused one
            continue
        elif is_within(name, routers):
            roles[name] = Role.ROUTER
        elif is_linear(module):
            if _is_gate(module, modules[name.rpartition(".")[0]]):
                roles[name] = Role.GATE
            elif is_within(name, attention):
                roles[name] = Role.ATTENTION
            elif is_within(name, mixtures):
                roles[name] = Role.SHARED_EXPERT
            else:  # layers have their MLP in a module of its own, which undeclared attention may be too
                roles[name] = Role.MLP if declared and _depth_in_layer(name, path) > 1 else Role.LINEAR
        elif _holds_stacks(module):
            roles[name] = Role.EXPERTS
    return roles


def linear_modules(model: CausalModel, *only: Role) -> list[str]:
    """Return the names of the linear modules that an adapter can target, in the order of the model.

    Args:
        model: see `module_roles`.
        only: roles to include; `ADAPTED_BY_DEFAULT` by default.
    """
    wanted = only or ADAPTED_BY_DEFAULT
    return [name for name, role in module_roles(model).items() if role in wanted]


def quantised_matrices(model: CausalModel) -> set[str]:
    """Return the names of the matrices that are quantised on loading: of linear modules that are no gates.

    Args:
        model: see `module_roles`.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    return {f"{name}.weight" for name in linear_modules(model) if isinstance(modules[name], nn.Linear)}


def kept_in_16_bits(model: CausalModel) -> set[str]:
    """Return the names of the linear modules that are not quantised: head, routers, gates, and all beside the decoder.

    A gate has few values, and an error of them changes a whole layer. Modules beside the decoder read images.

    Args:
        model: see `module_roles`.
    """
    quantised = quantised_matrices(model)
    return {name for name, module in model.named_modules() if is_linear(module) and f"{name}.weight" not in quantised}


def expert_stacks(model: CausalModel) -> list[str]:
    """Return the names of the parameters with the matrices of a layer's experts, [experts, ., .].

    Args:
        model: see `module_roles`.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    return [
        f"{name}.{attribute}"
        for name, role in module_roles(model).items()
        if role is Role.EXPERTS
        for attribute, parameter in modules[name]._parameters.items()
        if parameter is not None and parameter.ndim == 3
    ]


def router_modules(model: CausalModel) -> list[Any]:
    """Return the modules that select experts, in the order of the model.

    Args:
        model: a causal language model, with or without an adapter.
    """
    modules = dict(causal_model(model).named_modules())
    return [modules[name] for name in _recorded(causal_model(model), "router_logits")]


def transposed_matrices(model: CausalModel) -> set[str]:
    """Return the names of parameters of shape (inputs, outputs), as of GPT-2's `Conv1D` and gpt-oss's experts.

    Args:
        model: see `module_roles`.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    linear = {f"{name}.weight" for name, module in modules.items() if isinstance(module, Conv1D)}
    stacks = {
        name for name in expert_stacks(model) if getattr(modules[name.rpartition(".")[0]], "is_transposed", False)
    }
    return linear | stacks


def amplifies_rounding(model: CausalModel) -> bool:
    """Return whether rounding of weights may change logits a lot: through the choice of experts, or a layer's state."""
    has_state = next(recurrent_modules(decoder_of(model)), None) is not None
    return has_state or not {Role.ROUTER, Role.EXPERTS}.isdisjoint(module_roles(model).values())


class GatedMlp(NamedTuple):
    """Names of the matrices of a gated MLP, down(act(gate(x)) · up(x))."""

    gate: str
    up: str
    down: str


def gated_mlp(module: Any) -> Iterator[GatedMlp]:
    """Yield the matrices of a module that may be a gated MLP.

    Shapes do not distinguish gate and up; the caller has to test the candidates. The usual order comes first.

    Args:
        module: any module.
    """
    children = dict(module.named_children())
    matrices = [name for name, child in children.items() if hasattr(child, "in_features")]
    others = [child for name, child in children.items() if name not in matrices]
    has_activation = len(others) == 1 and not [*others[0].parameters()]
    if len(matrices) != 3 or not has_activation:
        return
    sizes = {name: (children[name].in_features, children[name].out_features) for name in matrices}
    for down in reversed(matrices):
        first, second = (name for name in matrices if name != down)
        if sizes[first] == sizes[second] == sizes[down][::-1]:
            yield GatedMlp(gate=first, up=second, down=down)
            yield GatedMlp(gate=second, up=first, down=down)


def is_rms_norm(module: Any) -> bool:
    """Return whether a module's class is called RMSNorm and has the usual ε attribute."""
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _recorded(model: CausalModel, what: str) -> list[str]:
    """Return the names of the modules whose outputs a model records as `what`, as its transformers class declares."""
    declared: Any = {}
    for part in (causal_model(model), decoder_of(model)):
        declared = declared | (getattr(part, "_can_record_outputs", None) or {})
    entries = declared.get(what, ())
    entries = entries if isinstance(entries, list | tuple) else [entries]
    stated = [getattr(entry, "target_class", entry) for entry in entries]
    classes = tuple(one for one in stated if isinstance(one, type))
    return [name for name, module in model.named_modules() if isinstance(module, classes)]


def _is_gate(module: Any, parent: Any) -> bool:
    """Return whether a linear module computes one value for each token, or for each head of a recurrent state."""
    # Modules with a recurrent state have a parameter with a value per head, such as the logarithm of its decay.
    heads = {parameter.numel() for parameter in parent._parameters.values() if parameter is not None}
    inputs, outputs = _sizes(module)
    return outputs == 1 or (4 * outputs <= inputs and not heads.isdisjoint({outputs, outputs // 2}))


def _sizes(module: Any) -> tuple[int, int]:
    """(inputs, outputs) of a linear module, quantised or not."""
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
        return inputs, outputs
    return int(module.in_features), int(module.out_features)


def _depth_in_layer(name: str, decoder: str) -> int:
    """Number of names below a layer: 2 of `layers.0.mlp.down_proj`; 0 outside of layers."""
    below = name.removeprefix(f"{decoder}.").split(".")
    number = next((place for place, part in enumerate(below) if part.isdigit()), len(below) - 1)
    return len(below) - 1 - number


def is_within(name: str, paths: Iterable[str]) -> bool:
    """Return whether a module or parameter is in one of some modules, or one of them."""
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _holds_stacks(module: Any) -> bool:
    """Return whether a module has a parameter of more than two dimensions, other than a convolution's weight."""
    is_convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return not is_convolution and any(p is not None and p.ndim > 2 for p in module._parameters.values())
