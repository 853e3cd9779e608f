"""The adapters on an engine's model, of which none changes the base."""

from __future__ import annotations

from loratune.errors import Exit, LoratuneError, counted
from loratune.model.adapter.own_parameters import own_parameters
from loratune.model.adapter.placing import put_adapter, remove_adapter, replace_adapter
from loratune.model.adapter.reading import ReadAdapter
from loratune.model.architecture.structure import is_adapted
from loratune.model.kernels.lora_linear import use_fused_lora
from loratune.protocols import CausalModel


class AttachedAdapters:
    """Puts adapters on a model, and makes sure that the base is still what it was for all others.

    Args:
        model: the base, with or without adapters.
    """

    def __init__(self, model: CausalModel) -> None:
        self.model = model
        """PEFT's wrapper of the base, as soon as there is an adapter."""
        self._own = own_parameters(model)
        self._base = self._own.fingerprint()

    @property
    def names(self) -> set[str]:
        """PEFT's names of the adapters that are on the model."""
        return {*self.model.peft_config} if is_adapted(self.model) else set()

    def put(self, read: ReadAdapter, name: str) -> None:
        """Put an adapter on the model.

        Args:
            read: the adapter.
            name: PEFT's name for it, which no other has.

        Raises:
            LoratuneError: PEFT refuses it, or changes the base for it.
        """
        try:
            self.model = put_adapter(self.model, read, name)
            self._require_same_base(read)
        except BaseException:
            if is_adapted(self.model) and len(self.names) > 1:
                remove_adapter(self.model, name)
            raise
        use_fused_lora(self.model)

    def exchange(self, read: ReadAdapter, name: str, spare: str) -> str:
        """Put an adapter on the model in the place of another one, of the same layout if possible.

        Args:
            read: the adapter.
            name: PEFT's name of the other one.
            spare: a name that no adapter has.

        Returns:
            PEFT's name for it: one of the two names.

        Raises:
            LoratuneError: see `put`; the other one stays.
        """
        if not is_adapted(self.model):
            raise RuntimeError("there is no adapter to exchange")
        if replace_adapter(self.model, read, name):
            return name
        self.put(read, spare)
        remove_adapter(self.model, name)
        return spare

    def _require_same_base(self, read: ReadAdapter) -> None:
        found = self._own.fingerprint()
        changed = sorted(key for key in {*self._base, *found} if self._base.get(key) != found.get(key))
        if changed:
            raise LoratuneError(
                f"{read.folder}: loading it has changed {counted(len(changed), 'parameter')} of the base, first "
                f"{changed[0]}, so that the base and other adapters would give other answers; merge it, and give the "
                "merged model",
                Exit.MODEL,
            )
