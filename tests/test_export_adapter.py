"""The exported adapter folder: what is in it, what isn't, and that it computes what the run's adapter computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune.data.encoding.encoder import Encoder
from loratune.delivery.export.adapter_folder import export_adapter
from loratune.errors import Exit, LoratuneError
from loratune.recipe.data_sections import DataSettings
from loratune.recipe.sections import ModelSettings, PromptSettings, Recipe
from loratune.runs.card import base_name, hub_id, write_card
from loratune.runs.checkpoint import seal_checkpoint
from loratune.runs.fingerprint import fingerprint_base
from loratune.runs.manifest import Manifest, TrainedBase, TrainedTemplate
from loratune.runs.opening import open_adapter
from loratune.runs.output import begin_run, seal_run
from loratune.runs.record import RunRecord
from loratune.runs.tokenizer_files import TOKENIZER_FILES, copy_tokenizer_files

IDS = torch.tensor([[5, 6, 7, 8, 9]])
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def write_peft(base: Path, folder: Path, **settings: Any) -> None:
    """A PEFT folder with an update that shows, as save_pretrained leaves it."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **settings}
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings),
    )
    model.save_pretrained(folder, save_embedding_layers=False)


@pytest.fixture
def make_run(random_qwen: Path, tmp_path: Path) -> Callable[..., Path]:
    """A finished run of a local base, with a checkpoint beside its adapter."""

    def make(**sections: Any) -> Path:
        run = tmp_path / "run"
        data = DataSettings(train=[f"{tmp_path}/rows.json#5"])
        sections = {"model": ModelSettings(base=str(random_qwen)), "data": data, "output": str(run), **sections}
        recipe = Recipe(**sections)
        known = fingerprint_base(random_qwen, [random_qwen / "model.safetensors"])
        template = Encoder(AutoTokenizer.from_pretrained(random_qwen), recipe.prompt).record
        base = TrainedBase(recipe.model.base, str(random_qwen), known)
        begin_run(run, recipe, Manifest(base, TrainedTemplate(**template), record=RunRecord.of(recipe)))
        for folder in (run / "adapter", run / "checkpoints" / "step-000002"):
            write_peft(random_qwen, folder)
        copy_tokenizer_files(random_qwen, run / "adapter")
        write_card(run / "adapter", RunRecord.of(recipe))
        for name in ("optimizer.pt", "trainer_state.json", "rng_state.pth", "scheduler.pt"):
            (run / "checkpoints" / "step-000002" / name).write_bytes(b"state")
        seal_checkpoint(run / "checkpoints" / "step-000002", 2, {"settings": {}, "rest": {}, "versions": {}}, {})
        seal_run(run)
        return run

    return make


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An empty folder to export into."""
    (tmp_path / "exported").mkdir()
    return tmp_path / "exported"


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def logits(base: Path, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    with torch.no_grad():
        return model.eval()(IDS).logits


def read_config(folder: Path) -> Any:
    return json.loads((folder / "adapter_config.json").read_text())


def test_an_exported_run_is_loaded_by_peft_with_the_same_logits(
    make_run: Callable[..., Path], random_qwen: Path, exported: Path
) -> None:
    run = make_run()
    export_adapter(open_adapter(run), exported)

    assert names(exported) == ADAPTER_FILES | TOKENIZER
    assert torch.equal(logits(random_qwen, exported), logits(random_qwen, run / "adapter"))
    for name in ("adapter_model.safetensors", *TOKENIZER):
        assert (exported / name).read_bytes() == (run / "adapter" / name).read_bytes()


def test_the_config_means_the_same_to_peft_and_names_no_path(make_run: Callable[..., Path], exported: Path) -> None:
    run = make_run()
    export_adapter(open_adapter(run), exported)

    own = {"base_model_name_or_path": "random-qwen", "inference_mode": True}
    assert PeftConfig.from_pretrained(exported).to_dict() == PeftConfig.from_pretrained(run / "adapter").to_dict() | own
    assert not {"megatron_core", "qalora_group_size", "modules_to_save"} & read_config(exported).keys()
    assert read_config(exported)["lora_dropout"] == 0


def test_no_file_says_where_it_was_made(make_run: Callable[..., Path], tmp_path: Path, exported: Path) -> None:
    export_adapter(open_adapter(make_run()), exported)
    for path in exported.iterdir():
        assert str(tmp_path.parent).encode() not in path.read_bytes()


def test_a_base_from_a_hub_is_named_by_its_id(make_run: Callable[..., Path], exported: Path) -> None:
    export_adapter(open_adapter(make_run(model=ModelSettings(base="Qwen/Qwen2.5-7B-Instruct"))), exported)

    assert read_config(exported)["base_model_name_or_path"] == "Qwen/Qwen2.5-7B-Instruct"
    card = ModelCard.load(exported / "README.md")
    assert card.data.base_model == "Qwen/Qwen2.5-7B-Instruct"
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert card.data.tags == ["lora", "loratune"]


def test_a_local_base_is_named_by_its_folder_alone(make_run: Callable[..., Path], exported: Path) -> None:
    export_adapter(open_adapter(make_run()), exported)
    card = ModelCard.load(exported / "README.md")
    assert card.data.base_model is None
    assert "**random-qwen**" in card.text
    assert "rows.json#5" in card.text


def test_a_folder_that_looks_like_a_hub_id_is_known_from_where_it_lay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert hub_id("models/qwen") == "models/qwen"
    assert hub_id("models/qwen", "/data/models/qwen") is None
    assert (
        hub_id("Qwen/Qwen3-8B", "/root/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/0a") == "Qwen/Qwen3-8B"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    assert hub_id("models/qwen") is None
    for base in ("/models/qwen/", "./models/qwen", "~/qwen", r"C:\models\qwen", "qwen"):
        assert hub_id(base) is None
        assert base_name(base) == "qwen"


def test_of_a_checkpoint_only_the_adapter_is_taken(make_run: Callable[..., Path], exported: Path) -> None:
    export_adapter(open_adapter(make_run() / "checkpoints" / "step-000002"), exported)
    assert names(exported) == ADAPTER_FILES


def test_a_plain_peft_folder_is_exported_too(random_qwen: Path, tmp_path: Path, exported: Path) -> None:
    write_peft(random_qwen, tmp_path / "theirs", lora_dropout=0.1, layers_to_transform=0)
    export_adapter(open_adapter(tmp_path / "theirs"), exported)

    assert names(exported) == ADAPTER_FILES
    assert torch.equal(logits(random_qwen, exported), logits(random_qwen, tmp_path / "theirs"))
    config = read_config(exported)
    assert (config["base_model_name_or_path"], config["layers_to_transform"]) == ("random-qwen", 0)
    card = ModelCard.load(exported / "README.md")
    assert "| rank, alpha | 4, 8 |" in card.text
    assert "down_proj, q_proj" in card.text


@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_a_template_of_loratune_s_own_becomes_the_folder_s(
    make_run: Callable[..., Path], exported: Path, template: str
) -> None:
    run = make_run(prompt=PromptSettings(template=template))
    export_adapter(open_adapter(run), exported)

    messages = [{"role": "user", "content": "Who are you?"}]
    elsewhere = AutoTokenizer.from_pretrained(exported).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    assert elsewhere == Encoder(tokenizer, PromptSettings(template=template)).prompt_ids(messages)


def test_the_card_tells_what_a_prompt_needs_but_not_its_text(make_run: Callable[..., Path], exported: Path) -> None:
    prompt = PromptSettings(system="You are the secret one.", instruction_prefix="Internal: ")
    export_adapter(open_adapter(make_run(prompt=prompt)), exported)
    card = (exported / "README.md").read_text()
    assert "the system prompt of the training and its instruction prefix" in card
    assert "secret" not in card
    assert "Internal" not in card


@pytest.mark.parametrize("place", ["home", "data"])
def test_a_file_that_names_a_local_path_stops_the_export(
    make_run: Callable[..., Path], exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("HOME", "/home/小明")
    run = make_run()
    path = {"home": "/home/小明/qwen", "data": f"{tmp_path}/rows.json"}[place]
    (run / "adapter" / "tokenizer_config.json").write_text(json.dumps({"name_or_path": path}))
    with pytest.raises(LoratuneError, match=r"tokenizer_config\.json: /") as raised:
        export_adapter(open_adapter(run, force=True), exported)
    assert raised.value.exit_code == Exit.MODEL


def test_a_word_in_the_vocabulary_is_no_path(
    make_run: Callable[..., Path], exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    monkeypatch.setenv("HOME", "/root")
    (run / "adapter" / "vocab.json").write_text('{"/root": 1}')
    seal_run(run)
    export_adapter(open_adapter(run), exported)
    assert "vocab.json" in TOKENIZER_FILES
    assert "vocab.json" in names(exported)


@pytest.mark.parametrize("damage", ["weights", "nan", "config", "other kind"])
def test_a_damaged_adapter_is_not_exported(random_qwen: Path, tmp_path: Path, exported: Path, damage: str) -> None:
    folder = tmp_path / "theirs"
    write_peft(random_qwen, folder)
    source = open_adapter(folder)
    if damage == "weights":
        (folder / "adapter_model.safetensors").unlink()
    elif damage == "nan":
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    else:
        (folder / "adapter_config.json").write_text("{" if damage == "config" else '{"peft_type": "IA3"}')
    with pytest.raises(LoratuneError) as raised:
        export_adapter(source, exported)
    assert raised.value.exit_code == Exit.MODEL
