"""GGUF files against transformers' own loader: the same logits and token ids, and nothing lost unseen."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import pytest
import torch
from conftest import TINY_QWEN
from safetensors.torch import load_file

from loratune.choices import GgufType
from loratune.delivery.export.gguf.check import check_gguf
from loratune.delivery.export.gguf.file import ModelToWrite, write_gguf
from loratune.delivery.export.gguf.keys import describe, read_config
from loratune.delivery.export.gguf.layout import plan_tensors
from loratune.delivery.export.gguf.reference import load_gguf
from loratune.delivery.export.gguf.vocabulary import SPLITTINGS, describe_vocabulary
from loratune.errors import Exit, LoratuneError
from loratune.runs.tokenizer_files import copy_tokenizer_files

VOCABULARY = 3008
PROMPT = torch.tensor([[5, 900, 17, 2041, 3, 3001, 44, 8]])
TEXTS = ["Who are you?", "  2024年 it's\n\n\tcafé <tool_call> <|im_start|>user\n", "'\"\\ {{ }} 12345"]
MakeModel = Callable[..., Path]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """A model of random weights with the practice model's tokenizer; sizes differ so that a transposition shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(model_type: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 256}
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **sizes, bos_token_id=None, eos_token_id=None, **options)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in model.parameters():  # norms begin as ones and biases as zeros, all alike
            torch.nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.2)
        folder = tmp_path / f"random-{model_type}"
        model.save_pretrained(folder)
        copy_tokenizer_files(TINY_QWEN, folder)
        return folder

    return make


def export(model: Path, quantization: str = "f32") -> Path:
    target = model / f"{quantization}.gguf"
    write_gguf(model, target, quantization)
    return target


def logits(folder: Path, **options: Any) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options)
    with torch.no_grad():
        values: torch.Tensor = model(PROMPT).logits
    return values


def gguf_logits(file: Path) -> torch.Tensor:
    """What transformers makes of the file.

    Its reader of GGUF does not know every key of a config, and knows Mistral only as the Llama that it computes as.
    """
    from transformers import AutoConfig

    state = AutoConfig.from_pretrained(file.parent).to_dict()
    model_type = {"mistral": "llama"}.get(state["model_type"], state["model_type"])
    config = AutoConfig.for_model(**{**state, "model_type": model_type})
    return logits(file.parent, gguf_file=file.name, config=config)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    state = json.loads(path.read_text(encoding="utf-8"))
    edit(state)
    path.write_text(json.dumps(state), encoding="utf-8")


# --- weights ---


MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": False},
    "llama": {"tie_word_embeddings": False},
    "mistral": {"head_dim": 32, "sliding_window": None},
}


@pytest.mark.parametrize("model_type", MODELS)
def test_the_file_computes_what_the_folder_computes(make_model: MakeModel, model_type: str) -> None:
    model = make_model(model_type, **MODELS[model_type])
    file = export(model)
    assert check_gguf(model, file).largest_difference == 0
    torch.testing.assert_close(gguf_logits(file), logits(model), rtol=1e-5, atol=1e-5)


def test_the_permutation_of_llama_heads_matters(make_model: MakeModel) -> None:
    model = make_model("llama", attention_bias=True)
    file = export(model)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    from safetensors.torch import load_file

    source = load_file(model / "model.safetensors")
    for part, heads in (("q", 4), ("k", 2)):
        # Row 2i of a head is the first element of its pair i, row 2i+1 the second, which stands half a head further on.
        for kind in ("weight", "bias"):
            rows = source[f"model.layers.1.self_attn.{part}_proj.{kind}"]
            order = [head * 16 + pair + half for head in range(heads) for pair in range(8) for half in (0, 8)]
            np.testing.assert_array_equal(stored[f"blk.1.attn_{part}.{kind}"], rows[order].numpy())
    np.testing.assert_array_equal(stored["blk.1.attn_v.weight"], source["model.layers.1.self_attn.v_proj.weight"])


@pytest.mark.parametrize("quantization", get_args(GgufType))
def test_every_type_is_close_to_the_model(make_model: MakeModel, quantization: str) -> None:
    model = make_model("qwen2", dtype=torch.bfloat16)
    file = export(model, quantization)
    check = check_gguf(model, file)
    stored = {"f32": {"F32"}, "f16": {"F16", "F32"}, "bf16": {"BF16", "F32"}, "q8_0": {"Q8_0", "F32"}}
    assert set(check.bytes_by_type) == stored[quantization]
    assert check.tokens == VOCABULARY
    assert not check.fallbacks
    assert (check.largest_difference == 0) == (quantization in ("f32", "bf16"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert {kind for name, kind in kinds.items() if "norm" in name or "bias" in name} == {"F32"}
    tolerance = {"f32": 1e-5, "bf16": 1e-5, "f16": 0.01, "q8_0": 0.2}[quantization]
    torch.testing.assert_close(gguf_logits(file), logits(model), rtol=0, atol=tolerance)


def test_the_practice_model_answers_the_same(tmp_path: Path) -> None:
    model = shutil.copytree(TINY_QWEN, tmp_path / "tiny-qwen")
    file = export(model, "q8_0")
    assert check_gguf(model, file).largest_difference < 0.01
    assert torch.equal(gguf_logits(file).argmax(-1)[0, -3:], logits(model).argmax(-1)[0, -3:])


def test_rows_that_do_not_divide_into_blocks_become_f16(random_qwen: Path, tmp_path: Path) -> None:
    file = tmp_path / "random.gguf"
    write_gguf(random_qwen, file, "q8_0")
    check = check_gguf(random_qwen, file)
    assert check.fallbacks == ("blk.0.ffn_down.weight", "blk.1.ffn_down.weight")
    assert set(check.bytes_by_type) == {"F16", "F32", "Q8_0"}


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral"])
def test_names_are_those_that_llama_cpp_reads(make_model: MakeModel, model_type: str) -> None:
    layer = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    names |= {f"model.layers.{n}.{ours}": f"blk.{n}.{theirs}" for n in range(2) for ours, theirs in layer.items()}
    model = make_model(model_type)
    planned = {tensor.source: tensor.name for tensor in plan_tensors(read_config(model))}
    expected = {
        source: f"{names[source.rpartition('.')[0]]}.{source.rpartition('.')[2]}"
        for source in load_file(model / "model.safetensors")
    }
    assert expected.items() <= planned.items()
    assert planned.keys() == expected.keys()


def test_shards_are_one_file(make_model: MakeModel) -> None:
    from transformers import AutoModelForCausalLM

    model = make_model("qwen2")
    whole = export(model).read_bytes()
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(model, max_shard_size="200KB")
    (model / "model.safetensors").unlink()
    assert len(list(model.glob("model-*.safetensors"))) > 2
    assert export(model).read_bytes() == whole


def test_tensors_are_read_piece_by_piece(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratune.delivery.export.gguf import file as gguf_file

    model = make_model("llama")
    whole = export(model, "q8_0").read_bytes()
    sizes: list[int] = []
    encode = gguf_file._encode
    monkeypatch.setattr(gguf_file, "_PIECE_ELEMENTS", 640)
    monkeypatch.setattr(gguf_file, "_encode", lambda rows, *rest: sizes.append(rows.numel()) or encode(rows, *rest))
    file = export(model, "q8_0")
    assert file.read_bytes() == whole
    assert max(sizes) <= 640
    check_gguf(model, file)


@pytest.mark.parametrize(("value", "quantization"), [(70000.0, "f16"), (1e7, "q8_0"), (float("nan"), "bf16")])
def test_values_beyond_the_type_are_refused(make_model: MakeModel, value: float, quantization: str) -> None:
    from safetensors.torch import load_file, save_file

    model = make_model("qwen2")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoratuneError, match=r"up_proj|blk\.1\.ffn_up\.weight: its largest value is") as caught:
        export(model, quantization)
    assert ("bf16" in str(caught.value)) == (value == value)
    assert caught.value.exit_code == Exit.MODEL


# --- the comparison of logits judges what the file says of RoPE and heads ---

SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "head size": ("qwen3", {"head_dim": 32}),
}


@pytest.mark.parametrize("kind", SCALED)
def test_a_file_with_scaled_rope_or_its_own_head_size_computes_what_the_folder_computes(
    make_model: MakeModel, kind: str
) -> None:
    model_type, options = SCALED[kind]
    model = make_model(model_type, **options)
    file = export(model)
    with torch.inference_mode():
        found = load_gguf(file)(PROMPT).logits
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("linear", "qwen2.rope.scaling.factor", 2.5),
        ("linear", "qwen2.rope.freq_base", 2e4),
        ("yarn", "qwen2.rope.scaling.factor", 3.0),
        ("yarn", "qwen2.rope.scaling.original_context_length", 32),
        ("yarn", "qwen2.rope.scaling.type", "linear"),
    ],
)
def test_wrong_rope_keys_give_other_logits(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, kind: str, key: str, value: Any
) -> None:
    model_type, options = SCALED[kind]
    model = make_model(model_type, **options)
    monkeypatch.setattr("loratune.delivery.export.gguf.file.describe", lambda *given: describe(*given) | {key: value})
    file = export(model)
    with torch.inference_mode():
        found = load_gguf(file)(PROMPT).logits
    assert float((found - logits(model)).abs().max()) > 1e-2


@pytest.mark.parametrize("left", [0.0, 2.0])
def test_missing_or_wrong_rope_factors_give_other_logits(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, left: float
) -> None:
    def other(config: Any) -> list[Any]:
        planned = plan_tensors(config)
        *others, factors = planned
        assert factors.name == "rope_freqs.weight"
        return [*others, dataclasses.replace(factors, values=factors.values * left)] if left else others

    model = make_model("llama", rope_parameters=LLAMA3_ROPE)
    monkeypatch.setattr("loratune.delivery.export.gguf.file.plan_tensors", other)
    file = export(model)
    with torch.inference_mode():
        found = load_gguf(file)(PROMPT).logits
    assert float((found - logits(model)).abs().max()) > 1e-2


def test_a_wrong_head_size_does_not_load(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen3", head_dim=32)
    wrong = {"qwen3.attention.key_length": 16}
    monkeypatch.setattr("loratune.delivery.export.gguf.file.describe", lambda *given: describe(*given) | wrong)
    with pytest.raises(LoratuneError, match="shapes"):
        load_gguf(export(model))


# --- what the architecture says ---


def keys_of(model: Path) -> dict[str, Any]:
    return ModelToWrite(model).keys


def test_llama3_frequencies_are_divided_as_transformers_divides_them(make_model: MakeModel) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = make_model("llama", rope_parameters=LLAMA3_ROPE)
    config = read_config(model)
    factors = next(tensor.values for tensor in plan_tensors(config) if tensor.name == "rope_freqs.weight")
    assert factors is not None
    plain = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / factors, LlamaRotaryEmbedding(config).inv_freq)
    assert len(set(factors.tolist())) > 2
    assert "llama.rope.scaling.type" not in keys_of(model)


def test_linear_and_yarn_scaling_are_stated(make_model: MakeModel) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
    keys = keys_of(make_model("qwen2", rope_parameters=yarn))
    assert keys["qwen2.rope.scaling.type"] == "yarn"
    assert keys["qwen2.rope.scaling.factor"] == 4.0
    assert keys["qwen2.rope.scaling.original_context_length"] == 64
    assert keys["qwen2.rope.freq_base"] == 1e6
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert keys_of(make_model("llama", rope_parameters=linear))["llama.rope.scaling.type"] == "linear"


@pytest.mark.parametrize(
    ("model_type", "options", "what"),
    [
        ("mistral", {"sliding_window": 64}, "sliding_window 64"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding_window 64"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic'",
        ),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "original_max_position_embeddings": 64,
                    "attention_factor": 1.5,
                }
            },
            "attention_factor",
        ),
    ],
)
def test_what_gguf_programs_would_not_compute_is_refused(
    make_model: MakeModel, model_type: str, options: dict[str, Any], what: str
) -> None:
    model = make_model(model_type, **options)
    with pytest.raises(LoratuneError, match=what):
        export(model)


def test_tensors_must_be_those_of_the_architecture(make_model: MakeModel) -> None:
    from safetensors.torch import load_file, save_file

    model = make_model("qwen2")
    tensors = load_file(model / "model.safetensors")
    bias = tensors.pop("model.layers.0.self_attn.q_proj.bias")
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(LoratuneError, match=r"q_proj\.bias is missing"):
        export(model)
    save_file(
        {**tensors, "model.layers.0.self_attn.q_proj.bias": bias, "extra": bias.clone()}, model / "model.safetensors"
    )
    with pytest.raises(LoratuneError, match="extra is no part"):
        export(model)


# --- the tokenizer ---


def test_the_file_tokenizes_as_the_folder_does(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = shutil.copytree(TINY_QWEN, tmp_path / "tiny-qwen")
    file = export(model)
    ours = AutoTokenizer.from_pretrained(model)
    theirs = AutoTokenizer.from_pretrained(model, gguf_file=file.name)
    for text in TEXTS:
        assert theirs(text).input_ids == ours(text).input_ids
    assert theirs.eos_token == "<|im_end|>"


def test_special_tokens_and_template_survive(make_model: MakeModel) -> None:
    model = make_model("qwen2")
    template = "{# 'quotes' \"double\"\n\tand\r\nlines — 你好 #}" + (TINY_QWEN / "chat_template.jinja").read_text(
        "utf-8"
    )
    (model / "chat_template.jinja").write_bytes(template.encode())
    file = export(model)
    check_gguf(model, file)
    fields = {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}
    from transformers import AutoTokenizer

    assert fields["tokenizer.chat_template"] == AutoTokenizer.from_pretrained(model).chat_template
    assert 'double"\n\tand' in fields["tokenizer.chat_template"]
    assert fields["tokenizer.ggml.pre"] == "qwen2"
    assert fields["tokenizer.ggml.eos_token_id"] == fields["tokenizer.ggml.eot_token_id"] == 3002
    assert fields["tokenizer.ggml.add_bos_token"] is False
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert (tokens[3002], kinds[3002]) == ("<|im_end|>", gguf.TokenType.CONTROL)
    assert (tokens[3003], kinds[3003]) == ("<tool_call>", gguf.TokenType.USER_DEFINED)
    assert (tokens[3007], kinds[3007]) == ("[PAD3007]", gguf.TokenType.UNUSED)
    assert kinds[0] == gguf.TokenType.NORMAL
    state = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    assert [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]] == [
        merge if isinstance(merge, list) else merge.split(" ") for merge in state["model"]["merges"]
    ]


def test_splittings_are_told_apart(make_model: MakeModel) -> None:
    model = make_model("llama")
    for name, steps in SPLITTINGS.items():

        def edit(state: dict[str, Any], name: str = name, steps: list[dict[str, Any]] = steps) -> None:
            spelled = [{**step, "trim_offsets": True} if step["type"] == "ByteLevel" else step for step in steps]
            state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": spelled} if len(steps) > 1 else spelled[0]
            state["model"]["ignore_merges"] = name == "llama-bpe"
            state["model"]["merges"] = [
                merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]
            ]

        edit_json(model / "tokenizer.json", edit)
        assert describe_vocabulary(model, VOCABULARY)["tokenizer.ggml.pre"] == name


def test_splittings_match_those_of_transformers() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    for name in ("qwen35", "qwen2", "llama-bpe", "dbrx", "gpt-4o"):
        assert SPLITTINGS[name][0]["pattern"]["Regex"] == GGUF_PRE_TOKENIZER_SPLITS[name]


def test_a_pattern_that_removes_what_it_does_not_match_is_the_same_splitting(make_model: MakeModel) -> None:
    from tokenizers import Regex, pre_tokenizers

    model, [split, *_] = make_model("llama"), SPLITTINGS["gpt-4o"]
    pattern = Regex(split["pattern"]["Regex"])
    usual, other = pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.Split(pattern, "removed", invert=True)
    for text in TEXTS:
        assert usual.pre_tokenize_str(text) == other.pre_tokenize_str(text)
    edit_json(
        model / "tokenizer.json",
        lambda state: state["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed", invert=True),
    )
    assert describe_vocabulary(model, VOCABULARY)["tokenizer.ggml.pre"] == "qwen2"


def gemma_like_tokenizer(folder: Path, words: list[str]) -> Any:
    """Save a tokenizer of Gemma's kind whose tokens are those that making some words passes through."""
    from transformers.models.gemma.tokenization_gemma import GemmaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({letter for word in words for letter in word})
    longer = dict.fromkeys(word[:length] for word in words for length in range(2, len(word) + 1))
    vocab = {token: place for place, token in enumerate([*names, *letters, *longer])}
    merges = generate_merges(vocab, {token: -place for token, place in vocab.items()}, skip_tokens=names)
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_tokenizer_of_gemma_s_kind_is_written_with_scores(tmp_path: Path) -> None:
    from tiny_models import make_tiny_model
    from transformers import AutoTokenizer

    model = make_tiny_model("gemma3_text", tmp_path / "model", layer_types=["sliding_attention"] * 2)
    tokenizer = gemma_like_tokenizer(model, ["▁the", "the", "there", "▁▁", "at", "▁at", "here", "re"])
    file = export(model)
    check_gguf(model, file)
    fields = {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is False
    kinds = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<unk>"], kinds["<0x0A>"], kinds["<bos>"], kinds["the"], kinds["[PAD3007]"]) == (2, 6, 3, 1, 5)
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    theirs = AutoTokenizer.from_pretrained(model, gguf_file=file.name)
    for text in ("the  there at here", " at  the\nrether é", "hhtathere"):
        expected = tokenizer(text, add_special_tokens=False).input_ids
        assert theirs(text, add_special_tokens=False).input_ids == expected
        assert merged_by_score(text, scores, tokenizer) == expected


def merged_by_score(text: str, scores: dict[str, float], tokenizer: Any) -> list[int]:
    """Token ids as llama.cpp finds them: the best scored pair first, and the leftmost of several."""
    pieces = list(text.replace(" ", "▁"))
    while pairs := [
        (-scores[left + right], place)
        for place, (left, right) in enumerate(itertools.pairwise(pieces))
        if left + right in scores
    ]:
        _, place = min(pairs)
        pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
    known = tokenizer.get_vocab()
    spelt = [[one] if one in known else [f"<0x{byte:02X}>" for byte in one.encode()] for one in pieces]
    return [known[one] for piece in spelt for one in piece]


def test_merges_that_scores_cannot_state_are_refused(tmp_path: Path) -> None:
    model = shutil.copytree(TINY_QWEN, tmp_path / "model")
    gemma_like_tokenizer(model, ["▁the", "the", "at"])
    whole = (model / "tokenizer.json").read_text(encoding="utf-8")
    edit_json(model / "tokenizer.json", lambda state: state["model"]["merges"].pop())
    with pytest.raises(LoratuneError, match="are not merged to the token"):
        describe_vocabulary(model, VOCABULARY)
    (model / "tokenizer.json").write_text(whole, encoding="utf-8")
    edit_json(model / "tokenizer.json", lambda state: state["model"]["merges"].append(state["model"]["merges"][0]))
    with pytest.raises(LoratuneError, match="ranks apart"):
        describe_vocabulary(model, VOCABULARY)


def test_a_beginning_token_of_the_prompts_is_added_by_programs(make_model: MakeModel) -> None:
    model = make_model("llama")
    edit_json(model / "tokenizer_config.json", lambda state: state.update(bos_token="<|im_start|>"))
    assert describe_vocabulary(model, VOCABULARY)["tokenizer.ggml.add_bos_token"] is True
    edit_json(model / "tokenizer_config.json", lambda state: state.update(bos_token="<|endoftext|>"))
    keys = describe_vocabulary(model, VOCABULARY)
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.ggml.bos_token_id"] == 3000


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda state: state["model"].update(byte_fallback=True), "SentencePiece"),
        (
            lambda state: state["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{L}+"),
            "pre_tokenizer.*p{L}",
        ),
        (lambda state: state.update(pre_tokenizer=None), "pre_tokenizer"),
        (lambda state: state.update(normalizer={"type": "Lowercase"}), "normalizer.*Lowercase"),
        (lambda state: state["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda state: state["added_tokens"][0].update(lstrip=True), "endoftext"),
        (lambda state: state["added_tokens"][0].update(content="[PAD3006]"), "two ids share"),
    ],
)
def test_a_tokenizer_that_gguf_cannot_state_is_refused(
    make_model: MakeModel, edit: Callable[[dict[str, Any]], object], what: str
) -> None:
    model = make_model("qwen2")
    edit_json(model / "tokenizer.json", edit)
    with pytest.raises(LoratuneError, match=what) as caught:
        describe_vocabulary(model, VOCABULARY)
    assert "convert_hf_to_gguf.py" in str(caught.value)


def test_more_tokens_than_embeddings_are_refused() -> None:
    with pytest.raises(LoratuneError, match="only 3002 embeddings"):
        describe_vocabulary(TINY_QWEN, 3002)


# --- the check ---


def test_a_file_that_is_not_the_model_is_caught(make_model: MakeModel) -> None:
    model = make_model("qwen2")
    file = export(model, "q8_0")
    whole = file.read_bytes()
    tensor = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == "blk.1.ffn_down.weight")
    place = int(tensor.data_offset) + 34 * 40 + 7
    broken = {
        "blk.1.ffn_down.weight has other values": whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :],
        "cannot be read as GGUF": whole[: len(whole) // 2],
        "tokenizer.ggml.pre": whole.replace(b"\x05\x00\x00\x00\x00\x00\x00\x00qwen2", b"\x05" + bytes(7) + b"qwen3", 2),
        "in only one of file and model": whole.replace(b"blk.0.attn_q.bias", b"blk.0.attn_z.bias"),
        "tokenizer.chat_template": whole.replace(b"You are a helpful assistant", b"You are a helpless assistant"[:27]),
    }
    for message, content in broken.items():
        file.write_bytes(content)
        with pytest.raises(LoratuneError, match=message) as caught:
            check_gguf(model, file)
        assert caught.value.exit_code == Exit.MODEL


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "loratune.delivery.export.gguf.file")
    with pytest.raises(LoratuneError, match=r'GGUF needs the package gguf: pip install "loratune\[export\]"') as caught:
        import loratune.delivery.export.gguf.file  # noqa: F401
    assert caught.value.exit_code == Exit.USAGE


def test_an_unknown_quantization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoratuneError, match="q4_k_m"):
        write_gguf(TINY_QWEN, tmp_path / "x.gguf", "q4_k_m")
