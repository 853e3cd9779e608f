"""Selects the adapters of a forward pass's rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from loratune.model.adapter.own_parameters import BASE, own_parameters
from loratune.model.architecture.structure import causal_model, is_adapted
from loratune.protocols import AdaptedModel, CausalModel


class AdapterSwitch:
    """The adapters of a model, of which each pass uses some.

    Args:
        model: a causal language model, with or without PEFT adapters.
    """

    def __init__(self, model: CausalModel) -> None:
        self._adapted = model if is_adapted(model) else None
        self._own = own_parameters(causal_model(model))
        self._selected: str | None = None
        configs = self._adapted.peft_config if self._adapted else {}
        # PEFT computes rows of several adapters at once, but not with DoRA. A layer whose parameters an adapter targets
        # refuses a pass of several adapters, whichever they are.
        self._apart = {name for name in configs if configs[name].use_dora or self._own.is_apart(name)}
        if any(getattr(config, "target_parameters", None) for config in configs.values()):
            self._apart |= {BASE, *configs}

    def vocabulary(self, adapter: str) -> int:
        """Return an adapter's vocabulary size; prompt ids must be below it."""
        return self._own.vocabulary(adapter)

    def is_apart(self, adapter: str) -> bool:
        """Return whether an adapter's rows need passes without other adapters' rows; `BASE` for none."""
        return adapter in self._apart

    def select(self, names: Sequence[str]) -> dict[str, Any]:
        """Have each row of the next pass computed with its adapter, by PEFT's own mixed forward if there are several.

        Args:
            names: PEFT's name of each row's adapter.

        Returns:
            Arguments of the model's call.
        """
        if self._adapted is None:
            return {}
        is_mixed = len(set(names)) > 1
        self._switch(self._adapted, next(name for name in names if name != BASE) if is_mixed else names[0])
        self._own.select(names)
        return {"adapter_names": list(names)} if is_mixed else {}

    def close(self) -> None:
        """Switch adapters on again."""
        if self._adapted and self._selected == BASE:
            self._adapted.base_model.enable_adapter_layers()
        if self._adapted:
            self._own.select([self._adapted.active_adapter])
        self._selected = None

    def _switch(self, model: AdaptedModel, adapter: str) -> None:
        if adapter == self._selected:
            return
        if adapter == BASE:
            with warnings.catch_warnings():  # the warning claims that trained biases stay in the base; here they do not
                warnings.simplefilter("ignore", UserWarning)
                model.base_model.disable_adapter_layers()
        else:
            model.base_model.enable_adapter_layers()
            model.set_adapter(adapter)
        self._selected = adapter
