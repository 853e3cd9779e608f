"""What `loratune merge` proves and reports, and that files or merges that are wrong don't pass."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from misreading import misread_updates
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import Result

from loratune.delivery.merge import merge, model_folder
from loratune.delivery.merge.update import TensorUpdate
from loratune.delivery.verification import proof, verify
from loratune.errors import Exit
from loratune.runs.verification import Answer

WEIGHTS = "model.safetensors"
UPDATED, KEPT = "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"
WIDE = {"COLUMNS": "20000"}

Merge = Callable[..., Result]


@pytest.fixture(scope="module")
def run(short_run: Path) -> Path:
    return short_run


@pytest.fixture
def merged(cli: Callable[..., Result], run: Path, output: Path) -> Merge:
    """Merge the run into `output`."""
    return lambda *arguments: cli("merge", "--adapter", run, "--output", output, *arguments, env=WIDE)


def failed(result: Result, code: Exit, output: Path) -> str:
    """The message of a merge that failed as it should, and left nothing."""
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr or result.exception
    assert result.stderr.count("error: ") == 1
    assert list(output.parent.iterdir()) == []
    return str(result.stderr.partition("error: ")[2])


def report(output: Path) -> Any:
    return json.loads((output / "verification.json").read_text(encoding="utf-8"))


# --- what is reported ---


def test_the_verification_says_what_was_merged_and_compared(merged: Merge, run: Path, output: Path) -> None:
    result = merged("--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)  # and nothing else is on stdout
    assert found.pop("schema") == "loratune/merge/1"
    assert found == report(output)
    assert (found["program"], found["format_version"]) == ("loratune", 1)
    for name in ("loratune", "torch", "transformers", "peft", "safetensors"):
        assert found["versions"][name] == importlib.metadata.version(name)
    assert (found["base"], found["quantization_in_training"], found["merge_base"]) == (
        "random-qwen",
        "none",
        "original",
    )
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert found["adapter_sha256"] == hashlib.sha256(adapter).hexdigest()

    with safe_open(output / WEIGHTS, framework="pt") as file:
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    assert (found["bytes"], found["dtype"]) == (sum(sizes.values()), "float32")
    back = found["read_back"]
    assert (back["tensors"], back["identical"], back["updated"]) == (len(sizes), len(sizes) - 14, 14)
    assert (back["rows"], back["sampled_rows"]) == (2 * (32 + 16 + 16 + 32 + 48 + 48 + 32), 14 * 16)
    assert back["largest_forward_error"] < 1e-9
    assert 0 < back["lost_to_rounding"] < 1e-3
    assert 0 <= back["largest_error_steps"] <= 0.5
    assert back["unchanged"] == []

    assert found["verified"] == "files and logits"
    assert found["compared_on"] == "the run's validation rows"
    labels = [row["labels"] for row in json.loads((run / "probe.json").read_text())["rows"]]
    assert found["logits"]["original"]["tokens"] == sum(label >= 0 for row in labels for label in row)
    assert found["logits"]["original"]["top1_agreement"] == 1
    assert found["answers"]
    assert all(answer["merged"] == answer["adapter"] for answer in found["answers"])
    assert 0 < found["seconds"]["until_files_proved"] <= found["seconds"]["total"]
    assert found["warnings"] == []
    assert str(run.parent) not in result.stdout  # a merged model may be given away


def test_without_verification_it_is_said_loudly_that_nothing_is_known(merged: Merge, output: Path) -> None:
    result = merged("--no-verify")
    assert result.exit_code == 0, result.stderr
    assert "warning: --no-verify: the merged model is not compared with base + adapter" in result.stderr
    assert "NOT VERIFIED" in result.stderr
    assert result.stdout == ""
    found = report(output)
    assert (found["verified"], found["read_back"], found["logits"], found["answers"]) == ("nothing", None, None, None)


def test_without_logits_the_files_alone_are_compared(
    merged: Merge, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "compare_models", lambda *_: pytest.fail("a model was run"))
    result = merged("--no-logits")
    assert result.exit_code == 0, result.stderr
    assert "NOT VERIFIED" not in result.stderr
    found = report(output)
    assert (found["verified"], found["logits"], found["answers"]) == ("files", None, None)
    assert found["read_back"]["tensors"] == 26


def test_what_a_model_answers_cannot_steer_the_terminal(merged: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer("\x1b[1mWho?", "\x1b[31mred\x1b]0;title\x07", "\x1b[2Jother", 9, 2, 0.5)
    monkeypatch.setattr(verify, "compare_answers", lambda *_: [answer])
    result = merged()
    assert "red" in result.stderr
    assert "red …" not in result.stderr  # whether it ended is not known
    assert "the same for 2 of 9 tokens, then base + adapter finds another token 65% likelier" in result.stderr
    assert "\x1b" not in result.stderr
    assert "\x07" not in result.stderr


def test_an_answer_that_was_cut_is_marked(merged: Merge, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "ANSWER_TOKENS", 1)
    result = merged()
    assert result.exit_code == 0, result.stderr
    (answer, *_) = report(output)["answers"]
    assert (answer["tokens"], answer["ended"]) == (1, False)
    lines = [line.split() for line in result.stderr.splitlines()]
    assert next("…" in line for line in lines if line[:1] == ["merged"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--merge-base", "original"), "--merge-base is for adapters that were trained on a quantised base"),
        (("--merge-base", "dequantized"), "--merge-base is for adapters that were trained on a quantised base"),
        (("--weights", "1"), "--weights is for several adapters"),
        (("--combine", "svd"), "--combine is for several adapters"),
        (("--public",), "are for --push"),
        (("--dtype", "int8"), "'int8' is not one of 'bfloat16', 'float16', 'float32'"),
        (("--combine", "average"), "'average' is not one of"),
        *(
            (("--shard-size", size), f"--shard-size {size!r}: give a size such as 5GB or 900MB")
            for size in ("0", "0.1", "-1", "5XB", "GB", "", "nan", "1e9", "9" * 400 + "GB")
        ),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_written(
    merged: Merge, output: Path, arguments: tuple[str, str], words: str
) -> None:
    result = merged(*arguments)
    assert (result.exit_code, result.stdout) == (Exit.USAGE, ""), repr(result.exception)
    assert words in result.stderr
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(("size", "files"), [("1kB", 24), ("0.3 MB", 2), ("5gib", 1), ("447616", 1), ("447615", 2)])
def test_sizes_of_files_are_kept(merged: Merge, output: Path, size: str, files: int) -> None:
    assert merged("--shard-size", size, "--no-logits").exit_code == 0
    assert len(list(output.glob("*.safetensors"))) == files


# --- files that are not what was written ---


def flip(offset: Callable[[Path], int]) -> Callable[[Path], None]:
    """Changes the highest bit of the byte at an offset: sign or exponent."""

    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[offset(path)] ^= 0x80
        path.write_bytes(content)

    return change


def last_byte_of(name: str, row: int) -> Callable[[Path], int]:
    """Offset of the last byte of a row's first value."""

    def offset(path: Path) -> int:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        entry = json.loads(content[8 : 8 + length])[name]
        return int(8 + length + entry["data_offsets"][0] + 4 * row * entry["shape"][1] + 3)

    return offset


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip(last_byte_of(KEPT, 77)), f"{KEPT}: the written file holds other values than the base from row"),
        (flip(last_byte_of(UPDATED, 0)), f"{UPDATED}: the written file holds row 0"),
        (flip(last_byte_of(UPDATED, 31)), f"{UPDATED}: the written file holds row 31"),
        (flip(lambda _: 60), "cannot be read back"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cannot be read back"),
        (lambda path: path.write_bytes(b""), "cannot be read back"),
        (lambda path: path.unlink(), "cannot be read back"),
    ],
    ids=["kept", "updated first", "updated last", "header", "cut off", "empty", "gone"],
)
@pytest.mark.parametrize("logits", ["--logits", "--no-logits"])
def test_a_file_that_changes_after_it_was_written_is_noticed(
    merged: Merge, output: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, words: str, logits: str
) -> None:
    write = merge.write_merged

    def write_and_damage(plan: Any, base: Any, folder: Path, advance: Any) -> None:
        write(plan, base, folder, advance)
        damage(folder / WEIGHTS)

    monkeypatch.setattr(merge, "write_merged", write_and_damage)
    assert words in failed(merged(logits), Exit.MODEL, output)


@pytest.mark.parametrize("factor", [2.0, 0.5, -1.0, 0.0])
def test_a_merge_that_writes_other_updates_is_noticed_by_reading_back(
    merged: Merge, output: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    write = merge.write_merged

    def write_scaled(plan: Any, *others: Any) -> None:
        tensors = {
            name: dataclasses.replace(tensor, update=dataclasses.replace(update, scaling=update.scaling * factor))
            if (update := tensor.update)
            else tensor
            for name, tensor in plan.tensors.items()
        }
        write(dataclasses.replace(plan, tensors=tensors), *others)

    monkeypatch.setattr(merge, "write_merged", write_scaled)
    assert "rounding steps away from PEFT's" in failed(merged("--no-logits"), Exit.MODEL, output)


def test_updates_that_were_misunderstood_throughout_are_noticed_by_peft_s_own(
    merged: Merge, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled(updates: dict[str, TensorUpdate]) -> None:
        for update in updates.values():
            update.scaling *= 1.1

    misread_updates(monkeypatch, scaled)
    assert "rounding steps away from PEFT's" in failed(merged(), Exit.MODEL, output)
    # The models would tell it too, if nothing had been read back.
    monkeypatch.setattr(merge, "read_back", lambda *_: None)
    told = failed(merged(), Exit.MODEL, output)
    assert "the merged model is not what base + adapter is" in told
    assert "The merged model has been removed" in told
    assert "mean KL divergence" in told


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tie_word_embeddings": False}, "lack lm_head.weight"),
        ({"num_hidden_layers": 1, "layer_types": None}, "model.layers.1."),
        ({"num_hidden_layers": 3, "layer_types": None}, "model.layers.2."),
        ({"num_hidden_layers": 3}, "layer_types"),  # contradicts layer_types
        ({"hidden_act": "nonsense"}, "hidden_act 'nonsense'"),
        ({"hidden_size": 64}, "fetch config.json again"),
        ({"model_type": "nonsense"}, "no model_type 'nonsense'"),
        ({"rms_norm_eps": 1e-2}, "is not what base + adapter is"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}, "is not what base + adapter is"),
        ({"rope_theta": 10.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}, "is not what base"),
    ],
)
def test_a_config_that_went_wrong_is_noticed_twice(
    merged: Merge, output: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], words: str
) -> None:
    write = model_folder._write_config

    def write_wrong(base: Path, folder: Path, *others: Any) -> list[str]:
        changes = write(base, folder, *others)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))
        return changes

    monkeypatch.setattr(model_folder, "_write_config", write_wrong)
    assert f"config.json: {next(iter(values))} is" in failed(merged("--no-logits"), Exit.MODEL, output)
    monkeypatch.setattr("loratune.delivery.merge.merge.check_beside", lambda *_: None)
    assert words in failed(merged(), Exit.MODEL, output)


@pytest.mark.parametrize("flag", ["--no-logits", "--no-verify"])
def test_a_generation_config_that_nothing_can_read_is_not_written(
    merged: Merge, random_qwen: Path, output: Path, tmp_path: Path, flag: str
) -> None:
    base = shutil.copytree(random_qwen, tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": [-1, "x"], "temperature": "warm"}')
    told = failed(merged("--base-model", base, flag), Exit.MODEL, output)
    assert "eos_token_id is [-1, 'x']" in told
    assert "temperature is 'warm'" in told


def test_an_adapter_that_changes_nothing_is_refused_unless_forced(
    cli: Callable[..., Result], run: Path, output: Path, random_qwen: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    idle = {name: tensor * (".lora_B." not in name) for name, tensor in tensors.items()}
    save_file(idle, adapter / "adapter_model.safetensors")
    arguments = ("merge", "-a", adapter, "-m", random_qwen, "-o", output, "--no-logits")
    told = failed(cli(*arguments, env=WIDE), Exit.MODEL, output)
    assert "14 of 14 tensors that the adapter changes still equal the base's" in told
    assert cli(*arguments, "--force").exit_code == 0
    assert "still equal the base's" in str(report(output)["warnings"])
    base, found = load_file(random_qwen / WEIGHTS), load_file(output / WEIGHTS)
    assert all(torch.equal(found[name], base[name]) for name in found)
