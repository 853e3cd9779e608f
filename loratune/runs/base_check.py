"""Checks that a base is the one that an adapter was trained on, and that template and vocabulary fit.

Samples of its weights are compared before it is loaded, all bytes meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratune.choices import BaseChecked
from loratune.errors import Exit, LoratuneError, counted, refusal
from loratune.runs.fingerprint import FULL, SAMPLED, TENSORS, sampled_fingerprint
from loratune.runs.folder import values_sha256
from loratune.runs.opening import AdapterSource
from loratune.runs.tensor_hashes import TensorHashes
from loratune.runs.tokenizer_files import count_tokens

SHOWN_TENSORS = 3


class BaseCheck:
    """Compares a base with the record of the trained one.

    Args:
        source: the adapter.
        name: the user's name of the base.
        folder: the base's folder.
        hashes: hashes of its tensors, shared by the adapters of a base.
        force: warn instead of raising.
        fits: raises if the adapter cannot be attached to this base, in which case --force is not suggested.

    Raises:
        LoratuneError: the samples show another model.
    """

    def __init__(
        self,
        source: AdapterSource,
        name: str,
        folder: Path,
        hashes: TensorHashes,
        force: bool = False,
        fits: Callable[[], object] | None = None,
    ) -> None:
        self._source, self._name, self._force, self._fits = source, name, force, fits
        self._hashes = hashes
        self._known = known_hashes(source)
        self._warnings = source.remarks
        self._is_open = FULL in self._known
        if source.manifest is None:
            self._warnings.append(
                "the checkpoint lies outside of its run: its base is checked, its prompt settings are not known"
                if self._known
                else "the adapter has no loratune manifest: base and prompt template could not be checked"
            )
        if not self._known and source.manifest is None:
            return
        found = sampled_fingerprint(folder, hashes.paths)
        different = [key for key, value in found.items() if self._known.get(key) != value]
        if different:
            self._is_open = False
            self._refuse([key.removesuffix("_sha256") for key in different], SAMPLED in different)
        elif self._is_open:
            self._hashes.start()

    def finish(self) -> list[str]:
        """Wait until all bytes are compared.

        Returns:
            Warnings about what could not be checked, or was forced.

        Raises:
            LoratuneError: it is another model.
        """
        if self._is_open and values_sha256(self._hashes.result()) != self._known[FULL]:
            self._is_open = False
            self._refuse(["weights"], True)
        return self._warnings

    def _refuse(self, different: list[str], of_weights: bool) -> None:
        verb = "differs" if different in (["config"], ["tokenizer"]) else "differ"
        message = (
            f"the adapter was trained on {self._trained_name()} and {self._name} is another model: "
            f"{', '.join(different)} {verb}{self._tensors() if of_weights else ''}"
        )
        if not self._force:
            can_insist = self._fits is None or refusal(self._fits) is None
            other = ", or insist with --force" if can_insist else "; to this one it does not fit"
            raise LoratuneError(f"{message}. Give the right base with --base-model{other}", Exit.MODEL)
        self._warnings.append(message)

    def _trained_name(self) -> str:
        if self._source.manifest:
            return self._source.trained_base.name
        identity = self._source.checkpoint.identity if self._source.checkpoint else {}
        return str(identity.get("settings", {}).get("model.base", "another base"))

    def _tensors(self) -> str:
        """List the tensors that differ, if the record has a hash per tensor."""
        known = self._known.get(TENSORS)
        if not isinstance(known, dict):
            return ""
        found = self._hashes.result()
        names = sorted(name for name in known.keys() | found.keys() if known.get(name) != found.get(name))
        shown = ", ".join(names[:SHOWN_TENSORS]) + (", …" if len(names) > SHOWN_TENSORS else "")
        return f" in {len(names)} of {counted(len(known.keys() | found.keys()), 'tensor')} ({shown})"


def check_same_base(
    source: AdapterSource, name: str, folder: Path, weight_files: Sequence[Path], force: bool = False
) -> list[str]:
    """Compare a base with the trained one, completely.

    Args:
        source, name, folder, force: see `BaseCheck`.
        weight_files: the base's safetensors files.

    Returns:
        Warnings about what could not be checked, or was forced.

    Raises:
        LoratuneError: it is another model.
    """
    return BaseCheck(source, name, folder, TensorHashes(weight_files), force).finish()


def known_hashes(source: AdapterSource) -> dict[str, Any]:
    """Return the hashes of the base that an adapter was trained on; for a checkpoint, those of its own seal."""
    known = dict(source.trained_base.hashes) if source.manifest else {}
    rest = source.checkpoint.identity.get("rest", {}) if source.checkpoint else {}
    sealed = {key.removeprefix("base "): value for key, value in rest.items() if key.startswith("base ")}
    is_same = all(known.get(key, value) == value for key, value in sealed.items())
    return known | sealed if is_same else sealed  # otherwise the run continued with another base


def how_checked(known: Mapping[str, Any]) -> BaseChecked:
    """Return how much of a base's weights the recorded hashes cover."""
    return "every byte" if FULL in known else "sampled" if SAMPLED in known else "nothing"


def check_same_template(source: AdapterSource, sha256: str) -> None:
    """Check that the chat template equals that of the training.

    Args:
        source: the adapter.
        sha256: hash of the present template, `Encoder.template_sha256`.

    Raises:
        LoratuneError: the template differs.
    """
    sealed = source.checkpoint.identity.get("rest", {}).get("template") if source.checkpoint else None
    known = sealed or (source.manifest.template.sha256 if source.manifest else None)
    if source.manifest and known != sha256:
        raise LoratuneError(
            f"{source.adapter}: the prompt template is not the one of the training: the base's chat template has "
            "changed since; restore it, or use the run folder rather than a checkpoint",
            Exit.MODEL,
        )


def check_vocabulary(source: AdapterSource, base: Path, base_rows: int, rows: int) -> list[str]:
    """Compare the number of embedding rows with the number of the tokenizer's tokens.

    Args:
        source: the adapter.
        base: the base's folder.
        base_rows: embedding rows of the base.
        rows: embedding rows with the adapter.

    Returns:
        Warnings about a resized vocabulary.

    Raises:
        LoratuneError: the adapter's tokenizer has tokens without a row, while the base's has not.
    """
    folder = source.tokenizer_folder(base)
    tokens = 0 if source.manifest or folder == base else count_tokens(folder)
    if tokens > rows and tokens > count_tokens(base):
        raise LoratuneError(
            f"{source.adapter}: its tokenizer has {tokens} tokens and the model {rows} rows: its vocabulary was "
            "resized in training, and the new rows are not in the adapter's file. Save it again where it was trained, "
            "with PEFT's save_pretrained(…, save_embedding_layers=True)",
            Exit.MODEL,
        )
    if rows == base_rows:
        return []
    return [f"{source.adapter} was trained with a vocabulary of {rows} rows and brings them; the base has {base_rows}"]
