"""What commands can be asked for and say, by name: flags, options and tables take the names from here.

Nothing else is imported, since every help page needs them.
"""

from typing import Any, Literal, TypeAlias, get_args

ExportFormat: TypeAlias = Literal["gguf", "ollama", "vllm", "sglang", "adapter", "bnb4"]
ServerName: TypeAlias = Literal["vllm", "sglang"]
"""A program that serves an adapter beside its base."""
GgufType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0"]
"""Of a GGUF file's matrices."""
Dtype: TypeAlias = Literal["bfloat16", "float16", "float32"]
"""Of weights that are not quantised."""
MergeBase: TypeAlias = Literal["auto", "original", "dequantized"]
"""What the adapter of a quantised base is added to; auto takes the one that comes closer to the training."""
AddedTo: TypeAlias = Literal["original", "dequantized"]
"""What it was added to."""
BaseChecked: TypeAlias = Literal["every byte", "sampled", "nothing"]
"""How much of a base's weights was compared with those of the training."""
Proof: TypeAlias = Literal["files and logits", "files", "nothing"]
"""What of a merged model has been compared with base + adapter."""
Combination: TypeAlias = Literal["linear", "svd", "ties", "dare_ties"]
"""How several adapters become one."""
BestOf: TypeAlias = Literal["loss", "exact"]
"""What says how good a validation is: its loss, or how many answers are exact."""
BestBy: TypeAlias = Literal["auto", BestOf]
"""What may be asked to say it; auto takes exact answers where most can be exact."""


def listed(choices: Any) -> str:
    """The names as a help page writes them: `f32|f16`."""
    return "|".join(get_args(choices))
