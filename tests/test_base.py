"""The base model's folder: what is refused before anything is loaded, and what is loaded."""

from __future__ import annotations

import json
import shutil
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from loratune.errors import Exit, LoratuneError
from loratune.model.base import load_base
from loratune.model.config import load_config
from loratune.model.files import BESIDE_A_BASE, SMALL_HUB_FILES, check_base, find_base, untried, weight_files
from loratune.model.from_folder import load_plain
from loratune.model.hardware import detect_hardware
from loratune.model.tokenizer import load_tokenizer, set_pad_token
from loratune.model.weights.mapped import load_mapped
from loratune.recipe.sections import ModelSettings
from loratune.runs.tokenizer_files import FINGERPRINTED, TOKENIZER_FILES, VOCABULARY_FILES

WANTED = ["config.json", "model-00001-of-00004.safetensors", "tokenizer.json", "merges.txt", "chat_template.jinja"]
UNWANTED = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "modeling_qwen.py",
    "model.mdl",
    "weights.pt",
    "training_args.pkl",
]


@pytest.fixture
def folder(random_qwen: Path, tmp_path: Path) -> Path:
    """A copy of the random model that a test may damage."""
    return shutil.copytree(random_qwen, tmp_path / "model")


def refusal(folder: Path) -> str:
    """The message with which a folder is refused."""
    with pytest.raises(LoratuneError) as raised:
        check_base(folder)
    assert raised.value.exit_code == Exit.MODEL
    return str(raised.value)


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("is_writable", [True, False])
def test_one_download_at_a_time(
    random_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_writable: bool
) -> None:
    """As of the processes of one machine; without a folder for the lock, they download all the same."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / ("cache" if is_writable else "file")))
    running, most = 0, 0

    def snapshot_download(name: str, **options: Any) -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.2)
        running -= 1
        return str(random_qwen)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: find_base(ModelSettings(base="Qwen/Qwen3-8B")), range(4)))
    assert found == [random_qwen] * 4
    assert (most == 1) == is_writable


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)


def test_a_name_that_is_neither_folder_nor_hub_id_is_refused() -> None:
    for name in ("nowhere", "a/b/c", "/nowhere/at/all", "../no-such-model"):
        with pytest.raises(LoratuneError, match="no such folder"):
            find_base(ModelSettings(base=name))


def test_a_hub_id_offline_fails_with_the_way_out() -> None:
    with pytest.raises(LoratuneError, match="give its folder") as raised:
        find_base(ModelSettings(base="nobody/nothing"))
    assert raised.value.exit_code == Exit.MODEL


@pytest.mark.parametrize(("hub", "module"), [("huggingface", "huggingface_hub"), ("modelscope", "modelscope")])
def test_a_hub_gives_safetensors_and_json_but_no_pickles_and_no_code(
    monkeypatch: pytest.MonkeyPatch, random_qwen: Path, hub: str, module: str
) -> None:
    asked = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(random_qwen)

    client = types.ModuleType(module)
    client.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module, client)

    assert find_base(ModelSettings(base="Qwen/Qwen3-8B", hub=hub, revision="main")) == random_qwen  # type: ignore[arg-type]
    assert (asked["name"], asked["revision"]) == ("Qwen/Qwen3-8B", "main")
    fetched = [
        any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])
        and not any(fnmatch(name, pattern) for pattern in asked["ignore_patterns"])
        for name in WANTED + UNWANTED
    ]
    assert fetched == [True] * len(WANTED) + [False] * len(UNWANTED)


def test_modelscope_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(LoratuneError, match=r'needs the package modelscope: pip install "loratune\[modelscope\]"'):
        find_base(ModelSettings(base="Qwen/Qwen3-8B", hub="modelscope"))


@pytest.mark.parametrize("key", ["_attn_implementation_internal", "model_file", "custom_pipelines"])
def test_a_config_that_asks_for_code_is_refused(folder: Path, key: str) -> None:
    edit_config(folder, **{key: {"AutoConfig": "evil.py"}})
    assert key in refusal(folder)


def test_an_unknown_architecture_is_refused_with_those_that_work(folder: Path) -> None:
    edit_config(folder, model_type="t5")
    said = refusal(folder)
    assert "no model of its own that writes text for model_type 't5'" in said
    assert "qwen3_5_moe" in said


def test_an_architecture_that_no_test_has_is_warned_of(folder: Path) -> None:
    assert untried(folder) == ()
    edit_config(folder, model_type="starcoder2")
    check_base(folder)
    (warning,) = untried(folder)
    assert "no test with model_type 'starcoder2'" in warning


def test_a_quantised_base_is_refused(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    assert "quantised already" in refusal(folder)


def test_a_truncated_weights_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors" in refusal(folder)
    assert "declares" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, (5).to_bytes(8, "little") + b"not{}"])
def test_a_weights_file_of_rubbish_is_named(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refusal(folder)


def test_an_index_may_not_name_files_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    assert "outside the folder" in refusal(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    weights = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    assert "model-00002-of-00002.safetensors" in refusal(folder)


def test_pickled_weights_are_never_opened(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    assert "never opened" in refusal(folder)


def test_tensors_that_are_missing_are_named(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3, layer_types=None)
    with pytest.raises(LoratuneError, match=r"layers\.2"):
        load_base(ModelSettings(base="x", dtype="float32"), folder, detect_hardware())


def test_a_config_that_contradicts_itself_is_one_message(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)  # its list of layer types has two entries
    with pytest.raises(
        LoratuneError, match=r"config\.json: makes no model: (num_hidden_layers 3|layer_types .*): "
    ) as raised:
        load_base(ModelSettings(base="x", dtype="float32"), folder, detect_hardware())
    assert raised.value.exit_code == Exit.MODEL


@pytest.mark.parametrize("kind", ["sliding_attention", "chunked_attention", "linear_attention"])
def test_a_kind_of_layer_that_the_config_cannot_run_is_one_message(folder: Path, kind: str) -> None:
    edit_config(folder, layer_types=["full_attention", kind])
    with pytest.raises(LoratuneError, match=r"config\.json: makes no model: layer_types ") as raised:
        load_base(ModelSettings(base="x", dtype="float32"), folder, detect_hardware())
    assert raised.value.exit_code == Exit.MODEL


def test_a_config_that_requires_a_kind_of_layer_loads(tmp_path: Path) -> None:
    tiny_config("qwen3_next", layer_types=["linear_attention", "full_attention"]).save_pretrained(tmp_path)
    edit_config(tmp_path, model_type="olmo_hybrid")
    assert load_config(tmp_path).layer_types == ["linear_attention", "full_attention"]


def test_a_kind_of_layer_with_its_settings_loads(folder: Path) -> None:
    edit_config(folder, layer_types=["full_attention", "sliding_attention"], use_sliding_window=True, sliding_window=4)
    model = load_base(ModelSettings(base="x", dtype="float32"), folder, detect_hardware())
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(5, 17)[None]  # longer than the window
    torch.testing.assert_close(model(ids).logits, reference(ids).logits)


def test_a_loaded_base_is_frozen_and_computes_what_transformers_computes(random_qwen: Path) -> None:
    model = load_base(ModelSettings(base="x", dtype="float32"), random_qwen, detect_hardware())
    reference = AutoModelForCausalLM.from_pretrained(random_qwen, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])

    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model(ids).logits, reference(ids).logits)


def test_weights_that_find_no_memory_are_told_as_lack_of_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's mmap says so in a RuntimeError; a MemoryError is what ends every command with exit code 6."""

    def lack(*_: Any, **__: Any) -> None:
        raise RuntimeError("unable to mmap 988097824 bytes from file <model.safetensors>: Cannot allocate memory (12)")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lack)
    with pytest.raises(MemoryError, match=r"model: unable to mmap 988097824 bytes"):
        load_base(ModelSettings(base="x", dtype="float32"), folder, detect_hardware())


@pytest.mark.parametrize("load", [load_plain, partial(load_mapped, in_float32=False)], ids=["plain", "mapped"])
def test_however_a_model_is_loaded_it_fails_in_the_same_words(
    folder: Path, monkeypatch: pytest.MonkeyPatch, load: Any
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    told = []
    for attempt in (lambda: load_base(ModelSettings(base="x"), folder, detect_hardware()), lambda: load(folder)):
        with pytest.raises(LoratuneError) as raised:
            attempt()
        told.append((raised.value.message, raised.value.exit_code))
    assert told == [(f"{folder}: cannot be loaded: ZeroDivisionError", Exit.MODEL)] * 2


def test_float16_on_a_cpu_is_refused(random_qwen: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("about machines without a GPU")
    with pytest.raises(LoratuneError, match="float16 needs a GPU"):
        load_base(ModelSettings(base="x", dtype="float16"), random_qwen, detect_hardware())


def test_padding_is_never_a_token_that_ends_an_answer(random_qwen: Path) -> None:
    tokenizer = load_tokenizer(random_qwen)
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    set_pad_token(tokenizer, ends)
    assert tokenizer.pad_token_id not in ends


def test_weight_files_come_in_order(random_qwen: Path) -> None:
    assert [path.name for path in weight_files(random_qwen)] == ["model.safetensors"]


def test_every_file_of_a_tokenizer_is_fetched_with_a_base_and_without_its_weights() -> None:
    assert {*VOCABULARY_FILES, *FINGERPRINTED} <= set(TOKENIZER_FILES)
    for name in TOKENIZER_FILES:
        assert any(fnmatch(name, pattern) for pattern in SMALL_HUB_FILES)
        assert not any(fnmatch(name, pattern) for pattern in BESIDE_A_BASE)
