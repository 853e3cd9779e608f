"""Which base and adapter `merge` and `infer` take: damaged and hostile folders, other bases, changed files, --force."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tree
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import Result

from loratune.errors import Exit

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
ANSWER = ("--prompt", "hi", "--max-new-tokens", "2")
WIDE = {"COLUMNS": "20000"}

Refusal = Callable[..., str]
Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def trained(short_run: Path) -> Path:
    return short_run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def base(random_qwen: Path, tmp_path: Path) -> Path:
    """A copy of its base."""
    return Path(shutil.copytree(random_qwen, tmp_path / "base"))


@pytest.fixture(scope="module")
def saved(random_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as PEFT's save_pretrained leaves it; not to be changed."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    config = LoraConfig(task_type="CAUSAL_LM", **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(random_qwen), config)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture
def plain(saved: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(saved, tmp_path / "plain"))


@pytest.fixture
def refusal(cli: Callable[..., Result], tmp_path: Path, random_qwen: Path) -> Refusal:
    """Run a command that has to fail with one message and to leave every file and folder as it was."""

    def run_command(command: str, *arguments: Any, code: Exit = Exit.MODEL) -> str:
        places = (tmp_path, random_qwen)
        before = [tree(place) for place in places]
        extra = ("--output", tmp_path / "merged") if command == "merge" else ANSWER
        result = cli(command, *arguments, *extra, env=WIDE)
        assert (result.exit_code, result.stdout) == (code, ""), result.stderr or result.exception
        assert result.stderr.count("error: ") == 1
        assert [tree(place) for place in places] == before
        return str(result.stderr.partition("error: ")[2])

    return run_command


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def scale(path: Path, factor: float) -> None:
    save_file({name: weight * factor for name, weight in load_file(path).items()}, path, {"format": "pt"})


def edit_header(path: Path, name: str, **values: Any) -> None:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header[name].update(values)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def index(*places: Any) -> Damage:
    """Writes an index that puts tensors into some places."""
    return lambda base: (base / INDEX).write_text(json.dumps({"weight_map": dict(enumerate(places))}))


# --- the base's folder ---

DAMAGED_BASES: dict[str, tuple[Damage, str]] = {
    "it is not there": (shutil.rmtree, "no such folder"),
    "it is empty": (lambda base: [path.unlink() for path in base.iterdir()], "no config.json in it"),
    "config without text": (lambda base: (base / "config.json").write_text("{"), "config.json: cannot be read"),
    "odd architecture": (
        lambda base: edit(base / "config.json", model_type=[]),
        "no model of its own that writes text",
    ),
    "file cut off": (lambda base: cut(base / "model.safetensors"), "model.safetensors: 450262 bytes where"),
    "file empty": (lambda base: (base / "model.safetensors").write_bytes(b""), "model.safetensors: cut off"),
    "unknown type": (lambda base: edit_header(base / "model.safetensors", NORM, dtype="F8"), "contradicts itself"),
    "wrong shape": (lambda base: edit_header(base / "model.safetensors", NORM, shape=[33]), "contradicts itself"),
    "shape no list": (lambda base: edit_header(base / "model.safetensors", NORM, shape="x"), "contradicts itself"),
    "pickled weights": (
        lambda base: (base / "model.safetensors").rename(base / "pytorch_model.bin"),
        "only pickled weights (.bin), which are never opened; convert them to safetensors first",
    ),
    "missing shard": (index("model.safetensors", "model-00002-of-00002.safetensors"), "missing: model-00002-of-00002"),
    "shard elsewhere": (index("../model.safetensors"), "outside the folder: '../model.safetensors'"),
    "absolute shard": (index("/etc/passwd"), "outside the folder: '/etc/passwd'"),
    "shard no name": (index("model.safetensors", 5), "outside the folder: 5"),
    "shard a list": (index([]), "outside the folder: []"),
    "index no map": (lambda base: (base / INDEX).write_text('{"weight_map": []}'), "has no weight_map"),
    "index empty": (index(), "weights are missing: the index is empty"),
}


@pytest.mark.parametrize("command", ["merge", "infer"])
@pytest.mark.parametrize("damage", DAMAGED_BASES)
def test_a_damaged_base_is_refused_before_anything_is_written(
    refusal: Refusal, trained: Path, base: Path, damage: str, command: str
) -> None:
    apply, words = DAMAGED_BASES[damage]
    apply(base)
    told = refusal(command, "--adapter", trained, "--base-model", base, "--force")
    assert words in told
    assert str(base) in told


@pytest.mark.parametrize("command", ["merge", "infer"])
@pytest.mark.parametrize("name", ["x" * 5000, "https://huggingface.co/a/b", "../..", ".", "~nobody/model"])
def test_a_name_that_is_no_model_is_refused(refusal: Refusal, trained: Path, name: str, command: str) -> None:
    told = refusal(command, "--adapter", trained, "--base-model", name)
    assert "no such folder" in told or "no config.json" in told
    told = refusal(command, "--adapter", name)
    assert "no such folder" in told or "neither a run folder nor an adapter" in told


def test_what_is_given_as_something_else_is_told_with_its_own_flag(
    refusal: Refusal, trained: Path, base: Path, plain: Path
) -> None:
    for command in ("merge", "infer"):
        assert "a whole model, not an adapter; give it with --model, which infer, serve and export take" in refusal(
            command, "--adapter", base
        )
        told = refusal(command, "--adapter", trained / "report.json")
        assert "a file, not a folder" in told
    for folder in (trained, plain):
        assert "it holds an adapter, which infer, serve and export take with --adapter" in refusal(
            "infer", "--model", folder
        )


@pytest.mark.parametrize("command", ["merge", "infer"])
@pytest.mark.parametrize(
    "named", ["Qwen/Qwen2.5-0.5B", "https://huggingface.co/a/b", "file:///etc", "~", "x" * 5000, "x\0", "", None, 5]
)
def test_a_base_that_an_adapter_names_is_shown_and_not_followed(
    refusal: Refusal, plain: Path, monkeypatch: pytest.MonkeyPatch, named: Any, command: str
) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr("huggingface_hub.snapshot_download", connect)
    edit(plain / CONFIG, base_model_name_or_path=named)
    told = refusal(command, "--adapter", plain)
    assert f"names its base {named!r}, which is not followed; give the base with --base-model" in told


def test_a_folder_that_an_adapter_names_is_no_way_to_other_files(
    refusal: Refusal, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    edit(plain / CONFIG, base_model_name_or_path="../..")
    assert "../..: no config.json in it" in refusal("merge", "--adapter", plain)


# --- pickles ---


class Malice:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def pickled(tmp_path: Path) -> bytes:
    """A pickle that would make tmp_path/canary."""
    content = pickle.dumps(Malice(tmp_path / "canary"))
    pickle.loads(content)
    (tmp_path / "canary").rmdir()
    return content


@pytest.mark.parametrize("command", ["merge", "infer"])
def test_an_adapter_of_pickles_is_never_opened(
    refusal: Refusal, plain: Path, random_qwen: Path, pickled: bytes, command: str
) -> None:
    (plain / WEIGHTS).unlink()
    (plain / "adapter_model.bin").write_bytes(pickled)
    told = refusal(command, "--adapter", plain, "--base-model", random_qwen)
    assert f"{plain}: no {WEIGHTS} in it, only pickled weights, which are never opened" in told


@pytest.mark.parametrize("command", ["merge", "infer"])
def test_a_checkpoint_s_pickles_and_a_base_s_are_never_opened(
    cli: Callable[..., Result], run: Path, base: Path, tmp_path: Path, pickled: bytes, command: str, refusal: Refusal
) -> None:
    (checkpoint,) = (run / "checkpoints").iterdir()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "adapter_model.bin"):
        (checkpoint / name).write_bytes(pickled)
    for name in ("pytorch_model.bin", "consolidated.pth"):
        (base / name).write_bytes(pickled)
    told = refusal(command, "--adapter", checkpoint, "--base-model", base)
    assert all(name in told for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"))
    extra = ("--output", tmp_path / "merged") if command == "merge" else ANSWER
    result = cli(command, "--adapter", checkpoint, "--base-model", base, *extra, "--force")
    assert result.exit_code == 0, result.stderr
    assert not (tmp_path / "canary").exists()
    assert not [path for path in tmp_path.glob("merged/*") if path.read_bytes() == pickled]


# --- another base ---

OTHER_BASES: dict[str, tuple[Damage, str]] = {
    "weights": (lambda base: scale(base / "model.safetensors", 1.01), "weights differ"),
    "tokenizer": (lambda base: edit(base / "tokenizer.json", more=1), "tokenizer differs"),
    "config": (lambda base: edit(base / "config.json", rms_norm_eps=1e-3), "config differs"),
}


@pytest.mark.parametrize("command", ["merge", "infer"])
@pytest.mark.parametrize("part", OTHER_BASES)
def test_another_base_of_the_same_shape_needs_force(
    refusal: Refusal, cli: Callable[..., Result], trained: Path, base: Path, random_qwen: Path, part: str, command: str
) -> None:
    change, words = OTHER_BASES[part]
    change(base)
    told = refusal(command, "--adapter", trained, "--base-model", base)
    assert f"trained on {random_qwen} and {base} is another model: " in told
    assert words.split()[0] in told
    assert "--base-model" in told
    assert "--force" in told

    output = base.with_name("merged")
    extra = ("--output", output) if command == "merge" else ANSWER
    result = cli(command, "--adapter", trained, "--base-model", base, "--force", *extra, env=WIDE)
    assert result.exit_code == 0, result.stderr
    assert f"warning: the adapter was trained on {random_qwen} and {base} is another model" in result.stderr
    if command == "merge":
        (warning,) = json.loads((output / "verification.json").read_text())["warnings"]
        assert "is another model" in warning


def test_a_base_saved_by_another_version_is_the_same_base(
    cli: Callable[..., Result], trained: Path, base: Path, tmp_path: Path
) -> None:
    edit(base / "config.json", transformers_version="4.0.0", _name_or_path="elsewhere")
    result = cli("merge", "--adapter", trained, "--base-model", base, "--output", tmp_path / "merged", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["warnings"] == []


def test_a_plain_adapter_merges_with_a_word_on_what_nobody_could_check(
    cli: Callable[..., Result], plain: Path, random_qwen: Path, tmp_path: Path
) -> None:
    before = tree(plain), tree(random_qwen)
    result = cli("merge", "-a", plain, "-m", random_qwen, "-o", tmp_path / "merged", "--json", env=WIDE)
    assert result.exit_code == 0, result.stderr
    assert "no loratune manifest: base and prompt template could not be checked" in result.stderr
    (warning,) = json.loads(result.stdout)["warnings"]
    assert "could not be checked" in warning
    assert (tree(plain), tree(random_qwen)) == before


# --- a changed adapter ---

CHANGES: dict[str, tuple[Damage, str, str]] = {
    "alpha": (lambda adapter: edit(adapter / CONFIG, lora_alpha=99), CONFIG, ""),
    "rank": (lambda adapter: edit(adapter / CONFIG, r=9), CONFIG, "fit the base"),
    "weights": (lambda adapter: scale(adapter / WEIGHTS, 1.5), WEIGHTS, ""),
    "weights cut off": (lambda adapter: cut(adapter / WEIGHTS), WEIGHTS, "damaged"),
    "weights gone": (lambda adapter: (adapter / WEIGHTS).unlink(), WEIGHTS, f"no {WEIGHTS} in it"),
}


@pytest.mark.parametrize("command", ["merge", "infer"])
@pytest.mark.parametrize("inner", ["", "adapter"])
@pytest.mark.parametrize("change", CHANGES)
def test_an_adapter_that_has_changed_since_its_run_needs_force(
    refusal: Refusal, cli: Callable[..., Result], run: Path, change: str, inner: str, command: str
) -> None:
    apply, name, words = CHANGES[change]
    apply(run / "adapter")
    told = refusal(command, "--adapter", run / inner)
    assert f"{run}: changed or missing since the run ended: adapter/{name}; restore" in told
    assert "--force" in told
    if words:  # what cannot work, force does not bring about
        assert words in refusal(command, "--adapter", run / inner, "--force")
        return
    output = run.with_name("merged")
    extra = ("--output", output, "--json") if command == "merge" else ANSWER
    result = cli(command, "--adapter", run / inner, "--force", *extra, env=WIDE)
    assert result.exit_code == 0, result.stderr
    warning = f"changed since the run ended: adapter/{name}"
    assert f"warning: {warning}" in result.stderr
    if command == "merge":
        assert json.loads(result.stdout)["warnings"] == [warning]


@pytest.mark.parametrize("command", ["merge", "infer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(
    refusal: Refusal, plain: Path, random_qwen: Path, value: float, command: str
) -> None:
    weights = load_file(plain / WEIGHTS)
    first = min(weights)
    weights[first][1, 2] = value
    save_file(weights, plain / WEIGHTS)
    told = refusal(command, "--adapter", plain, "--base-model", random_qwen)
    assert f"{plain / WEIGHTS}: holds NaN or infinity in 1 tensor, first {first}" in told


@pytest.mark.parametrize("command", ["merge", "infer"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", "4"), ("r", None), ("r", 4.5), ("lora_alpha", "8"), ("lora_alpha", None), ("lora_alpha", True),
        ("lora_alpha", float("nan")), ("lora_alpha", float("inf")), ("rank_pattern", {"(": 3}), ("rank_pattern", [1]),
        ("alpha_pattern", {"q_proj": "x"}), ("alpha_pattern", "x"), ("target_modules", 5), ("modules_to_save", [1]),
        ("bias", "some"), ("trainable_token_indices", [-1]), ("trainable_token_indices", {"lm_head": 3}),
        ("peft_type", "IA3"), ("auto_mapping", {"base_model_class": "X", "parent_library": "evil"}),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_refused_by_name(
    refusal: Refusal, plain: Path, random_qwen: Path, key: str, value: Any, command: str
) -> None:
    edit(plain / CONFIG, **{key: value})
    told = refusal(command, "--adapter", plain, "--base-model", random_qwen)
    assert f"{plain / CONFIG}: " in told
    assert key in told or "not a LoRA adapter" in told


def test_tensors_that_the_config_s_targets_leave_out_are_noticed(
    refusal: Refusal, plain: Path, random_qwen: Path
) -> None:
    edit(plain / CONFIG, target_modules=["q_proj"])
    for command in ("merge", "infer"):
        told = refusal(command, "--adapter", plain, "--base-model", random_qwen)
        assert "config and its tensors do not match" in told


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("probe.json", "{", "probe.json: cannot be read"),
        ("probe.json", "{}", "probe.json: damaged; restore it, or delete it"),
        ("probe.json", '{"rows": [{}], "questions": []}', "probe.json: damaged"),
        ("probe.json", '{"rows": [{"input_ids": [1], "labels": [1]}], "questions": []}', "probe.json: damaged"),
        ("probe.json", '{"rows": [{"input_ids": ["a", 1], "labels": [1, 1]}], "questions": []}', "probe.json: damaged"),
        ("probe.json", '{"rows": [], "questions": [[]]}', "probe.json: damaged"),
        ("probe.json", '{"rows": [], "questions": [[{"role": "user"}]]}', "probe.json: damaged"),
        ("manifest.json", "{", "manifest.json: cannot be read"),
        ("manifest.json", '{"format_version": 1}', "manifest.json: damaged: it does not say what the base was"),
        ("manifest.json", '{"format_version": 1, "files": []}', "manifest.json: damaged"),
        ("manifest.json", '{"format_version": 2}', "made by another version of loratune (format 2, this one reads 1)"),
    ],
)
def test_a_damaged_run_is_one_message(refusal: Refusal, run: Path, name: str, content: str, words: str) -> None:
    (run / name).write_text(content)
    flags = ["--force"] if name == "probe.json" else []  # it is sealed
    assert words in refusal("merge", "--adapter", run, *flags)


def test_a_run_without_probe_rows_is_compared_on_built_in_questions(
    cli: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    (run / "probe.json").unlink()
    result = cli("merge", "--adapter", run, "--output", tmp_path / "merged", "--json", "--force")
    assert json.loads(result.stdout)["compared_on"] == "built-in questions"
