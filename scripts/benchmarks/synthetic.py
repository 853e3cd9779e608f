"""Writes a model with Qwen2.5-7B's shapes and random weights, and an adapter for it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16", "hidden_act": "silu",
    "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "bos_token_id": 151643,
    "eos_token_id": 151645, "use_sliding_window": False,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=28)


def run(arguments: argparse.Namespace) -> None:
    """Write random weights with Qwen2.5-7B's shapes, and a rank-8 adapter on all its linear layers."""
    size = write_model(arguments.output, QWEN_7B | {"num_hidden_layers": arguments.layers})
    print(
        f"{size / 1e9:.1f} GB of weights in {arguments.output / 'base'}, an adapter in {arguments.output / 'adapter'}"
    )


def write_model(output: Path, config: dict[str, Any], embedding_scale: float = 1.0) -> int:
    """Write a Qwen2 of random weights to output/base and an adapter for it to output/adapter.

    Args:
        output: folder for both.
        config: config.json of the base.
        embedding_scale: factor of the embedding's values, which else have a standard deviation of 0.02.

    Returns:
        The bytes of the base.
    """
    from loratune.model.weights.tensor_files import plan_shards, write_shards
    from loratune.runs.tokenizer_files import copy_tokenizer_files

    base, adapter = output / "base", output / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    (base / "config.json").write_text(json.dumps(config, indent=2))
    copy_tokenizer_files(Path(__file__).resolve().parent.parent.parent / "loratune" / "assets" / "tiny-qwen", base)
    infos = tensors_of(config)
    write_shards(base, plan_shards(infos, 5_000_000_000), noise_pieces(embedding_scale))
    write_random_adapter(adapter, infos, base)
    return sum(info.nbytes for info in infos)


def tensors_of(config: dict[str, Any]) -> list:
    """Return names and shapes of the tensors of a Qwen2."""
    import torch

    from loratune.model.weights.tensor_files import TensorInfo

    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    key_value = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    linear = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        shapes |= {f"{start}{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"{start}self_attn.{name}_proj.bias": (linear[f"self_attn.{name}_proj"][0],) for name in "qkv"}
        shapes |= {f"{start}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    return [TensorInfo(name, torch.bfloat16, shape) for name, shape in shapes.items()]


def noise_pieces(embedding_scale: float):
    """Return a function that yields a tensor's values in pieces: slices of one block of noise, or ones for norms."""
    import torch

    noise = torch.randn(64_000_037) * 0.02

    def pieces(info):
        written, total = 0, info.nbytes // 2
        scale = embedding_scale if "embed_tokens" in info.name else 1.0
        while written < total:
            count = min(16_000_000, total - written)
            offset = int(torch.randint(len(noise) - count, ()))
            values = torch.ones(count) if info.name.endswith("norm.weight") else noise[offset : offset + count] * scale
            yield values.to(torch.bfloat16)
            written += count

    return pieces


def write_random_adapter(adapter: Path, infos: list, base: Path) -> None:
    """Write a PEFT folder with rank 8 on every projection."""
    import torch
    from safetensors.torch import save_file

    matrices = {}
    for info in infos:
        module = info.name.removesuffix(".weight")
        if module.endswith("_proj"):
            matrices[f"base_model.model.{module}.lora_A.weight"] = torch.randn(8, info.shape[1]) * 0.02
            matrices[f"base_model.model.{module}.lora_B.weight"] = torch.randn(info.shape[0], 8) * 0.02
    save_file(matrices, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
