"""Proves an exported adapter: it is loaded as other programs load it, and compared with the adapter of the run."""

from __future__ import annotations

from pathlib import Path

from loratune import console
from loratune.errors import Exit, LoratuneError, counted
from loratune.model.adapter.attach import check_adapter
from loratune.model.adapter.completeness import tensor_shapes
from loratune.model.adapter.other_layouts import in_peft_layout
from loratune.model.adapter.reloaded import own_logits, reloaded_logits
from loratune.model.architecture.served_class import ServedClass
from loratune.model.files import weight_files
from loratune.model.memory import free_main_memory_bytes
from loratune.runs.exported import ServedAdapter
from loratune.runs.opening import AdapterSource

MEMORY = 1.2
"""Memory for running a model, as a multiple of its weights."""
NOT_HERE = (
    "the base is not on this machine: the adapter keeps the names of the training, and was not loaded. A server that "
    "loads the base with its parts for images ignores an adapter with the names of the language model alone; "
    "--base-model with the base's folder settles it"
)


def prove_served(source: AdapterSource, folder: Path, base: Path, served: ServedClass) -> ServedAdapter:
    """Load an exported adapter in the class that programs load its base in, and compare logits.

    Args:
        source: the adapter.
        folder: its export.
        base: folder of its base.
        served: the class; its own names are the export's.

    Raises:
        LoratuneError: the class does not have exactly the modules of the export, or its logits differ from those of the
            adapter in the class of the training.
    """
    if in_peft_layout(folder, served.shapes) != folder:
        raise LoratuneError(f"{folder}: its tensors do not have the names of {served.name}", Exit.MODEL)
    check_adapter(folder, served.shapes)
    modules = len({name.partition(".lora_")[0] for name in tensor_shapes(folder)})
    needed, free = MEMORY * sum(path.stat().st_size for path in weight_files(base)), free_main_memory_bytes()
    if needed > free:
        console.warn(
            f"the exported adapter is not run: its base takes {console.memory(needed)} of memory, and "
            f"{console.memory(free)} are free. Its names and shapes are those of {served.name}"
        )
        return ServedAdapter(served.name, modules)
    with console.status(f"loading the adapter in {served.name}"):
        own, found = own_logits(base, source.adapter), reloaded_logits(base, folder, served.auto)
    difference = found.difference(own)
    if not difference <= own.rounding:  # False for NaN
        raise LoratuneError(
            f"the exported adapter is not the run's, and has been removed: in {served.name}, a logit differs by "
            f"{difference:.2g}, where rounding explains {own.rounding:.2g}. The adapter itself changes a logit by at "
            f"most {own.change:.2g}, and the exported one by {found.change:.2g}",
            Exit.MODEL,
        )
    if not found.change:
        console.warn("the adapter changes no logit: was it trained?")
    return ServedAdapter(served.name, modules, difference, found.change)


def show_served(proved: ServedAdapter) -> None:
    """Print what was proved."""
    rows = [("loads in", f"{proved.model_class}, {counted(proved.modules, 'adapted module')}")]
    if proved.largest_difference is not None and proved.largest_change is not None:
        rows.append(
            (
                "logits",
                f"{proved.largest_difference:.2g} apart from the run's; the base's are changed by up to "
                f"{proved.largest_change:.2g}",
            )
        )
    console.table(rows, title="verified")
