"""Config files whose language model is described in a part of its own, as of models that read images too."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoConfig

from loratune.delivery.merge.model_folder import _write_config, _write_generation_config
from loratune.delivery.verification.beside import _config_problems, _generation_problems
from loratune.model.architecture.structure import text_value, with_text_values
from loratune.model.config import load_config, load_generation_config
from loratune.model.tying import head_is_tied

TEXT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "eos_token_id": 5, "tie_word_embeddings": True, "layer_types": ["full_attention"],
}  # fmt: skip
EMBEDDING = "model.language_model.embed_tokens.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tied model in float32, as transformers writes it; its config says tied and its type in both places."""
    folder = tmp_path / "base"
    config = CONFIG_MAPPING["qwen3_5"](text_config=TEXT, vision_config={"depth": 1}, tie_word_embeddings=True)
    config.dtype = config.text_config.dtype = torch.float32
    config.save_pretrained(folder)
    save_file({EMBEDDING: torch.zeros(96, 8)}, folder / "model.safetensors")
    return folder


def merged(base: Path, dtype: torch.dtype | None = None, rows: int = 96, is_tied: bool = True) -> Path:
    """What a merge writes of a config, beside weights of these sizes."""
    folder = base.with_name("merged")
    folder.mkdir()
    tensors = {EMBEDDING: torch.zeros(rows, 8)} | ({} if is_tied else {"lm_head.weight": torch.ones(rows, 8)})
    save_file({name: values.to(dtype) for name, values in tensors.items()}, folder / "model.safetensors")
    told = _write_config(base, folder, dtype, SimpleNamespace(vocabulary=rows, is_tied=is_tied))  # type: ignore[arg-type]
    assert len(told) == sum((dtype is not None, rows != 96, not is_tied))
    return folder


def test_what_a_merge_changes_is_changed_where_transformers_reads_it(base: Path) -> None:
    assert head_is_tied(base)
    folder = merged(base, torch.float16, rows=104, is_tied=False)
    read = AutoConfig.from_pretrained(folder)
    assert (read.get_text_config().vocab_size, read.get_text_config().tie_word_embeddings) == (104, False)
    assert (read.dtype, read.get_text_config().dtype) == (torch.float16, torch.float16)
    written, original = (json.loads((place / "config.json").read_text()) for place in (folder, base))
    assert "vocab_size" not in written  # which would be another model's
    assert written["tie_word_embeddings"] is False
    assert written["vision_config"] == original["vision_config"]
    assert list(_config_problems(base, folder)) == []
    assert not head_is_tied(folder)


def test_a_config_that_stays_as_it_is_is_copied(base: Path) -> None:
    folder = merged(base)
    assert (folder / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert list(_config_problems(base, folder)) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"text_config": {"vocab_size": 100}}, "config.json: text_config.vocab_size is 100, and 96 in the base"),
        (
            {"text_config": {"hidden_act": "relu"}},
            'config.json: text_config.hidden_act is "relu", and "silu" in the base',
        ),
        ({"vision_config": {"depth": 2}}, "config.json: vision_config is "),
        ({"tie_word_embeddings": False}, "config.json: tie_word_embeddings is false, and true in the base"),
    ],
)
def test_another_value_in_any_part_is_found(base: Path, change: dict[str, Any], told: str) -> None:
    folder = merged(base)
    config = json.loads((folder / "config.json").read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    (problem,) = _config_problems(base, folder)
    assert problem.startswith(told)


def test_the_language_model_s_own_end_token_counts(base: Path) -> None:
    assert load_generation_config(base).eos_token_id == 5
    folder = merged(base)
    assert _write_generation_config(base, folder, 5) == []
    assert _write_generation_config(base, folder, 7) == [
        "generation_config.json: token 7 ends an answer, as in training"
    ]
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [7, 5]}
    assert list(_generation_problems(base, folder, 7)) == []
    assert "ends at [7, 5] where it should at [5, 9]" in next(iter(_generation_problems(base, folder, 9)))


def test_a_flat_config_is_its_own_language_model() -> None:
    flat = {"vocab_size": 3, "tie_word_embeddings": True}
    assert with_text_values(flat, {"vocab_size": 4, "dtype": "float16"}) == flat | {"vocab_size": 4, "dtype": "float16"}
    assert text_value(flat, "vocab_size") == 3
    nested = {"tie_word_embeddings": True, "text_config": {"vocab_size": 3}}
    assert text_value(nested, "tie_word_embeddings") is True  # said of the whole alone
    assert with_text_values(nested, {"tie_word_embeddings": False, "vocab_size": 4}) == {
        "tie_word_embeddings": False,
        "text_config": {"vocab_size": 4},
    }


def test_a_layer_that_is_counted_from_the_end_is_no_impossible_number(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4}
    parts = {"text_config": TEXT | {"model_type": "mistral"}, "vision_config": sizes | {"model_type": "pixtral"}}
    CONFIG_MAPPING["mistral3"](**parts, vision_feature_layer=-1).save_pretrained(tmp_path)
    assert load_config(tmp_path).vision_feature_layer == -1
