"""Random models of a few thousand parameters, in the layout that each family's files have on the hub.

`make_tiny_model(kind, folder)` writes one. Where `save_pretrained` writes another layout than the hub's files have, the
files are changed: experts in one tensor, weights of multi-token prediction, names without a prefix.

`scripts/gpu_check` imports this module too, so it needs nothing but loratune and its packages.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING

from loratune.model.config import auto_class
from loratune.runs.tokenizer_files import copy_tokenizer_files

TINY_QWEN = Path(__file__).resolve().parent.parent / "loratune" / "assets" / "tiny-qwen"
WIDTH = 32
SIZES: dict[str, Any] = {
    "vocab_size": 3008, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": 3002,
    "pad_token_id": 3000,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
DELTA_NET: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
LATENT: dict[str, Any] = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
WINDOWS: dict[str, Any] = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
IMAGES: dict[str, Any] = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDTH, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "num_position_embeddings": 16,
}  # fmt: skip
PICTURES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
MARKS: dict[str, Any] = {
    "image_token_id": 3003, "video_token_id": 3004, "vision_start_token_id": 3005, "vision_end_token_id": 3006,
}  # fmt: skip
TEXT_POSITIONS: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
GEMMA: dict[str, Any] = WINDOWS | {"head_dim": 8, "query_pre_attn_scalar": 8}
QWEN3_5 = SIZES | DELTA_NET
QWEN3_5_MOE = QWEN3_5 | EXPERTS | {"shared_expert_intermediate_size": 16}
GEMMA_4: dict[str, Any] = SIZES | WINDOWS | {
    "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 3008,
    "num_kv_shared_layers": 0,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": SIZES,
    "qwen3": SIZES,
    "llama": SIZES,
    "mistral": SIZES,
    "cohere2": SIZES | WINDOWS | {"head_dim": 8},
    "deepseek_v3": SIZES | ROUTED | LATENT | {"n_group": 2},
    "ernie4_5": SIZES | {"head_dim": 8},
    "gemma2": SIZES | GEMMA,
    "gemma3": {"text_config": SIZES | GEMMA, "vision_config": PICTURES, "mm_tokens_per_image": 4,
               "image_token_index": 3003, "boi_token_index": 3004, "eoi_token_index": 3005},
    "gemma3_text": SIZES | GEMMA,
    "gemma4": {"text_config": GEMMA_4, "vision_config": PICTURES | {"num_key_value_heads": 2, "head_dim": 8,
               "position_embedding_size": 16}, "audio_config": None, "image_token_id": 3003, "video_token_id": 3004,
               "audio_token_id": 3005, "boi_token_id": 3006, "eoi_token_id": 3007, "boa_token_id": 3006},
    "gemma4_text": GEMMA_4,
    "glm4": SIZES | {"head_dim": 8},
    "glm4_moe": SIZES | ROUTED | {"head_dim": 8},
    "gpt2": {"vocab_size": 3008, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 2048, "eos_token_id": 3002,
             "bos_token_id": 3001, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_oss": SIZES | WINDOWS | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoehybrid": SIZES | {
        "layer_types": ["mamba", "attention"], "num_local_experts": 0, "num_experts_per_tok": 0, "mamba_n_heads": 8,
        "shared_intermediate_size": 48, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2,
    },
    "hunyuan_v1_dense": SIZES | {"head_dim": 8},
    "internlm3": SIZES | {"head_dim": 8},
    "lfm2": SIZES | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "minicpm3": SIZES | LATENT,
    "ministral3": SIZES | {"head_dim": 8},
    "mixtral": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "olmo3": SIZES | WINDOWS,
    "phi3": SIZES | {"sliding_window": None},
    "qwen2_5_vl": MARKS | {
        "text_config": SIZES | {"rope_parameters": TEXT_POSITIONS},
        "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
                          "out_hidden_size": WIDTH, "spatial_merge_size": 2, "temporal_patch_size": 2,
                          "window_size": 16, "fullatt_block_indexes": [0]},
    },
    "qwen2_moe": SIZES | EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_5": MARKS | {"text_config": QWEN3_5 | {"tie_word_embeddings": True}, "vision_config": IMAGES,
                        "tie_word_embeddings": True},
    "qwen3_5_moe": MARKS | {"text_config": QWEN3_5_MOE, "vision_config": IMAGES},
    "qwen3_5_moe_text": QWEN3_5_MOE,
    "qwen3_5_text": QWEN3_5 | {"tie_word_embeddings": True},
    "qwen3_moe": SIZES | EXPERTS | {"head_dim": 8, "norm_topk_prob": True},
    "qwen3_next": QWEN3_5_MOE,
    "qwen3_vl": MARKS | {
        "text_config": SIZES | {"head_dim": 8, "rope_parameters": TEXT_POSITIONS | {"mrope_interleaved": True}},
        "vision_config": IMAGES | {"deepstack_visual_indexes": [0]},
    },
    "seed_oss": SIZES | {"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "smollm3": SIZES,
}  # fmt: skip
"""model_type → arguments of its config class."""
MIXTURES = tuple(
    kind
    for kind, values in CONFIGS.items()
    if any(values.get("text_config", values).get(f"{word}_experts") for word in ("num", "num_local", "n_routed"))
)
"""Families with routed experts."""
WITH_PREDICTION = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
"""Families whose files on the hub have weights for multi-token prediction, which transformers does not load."""
WITH_FUSED_EXPERTS = ("qwen3_5_moe",)
"""Families whose experts are one tensor in the hub's files, and several where transformers saves them."""
EXPERT = re.compile(r"(?P<stack>.*\.mlp\.experts)\.(?P<number>\d+)\.(?P<matrix>gate|up|down)_proj\.weight")


def tiny_config(kind: str, **settings: Any) -> Any:
    """The config of a tiny model; `settings` change its arguments."""
    return CONFIG_MAPPING[kind](**(CONFIGS[kind] | settings))


def make_tiny_model(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Write a model folder with random weights that are large enough to answer with different tokens."""
    torch.manual_seed(0)
    config = tiny_config(kind, **settings)
    whole = auto_class(type(config))
    if "vision_config" in CONFIGS[kind]:  # with the part that reads images, whose tensors are in the files too
        from transformers import AutoModelForImageTextToText as whole  # noqa: N813
    model = whole.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0, 0.2)
        else:
            nn.init.normal_(parameter, 0.0, 0.8 * parameter.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(folder)
    _as_on_the_hub(kind, folder / "model.safetensors", dtype)
    copy_tokenizer_files(TINY_QWEN, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3002]}))
    return folder


def _as_on_the_hub(kind: str, path: Path, dtype: torch.dtype) -> None:
    tensors = load_file(path)
    held = dict(tensors)
    if kind in WITH_PREDICTION:
        held |= {
            "mtp.fc.weight": torch.randn(WIDTH, 2 * WIDTH, dtype=dtype),
            "mtp.norm.weight": torch.ones(WIDTH, dtype=dtype),
            "mtp.layers.0.self_attn.q_proj.weight": torch.randn(2 * WIDTH, WIDTH, dtype=dtype),
        }
    if kind in WITH_FUSED_EXPERTS:
        held = _with_fused_experts(held)
    if kind == "gpt2":
        held = {name.removeprefix("transformer."): values for name, values in held.items()}
    if held.keys() != tensors.keys():
        save_file({name: values.contiguous() for name, values in held.items()}, path, metadata={"format": "pt"})


def _with_fused_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    stacks: dict[str, dict[tuple[int, str], torch.Tensor]] = defaultdict(dict)
    held = {}
    for name, values in tensors.items():
        if match := EXPERT.fullmatch(name):
            stacks[match["stack"]][int(match["number"]), match["matrix"]] = values
        else:
            held[name] = values
    for stack, matrices in stacks.items():
        numbers = range(1 + max(number for number, _ in matrices))
        both = [torch.cat([matrices[number, "gate"], matrices[number, "up"]]) for number in numbers]
        held[f"{stack}.gate_up_proj"] = torch.stack(both)
        held[f"{stack}.down_proj"] = torch.stack([matrices[number, "down"] for number in numbers])
    return held
