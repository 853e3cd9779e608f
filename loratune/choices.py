"""What merge and export can be asked for, by name: flags, options and the tables behind them take the names from here.

Nothing else is imported, since every help page needs them.
"""

from typing import Any, Literal, TypeAlias, get_args

ExportFormat: TypeAlias = Literal["gguf", "ollama", "vllm", "adapter", "bnb4"]
GgufType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0"]
"""Of a GGUF file's matrices."""
Dtype: TypeAlias = Literal["bfloat16", "float16", "float32"]
"""Of weights that are not quantised."""
MergeBase: TypeAlias = Literal["auto", "original", "dequantized"]
"""What the adapter of a quantised base is added to; auto takes the one that comes closer to the training."""
Combination: TypeAlias = Literal["linear", "svd", "ties", "dare_ties"]
"""How several adapters become one."""


def listed(choices: Any) -> str:
    """The names as a help page writes them: `f32|f16`."""
    return "|".join(get_args(choices))
