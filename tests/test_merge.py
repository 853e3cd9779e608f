"""`loratune merge` against PEFT's own unmerged model and plain arithmetic, for every kind of adapter."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, TINY_QWEN
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from typer.testing import CliRunner, Result

from loratune.errors import Exit, LoratuneError
from loratune.model.base import load_base
from loratune.model.hardware import detect_hardware
from loratune.model.weights import mapped
from loratune.model.weights.quantized_files import DequantizedFiles
from loratune.recipe.sections import ModelSettings
from loratune.runs.tokenizer_files import copy_tokenizer_files

Cli = Callable[..., Result]
IDS = torch.tensor([[5, 6, 7, 8, 9, 300, 11], [300, 1, 2, 3, 4, 77, 12]])
TARGETS = ["q_proj", "v_proj", "down_proj"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# PEFT tells of its own saving of embeddings, and that merging on a shared matrix takes care, which is tested here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Adapter .* have invalid shape. .*lora_B.bias"),  # a vector, as it should be
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "rank and alpha patterns": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 3, "v_proj": 5},
        "alpha_pattern": {"down_proj": 7, r"^model\.layers\.1\.self_attn\.q_proj": 3},
    },
    "all biases": {"bias": "all"},
    "biases of targets": {"bias": "lora_only"},
    "bias in B and all biases": {"lora_bias": True, "bias": "all", "target_modules": ["q_proj", "v_proj"]},
    "one layer": {"layers_to_transform": [1]},
    "head in full": {"modules_to_save": ["lm_head"]},
    "embedding in full": {"modules_to_save": ["embed_tokens"]},
    "both in full": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "embedding in full, kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "both in full, kept tied": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "embedding": {"target_modules": [*TARGETS, "embed_tokens"]},
    "embedding with the base's": {"target_modules": [*TARGETS, "embed_tokens"], "save": True},
    "embedding, kept tied": {"target_modules": [*TARGETS, "embed_tokens"], "ensure_weight_tying": True},
    "head": {"target_modules": [*TARGETS, "lm_head"]},
    "head with the base's": {"target_modules": [*TARGETS, "lm_head"], "save": True},
    "head with DoRA": {"target_modules": [*TARGETS, "lm_head"], "use_dora": True},
    "both with the base's": {"target_modules": [*TARGETS, "lm_head", "embed_tokens"], "save": True},
}
# Of variants that touch embedding or head, those that set them apart.
TYING = {name for name in VARIANTS if name.startswith(("head", "embedding", "both"))}
UNTIES = {name for name in TYING if "kept tied" not in name}


def make_model(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Path:
    """Folder of a model of random weights with the practice model's tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    copy_tokenizer_files(TINY_QWEN, folder)
    shutil.copyfile(TINY_QWEN / "generation_config.json", folder / "generation_config.json")
    return folder


def small(config: type[Any], **changes: Any) -> Any:
    vocabulary = json.loads((TINY_QWEN / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": vocabulary, "bos_token_id": None}
    return config(**(sizes | {"eos_token_id": 1, "pad_token_id": None} | changes))


@pytest.fixture(scope="module")
def untied_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "untied", small(Qwen2Config, tie_word_embeddings=False))


@pytest.fixture(scope="module")
def bfloat16_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small(Qwen2Config, tie_word_embeddings=True)
    return make_model(tmp_path_factory.mktemp("models") / "bf16", config, torch.bfloat16)


def make_adapter(base: Path, folder: Path, *, save: bool = False, seed: int = 1, **settings: Any) -> Any:
    """A PEFT folder with random weights in every trained tensor; returns PEFT's model."""
    torch.manual_seed(seed)
    defaults = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": TARGETS}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**(defaults | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=save)
    return model.eval()


def merged(cli: Cli, output: Path, *flags: Any) -> dict[str, Any]:
    """Merge; returns verification.json."""
    result = cli("merge", "--output", output, *flags)
    assert result.exit_code == 0, result.stderr
    report: dict[str, Any] = json.loads((output / "verification.json").read_text())
    return report


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def delta(adapter: Path, module: str, scaling: float) -> torch.Tensor:
    """s·B·A in float64."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    up, down = (tensors[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "BA")
    return scaling * (up @ down)


# --- what is computed ---


@pytest.mark.parametrize(
    ("variant", "tied"),
    [
        *((name, True) for name in VARIANTS),
        ("plain", False),
        *((name, False) for name in sorted(TYING) if "base's" in name or name == "both in full"),
    ],
)
def test_the_merged_model_computes_what_peft_computes_with_the_adapter_beside_the_base(
    cli: Cli, random_qwen: Path, untied_qwen: Path, tmp_path: Path, variant: str, tied: bool
) -> None:
    base = random_qwen if tied else untied_qwen
    live = make_adapter(base, tmp_path / "adapter", **VARIANTS[variant])
    expected = logits(live)
    report = merged(cli, tmp_path / "merged", "--adapter", tmp_path / "adapter", "--base-model", base)

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)
    assert plain.config.tie_word_embeddings is (tied and variant not in UNTIES)
    assert (HEAD in weights(tmp_path / "merged")) is not plain.config.tie_word_embeddings
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(plain), logits(reloaded), rtol=0, atol=1e-5)
    # The comparison would notice if nothing had been merged.
    assert (logits(AutoModelForCausalLM.from_pretrained(base)) - expected).abs().max() > 1e-2
    assert report["verified"] == "files and logits"


@pytest.mark.parametrize(
    "config",
    [
        small(Qwen3Config, head_dim=12, tie_word_embeddings=True),
        small(LlamaConfig, tie_word_embeddings=False),
        small(MistralConfig, tie_word_embeddings=False),
    ],
    ids=["qwen3", "llama", "mistral"],
)
def test_other_architectures_merge_too(cli: Cli, tmp_path: Path, config: Any) -> None:
    base = make_model(tmp_path / "base", config)
    live = make_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    merged(cli, tmp_path / "merged", "-a", tmp_path / "adapter", "-m", base)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain), logits(live), rtol=0, atol=1e-5)
    assert weights(tmp_path / "merged").keys() == weights(base).keys()


def test_bfloat16_weights_are_the_float64_sum_rounded_once(cli: Cli, bfloat16_qwen: Path, tmp_path: Path) -> None:
    make_adapter(bfloat16_qwen, tmp_path / "adapter", target_modules="all-linear")
    report = merged(cli, tmp_path / "merged", "-a", tmp_path / "adapter", "-m", bfloat16_qwen)
    before, after = weights(bfloat16_qwen), weights(tmp_path / "merged")
    changed = 0
    for name, base in before.items():
        if "_proj.weight" not in name:
            assert torch.equal(after[name], base)
            continue
        changed += 1
        exact = base.double() + delta(tmp_path / "adapter", name.removesuffix(".weight"), 6 / 4)
        nearest = exact.float().bfloat16()
        other = after[name] != nearest
        assert other.float().mean() < 1e-3
        middle = (after[name].double() + nearest.double())[other] / 2  # where float32 may fall to the other side
        assert ((exact[other] - middle).abs() < 1e-6 * exact.abs().max()).all()
    assert (report["read_back"]["updated"], report["read_back"]["identical"]) == (changed, len(before) - changed)
    assert 0.4 < report["read_back"]["largest_error_steps"] <= 0.5
    assert report["dtype"] == "bfloat16"


@pytest.mark.parametrize(("base", "dtype"), [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32")])
def test_another_dtype_holds_for_every_tensor_and_is_what_transformers_loads(
    cli: Cli, random_qwen: Path, bfloat16_qwen: Path, tmp_path: Path, base: str, dtype: str
) -> None:
    folder = random_qwen if base == "float32" else bfloat16_qwen
    make_adapter(folder, tmp_path / "adapter")
    report = merged(cli, tmp_path / "merged", "-a", tmp_path / "adapter", "-m", folder, "--dtype", dtype)
    wanted = getattr(torch, dtype)
    for name, tensor in weights(tmp_path / "merged").items():
        exact = weights(folder)[name].double()
        if any(target in name for target in TARGETS) and name.endswith(".weight"):
            exact = exact + delta(tmp_path / "adapter", name.removesuffix(".weight"), 6 / 4)
        assert tensor.dtype == wanted
        torch.testing.assert_close(tensor.double(), exact, rtol=torch.finfo(wanted).eps, atol=1e-7)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {parameter.dtype for parameter in plain.parameters()} == {wanted}
    assert report["dtype"] == dtype


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_a_merge_into_another_type_says_what_the_base_has_and_what_is_equal(
    cli: Cli, bfloat16_qwen: Path, tmp_path: Path, dtype: str
) -> None:
    make_adapter(bfloat16_qwen, tmp_path / "adapter")
    flags = ("-a", tmp_path / "adapter", "-m", bfloat16_qwen, "--dtype", dtype, "--no-logits")
    result = cli("merge", "--output", tmp_path / "merged", *flags)
    assert result.exit_code == 0, result.stderr
    told = " ".join(result.stderr.split())
    assert f"base {bfloat16_qwen}, bfloat16 into" in told
    assert f"of {dtype} in 1 file to" in told
    back = json.loads((tmp_path / "merged" / "verification.json").read_text())["read_back"]
    before, after = weights(bfloat16_qwen), weights(tmp_path / "merged")
    assert back["converted"] == (0 if dtype == "bfloat16" else back["identical"])
    assert back["identical"] == sum(torch.equal(after[name], before[name].to(after[name].dtype)) for name in before)
    words = "byte for byte" if dtype == "bfloat16" else f"values in {dtype}"
    assert f"{back['identical']} equal to the base's {words}" in told
    assert ("byte for byte" in told) == (dtype == "bfloat16")


def test_a_value_that_float16_cannot_hold_is_no_infinity(cli: Cli, random_qwen: Path, tmp_path: Path) -> None:
    base = shutil.copytree(random_qwen, tmp_path / "base")
    tensors = weights(base)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    make_adapter(base, tmp_path / "adapter")
    result = cli("merge", "-a", tmp_path / "adapter", "-m", base, "-o", tmp_path / "m", "--dtype", "float16")
    assert result.exit_code == Exit.MODEL
    assert "model.norm.weight: holds values that float16 cannot" in " ".join(result.stderr.split())
    assert not (tmp_path / "m").exists()


def test_files_are_as_small_as_asked(cli: Cli, random_qwen: Path, tmp_path: Path) -> None:
    live = make_adapter(random_qwen, tmp_path / "adapter")
    merged(cli, tmp_path / "merged", "-a", tmp_path / "adapter", "-m", random_qwen, "--shard-size", "20kB")
    files = list((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(files) > 2
    for path in files:
        tensors = load_file(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 20_000 or len(tensors) == 1
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain), logits(live), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", ["0", "5XB", "-1GB", "0.5", "nan"])
def test_a_size_that_is_none_is_refused(cli: Cli, random_qwen: Path, tmp_path: Path, size: str) -> None:
    make_adapter(random_qwen, tmp_path / "adapter")
    result = cli("merge", "-a", tmp_path / "adapter", "-m", random_qwen, "-o", tmp_path / "m", "--shard-size", size)
    assert result.exit_code == Exit.USAGE
    assert not (tmp_path / "m").exists()


def test_an_adapter_lost_to_rounding_is_refused_and_forced_with_a_warning(
    cli: Cli, bfloat16_qwen: Path, tmp_path: Path
) -> None:
    make_adapter(bfloat16_qwen, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: 1e-4 * tensor for name, tensor in load_file(path).items()}, path)
    flags = ("-a", tmp_path / "adapter", "-m", bfloat16_qwen)
    result = cli("merge", "-o", tmp_path / "merged", *flags)
    assert result.exit_code == Exit.MODEL
    assert "would be the base itself" in " ".join(result.stderr.split())
    assert not (tmp_path / "merged").exists()

    report = merged(cli, tmp_path / "merged", *flags, "--force")
    assert "still equal the base" in str(report["warnings"])
    assert all(
        torch.equal(weights(bfloat16_qwen)[name], tensor) for name, tensor in weights(tmp_path / "merged").items()
    )
    report = merged(cli, tmp_path / "wide", *flags, "--dtype", "float32")
    assert report["read_back"]["unchanged"] == []


def test_a_head_that_an_adapter_brings_along_takes_the_base_s_place_in_a_large_model_too(
    cli: Cli, untied_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(untied_qwen, tmp_path / "adapter", target_modules=["lm_head"], save=True)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors, name = load_file(path), "base_model.model.lm_head.base_layer.weight"
    save_file(tensors | {name: 2 * tensors[name]}, path)
    monkeypatch.setattr(mapped, "RESIDENT_BYTES", 0)
    merged(cli, tmp_path / "merged", "-a", tmp_path / "adapter", "-m", untied_qwen)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(untied_qwen), tmp_path / "adapter").eval()
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(found, logits(peft), rtol=0, atol=1e-5)


def test_what_does_not_change_stands_beside_the_weights_byte_for_byte(
    cli: Cli, random_qwen: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(random_qwen, tmp_path / "base")
    (base / "LICENSE").write_text("terms\n")
    make_adapter(base, tmp_path / "adapter")
    merged(cli, tmp_path / "merged", "-a", tmp_path / "adapter", "-m", base)
    for path in base.iterdir():
        if path.name not in ("model.safetensors", "generation_config.json"):
            assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()
    expected = {path.name for path in base.iterdir()} | {"verification.json", "README.md"}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == expected
    assert str(tmp_path) not in (tmp_path / "merged" / "README.md").read_text()


def test_base_and_adapter_are_never_overwritten(cli: Cli, random_qwen: Path, tmp_path: Path) -> None:
    base = shutil.copytree(random_qwen, tmp_path / "base")
    make_adapter(base, tmp_path / "adapter")
    before = (base / "model.safetensors").read_bytes()
    for output in (base, tmp_path / "adapter", tmp_path / "adapter" / "merged", base / "merged", tmp_path):
        result = cli("merge", "-a", tmp_path / "adapter", "-m", base, "-o", output, "--overwrite")
        assert result.exit_code == Exit.USAGE, (output, result.stderr)
    assert (base / "model.safetensors").read_bytes() == before


# --- quantised runs ---


@pytest.fixture(scope="module", params=["nf4", "int8"])
def quantised_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Quantisation, base and run folder of a short training."""
    from loratune.cli.app import app

    folder = tmp_path_factory.mktemp(f"run-{request.param}")
    config = small(Qwen2Config, hidden_size=64, intermediate_size=128, tie_word_embeddings=True)
    base = make_model(folder / "base", config)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    result = CliRunner().invoke(
        app,
        ["sft", "--model.base", str(base), "--model.quantization", request.param, "--model.dtype", "float32",
         "--data.train", str(folder / "rows.json"), "--training.max_steps", "4", "--training.learning_rate", "1e-2",
         "--output", str(folder / "run")],
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    return request.param, base, folder / "run"


def dequantised(quantization: str, module: Any) -> torch.Tensor:
    """What a live quantised layer multiplies with, as bitsandbytes itself has it."""
    import bitsandbytes.functional as bnb

    if quantization == "nf4":
        return bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return module.weight.CB.float() * (module.weight.SCB.float() / 127).unsqueeze(1)


def test_the_dequantised_base_is_what_the_training_has_computed_with(quantised_run: tuple[str, Path, Path]) -> None:
    quantization, base, _ = quantised_run
    settings = ModelSettings(base=str(base), quantization=quantization, dtype="float32")
    live = load_base(settings, base, detect_hardware())
    files = DequantizedFiles([base / "model.safetensors"], settings, detect_hardware())
    original, compared = weights(base), 0
    for name, tensor in original.items():
        found = files.tensor(name)
        if not name.endswith("_proj.weight"):
            assert torch.equal(found, tensor)
            continue
        compared += 1
        expected = dequantised(quantization, live.get_submodule(name.removesuffix(".weight")))
        assert torch.equal(found, expected.reshape(found.shape).to(found.dtype))
        assert not torch.equal(found, tensor)
    assert compared == 14


def test_of_both_bases_of_a_quantised_run_the_closer_one_is_taken(
    cli: Cli, quantised_run: tuple[str, Path, Path], tmp_path: Path
) -> None:
    quantization, base, run = quantised_run
    report = merged(cli, tmp_path / "auto", "-a", run)
    kl = {name: values["mean_kl"] for name, values in report["logits"].items()}
    assert kl.keys() == {"original", "dequantized"}
    assert report["merge_base"] == min(kl, key=lambda name: kl[name])
    taken = report["merge_base"]
    if quantization == "nf4":  # int8 rounds what goes into a layer too, which no merged model does
        assert kl["dequantized"] < kl["original"] / 10
    assert not any(path.is_dir() for path in (tmp_path / "auto").iterdir())

    for kind in ("original", "dequantized"):
        report = merged(cli, tmp_path / kind, "-a", run, "--merge-base", kind)
        assert report["merge_base"] == kind
        assert report["logits"].keys() == {kind}
    found = {name: weights(tmp_path / name) for name in ("auto", "original", "dequantized")}
    name = "model.layers.0.mlp.down_proj"
    scaling = 2.0  # the recipe's alpha is twice the rank
    exact = weights(base)[f"{name}.weight"].double() + delta(run / "adapter", name, scaling)
    torch.testing.assert_close(found["original"][f"{name}.weight"].double(), exact, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(found["dequantized"][f"{name}.weight"].double(), exact, atol=1e-5)
    for name, tensor in found["auto"].items():
        assert torch.equal(tensor, found[taken][name])


def test_the_base_of_a_plain_run_is_no_choice(cli: Cli, random_qwen: Path, tmp_path: Path) -> None:
    make_adapter(random_qwen, tmp_path / "adapter")
    result = cli(
        "merge", "-a", tmp_path / "adapter", "-m", random_qwen, "-o", tmp_path / "m", "--merge-base", "original"
    )
    assert result.exit_code == Exit.USAGE


# --- several adapters ---


@pytest.mark.parametrize(
    ("first", "second"),
    [({}, {}), ({"r": 2}, {"r": 5, "lora_alpha": 9}), ({"use_rslora": True}, {"r": 3}), ({}, {"use_rslora": True})],
    ids=["alike", "different ranks", "first rsLoRA", "second rsLoRA"],
)
def test_linear_adds_the_weighted_updates_exactly(
    cli: Cli, random_qwen: Path, tmp_path: Path, first: Any, second: Any
) -> None:
    numbers = (0.7, -0.5)
    adapters = {"a": first | {"target_modules": ["q_proj", "v_proj"]}, "b": second}
    for seed, (name, settings) in enumerate(adapters.items()):
        make_adapter(random_qwen, tmp_path / name, seed=seed, **settings)
    merged(
        cli, tmp_path / "merged", "-a", f"a={tmp_path / 'a'}", "-a", f"b={tmp_path / 'b'}", "-m", random_qwen,
        "--weights", ",".join(map(str, numbers)), "--combine", "linear",
    )  # fmt: skip
    after = weights(tmp_path / "merged")
    for name, base in weights(random_qwen).items():
        exact, module = base.double(), name.removesuffix(".weight")
        for adapter, number in zip("ab", numbers, strict=True):
            rank, alpha = (({"r": 4, "lora_alpha": 6} | adapters[adapter])[key] for key in ("r", "lora_alpha"))
            root = rank**0.5 if adapters[adapter].get("use_rslora") else rank
            if f"base_model.model.{module}.lora_A.weight" in load_file(
                tmp_path / adapter / "adapter_model.safetensors"
            ):
                exact = exact + number * delta(tmp_path / adapter, module, alpha / root)
        torch.testing.assert_close(after[name].double(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["svd", "ties", "dare_ties"])
def test_other_combinations_are_peft_s_own(cli: Cli, random_qwen: Path, tmp_path: Path, method: str) -> None:
    for seed, name in enumerate("ab"):
        make_adapter(random_qwen, tmp_path / name, seed=seed)
    torch.manual_seed(5)  # dare_ties drops at random
    merged(
        cli, tmp_path / "merged", "-a", f"a={tmp_path / 'a'}", "-a", f"b={tmp_path / 'b'}", "-m", random_qwen,
        "--weights", "0.7,0.4", "--combine", method, "--density", "0.6",
    )  # fmt: skip
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(random_qwen), tmp_path / "a", "a")
    peft.load_adapter(tmp_path / "b", "b")
    torch.manual_seed(5)
    peft.add_weighted_adapter(["a", "b"], [0.7, 0.4], "c", method, density=None if method == "svd" else 0.6)
    peft.set_adapter("c")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    if method == "dare_ties":  # what is dropped depends on how often chance was asked before
        assert (found - logits(AutoModelForCausalLM.from_pretrained(random_qwen))).abs().max() > 1e-2
    else:
        torch.testing.assert_close(found, logits(peft.eval()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "settings", "exit_code", "message"),
    [
        (["--weights", "1"], {}, Exit.USAGE, "give 2 numbers"),
        (["--weights", "1,2,3"], {}, Exit.USAGE, "give 2 numbers"),
        (["--weights", "1,x"], {}, Exit.USAGE, "give 2 numbers"),
        (["--weights", "1,nan"], {}, Exit.USAGE, "give 2 numbers"),
        ([], {}, Exit.USAGE, "give 2 weights"),
        (["--weights", "1,1"], {"use_dora": True}, Exit.MODEL, "b (PATH) has DoRA"),
        (["--weights", "1,1"], {"modules_to_save": ["lm_head"]}, Exit.MODEL, "has modules_to_save"),
        (["--weights", "1,1"], {"bias": "all"}, Exit.MODEL, "has trained biases"),
        (["--weights", "1,1"], {"alpha_pattern": {"q_proj": 3}}, Exit.MODEL, "rank or alpha pattern"),
        (["--weights", "1,1"], {"layers_to_transform": [1]}, Exit.MODEL, "on layers [1]"),
        (["--weights", "1,1"], {"init_lora_weights": "pissa"}, Exit.MODEL, "changes the base"),
        (["--weights", "1,1", "--combine", "ties"], {"r": 3}, Exit.MODEL, "the same rank, and have a 4, b 3"),
    ],
)
def test_adapters_that_do_not_go_together_are_refused(
    cli: Cli, random_qwen: Path, tmp_path: Path, flags: list[str], settings: Any, exit_code: int, message: str
) -> None:
    make_adapter(random_qwen, tmp_path / "a")
    make_adapter(random_qwen, tmp_path / "b", **settings)
    pair = ("-a", f"a={tmp_path / 'a'}", "-a", f"b={tmp_path / 'b'}")
    result = cli("merge", *pair, "-m", random_qwen, "-o", tmp_path / "merged", *flags)
    assert result.exit_code == exit_code, result.stderr
    assert message.replace("PATH", str(tmp_path / "b")) in " ".join(result.stderr.split())
    assert not (tmp_path / "merged").exists()


def test_a_foreign_tensor_in_one_of_several_adapters_is_noticed(cli: Cli, random_qwen: Path, tmp_path: Path) -> None:
    for name in "ab":
        make_adapter(random_qwen, tmp_path / name)
    path = tmp_path / "b" / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.model.layers.0.extra.weight": torch.zeros(2)}, path)
    pair = ("-a", f"a={tmp_path / 'a'}", "-a", f"b={tmp_path / 'b'}")
    result = cli("merge", *pair, "-m", random_qwen, "-o", tmp_path / "merged", "--weights", "1,1")
    assert result.exit_code == Exit.MODEL
    assert "layers.0.extra.weight" in result.stderr


@pytest.mark.parametrize("names", [("a", "a"), ("", "a")])
def test_several_adapters_need_names_of_their_own(
    cli: Cli, random_qwen: Path, tmp_path: Path, names: tuple[str, str]
) -> None:
    make_adapter(random_qwen, tmp_path / "a")
    pair = [part for name in names for part in ("-a", f"{name}={tmp_path / 'a'}" if name else tmp_path / "a")]
    result = cli("merge", *pair, "-m", random_qwen, "-o", tmp_path / "m", "--weights", "1,1")
    assert result.exit_code == Exit.USAGE
    assert "a name of its own" in " ".join(result.stderr.split())


def test_adapters_are_named_as_for_infer(cli: Cli, random_qwen: Path, tmp_path: Path) -> None:
    for name in ("v1.5", "no=run"):
        make_adapter(random_qwen, tmp_path / name)
    result = cli(
        "merge", "--output", tmp_path / "merged", "-a", tmp_path / "v1.5", "-a", f"my-run 2={tmp_path / 'v1.5'}",
        "-a", tmp_path / "no=run", "-a", f"{'long' * 1000}={tmp_path / 'no=run'}", "-m", random_qwen,
        "--weights", "1,0.5,0.5,0.1",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "merged" / "verification.json").read_text())
    assert list(report["combined"]["adapters"]) == ["v1.5", "my-run 2", "no=run", "long" * 1000]
    assert "adapter linear of 1 × v1.5, 0.5 × my-run 2, 0.5 × no=run, 0.1 × longlong" in " ".join(result.stderr.split())
    assert "long" * 20 not in result.stderr
    assert f"{tempfile.gettempdir()}/loratune-" not in result.stderr


def test_what_is_wrong_with_a_combined_adapter_is_told_without_its_temporary_folder(
    cli: Cli, random_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Any, *_: Any) -> None:
        raise LoratuneError(f"{source.adapter}: no such thing", Exit.MODEL)

    make_adapter(random_qwen, tmp_path / "a")
    monkeypatch.setattr("loratune.delivery.merge.merge.gather", fail)
    pair = ("-a", f"a={tmp_path / 'a'}", "-a", f"b={tmp_path / 'a'}")
    result = cli("merge", *pair, "-m", random_qwen, "-o", tmp_path / "m", "--weights", "1,-2")
    assert result.exit_code == Exit.MODEL
    assert "error: linear of 1 × a, -2 × b: no such thing" in result.stderr


@pytest.mark.parametrize("command", ["merge", "infer", "serve", "export", "verify"])
def test_every_command_reads_the_adapter_flag_alike(cli: Cli, tmp_path: Path, command: str) -> None:
    rest: dict[str, tuple[Any, ...]] = {
        "merge": ("-o", tmp_path / "m"), "verify": (tmp_path,), "infer": ("-p", "hi"), "serve": ("--port", 0),
        "export": ("-o", tmp_path / "m", "-f", "vllm"),
    }  # fmt: skip
    for value, words in (("a=nowhere", "nowhere: no such folder"), (f"a={'x' * 5000}", "no such folder"),
                         ("x" * 5000, "no such folder"), ("out/no=run", "out/no=run: no such folder"),
                         ("=x", "name=folder"), ("x=", "name=folder")):  # fmt: skip
        result = cli(command, "--adapter", value, *rest[command])
        assert words in result.stderr
        assert "x" * 500 not in result.stderr
        assert result.exit_code in (Exit.MODEL, Exit.USAGE)


def test_weights_are_for_several_adapters(cli: Cli, random_qwen: Path, tmp_path: Path) -> None:
    make_adapter(random_qwen, tmp_path / "a")
    result = cli("merge", "-a", tmp_path / "a", "-m", random_qwen, "-o", tmp_path / "m", "--weights", "1")
    assert result.exit_code == Exit.USAGE


# --- a run ---


def test_a_run_merges_without_being_told_anything_and_answers_the_same_in_plain_transformers(
    cli: Cli, tmp_path: Path
) -> None:
    rows = [{"instruction": "Who are you?", "output": "I am Robin."}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    result = cli(
        "sft", "--model.base", "tiny-qwen", "--model.dtype", "float32", "--data.train", tmp_path / "rows.json",
        "--data.validation", "0", "--training.max_steps", "20", "--training.learning_rate", "5e-3",
        "--prompt.system", 'Be "brief".\n{{ yes }}', "--output", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    report = merged(cli, tmp_path / "merged", "-a", tmp_path / "run")
    assert report["compared_on"] == "the run's validation rows"
    assert report["logits"]["original"]["tokens"] > 0
    assert [(answer["merged"], answer["ended"]) for answer in report["answers"]] == [("I am Robin.", True)]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True, return_tensors="pt"
    )
    output = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generate(**inputs, max_new_tokens=20)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "I am Robin."
    for given in (("--adapter", tmp_path / "run"), ("--model", tmp_path / "merged")):
        assert cli("infer", *given, "-p", "Who are you?").stdout == "I am Robin.\n"
