"""`loratune export`: what lands in the folder is what other programs load, or nothing lands there."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import Result

CLI = Callable[..., Result]
pytestmark = pytest.mark.filterwarnings(
    # transformers 5.23's GGUF loader hands numpy's read-only arrays to torch.
    "ignore:The given NumPy array is not writable:UserWarning"
)


@pytest.fixture(scope="module")
def run(random_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on random weights, with a system prompt that the exports have to carry."""
    from conftest import ROWS
    from typer.testing import CliRunner

    from loratune.cli.app import app

    place = tmp_path_factory.mktemp("export")
    rows = place / "rows.json"
    rows.write_text(json.dumps(ROWS), encoding="utf-8")
    arguments = [
        "sft", "--model.base", random_qwen, "--model.dtype", "float32", "--data.train", rows,
        "--prompt.system", "You add numbers.", "--training.max_steps", "3", "--training.learning_rate", "1e-2",
        "--training.batch_size", "4", "--output", place / "my run",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.stderr
    return place / "my run"


@pytest.fixture(scope="module")
def merged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from typer.testing import CliRunner

    from loratune.cli.app import app

    output = tmp_path_factory.mktemp("merged") / "sums"
    done = CliRunner().invoke(app, ["merge", "--adapter", str(run), "--output", str(output), "--no-logits"])
    assert done.exit_code == 0, done.stderr
    return output


def logits(model: Any, text: str = "How much is 3+3?") -> torch.Tensor:
    ids = torch.tensor([list(text.encode())]) % 200
    with torch.inference_mode():
        return model.eval()(input_ids=ids).logits[0].float()


def live(run: Path, random_qwen: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(random_qwen), run / "adapter")


def nothing_left(output: Path) -> bool:
    return not output.exists() and not list(output.parent.glob(".loratune-*"))


@pytest.mark.parametrize("quantization", ["f32", "q8_0"])
def test_a_gguf_file_says_what_base_and_adapter_say(
    cli: CLI, run: Path, random_qwen: Path, tmp_path: Path, quantization: str
) -> None:
    output = tmp_path / "gguf"
    done = cli("export", "--adapter", run, "--format", "gguf", "-q", quantization, "--output", output, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert sorted(path.name for path in output.iterdir()) == sorted([report["file"], "verification.json"])
    assert report["file"] == f"my-run-{quantization}.gguf"
    assert report["logits"]["tokens"] > 0
    loaded = AutoModelForCausalLM.from_pretrained(output, gguf_file=report["file"], dtype=torch.float32)
    expected, found = logits(live(run, random_qwen)), logits(loaded)
    assert (expected - found).abs().max() < (1e-5 if quantization == "f32" else 0.05 * expected.abs().max())


def test_a_merged_model_is_exported_without_its_adapter(cli: CLI, merged: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in merged.iterdir()}
    done = cli("export", "--model", merged, "--format", "gguf", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "out" / "sums-f16.gguf").is_file()
    assert {path.name: path.read_bytes() for path in merged.iterdir()} == before


def test_ollama_gets_the_system_prompt_and_the_stop_word_of_the_training(cli: CLI, run: Path, tmp_path: Path) -> None:
    done = cli("export", "--adapter", run, "--format", "ollama", "--num-ctx", 512, "--output", tmp_path / "ollama")
    assert done.exit_code == 0, done.stderr
    text = (tmp_path / "ollama" / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM ./my-run-f16.gguf\n")
    assert 'SYSTEM "You add numbers."' in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert "PARAMETER num_ctx 512" in text
    assert "ollama create my-run" in done.stderr


def test_vllm_gets_a_line_that_a_shell_understands(cli: CLI, run: Path, random_qwen: Path, tmp_path: Path) -> None:
    output = tmp_path / "for vllm"
    done = cli("export", "--adapter", run, "--format", "vllm", "--output", output)
    assert done.exit_code == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:3] == ["vllm", "serve", str(random_qwen)]
    assert words[words.index("--max-lora-rank") + 1] == "16"
    assert words[words.index("--lora-modules") + 1] == f"my-run={output}"
    template = Path(words[words.index("--chat-template") + 1])
    assert "You add numbers." in template.read_text(encoding="utf-8")


def test_an_exported_adapter_renders_the_training_s_prompts_elsewhere(cli: CLI, run: Path, tmp_path: Path) -> None:
    assert cli("export", "--adapter", run, "--format", "adapter", "--output", tmp_path / "clean").exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "clean")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    assert "You add numbers." in text
    source, copied = run / "adapter" / "adapter_model.safetensors", tmp_path / "clean" / "adapter_model.safetensors"
    assert source.read_bytes() == copied.read_bytes()


def test_a_4_bit_folder_loads_in_transformers(cli: CLI, tmp_path: Path) -> None:
    tiny = Path(__file__).resolve().parent.parent / "loratune" / "assets" / "tiny-qwen"
    done = cli("export", "--model", tiny, "--format", "bnb4", "--output", tmp_path / "nf4")
    assert done.exit_code == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert json.loads((tmp_path / "nf4" / "verification.json").read_text())["read_back"]["largest_difference"] == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "nf4")
    turns = [{"role": "user", "content": "Who are you?"}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert "tiny-qwen" in tokenizer.decode(answer[0])


def test_a_dry_push_lists_the_files_and_sends_nothing(
    cli: CLI, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    output = tmp_path / "clean"
    done = cli("export", "--adapter", run, "--format", "adapter", "--output", output, "--push", "hf:me/sums")
    assert done.exit_code == 0, done.stderr
    assert "huggingface.co/me/sums" in done.stderr.replace("\n", "")
    assert "adapter_model.safetensors" in done.stderr
    assert "nothing was uploaded" in done.stderr


def test_a_push_to_nowhere_is_told_before_the_work(cli: CLI, run: Path, tmp_path: Path) -> None:
    done = cli("export", "--adapter", run, "--format", "adapter", "--output", tmp_path / "clean", "--push", "me/sums")
    assert done.exit_code == 2
    assert "hf:org/name" in done.stderr
    assert nothing_left(tmp_path / "clean")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--format", "gguf"], 2, "--adapter"),
        (["--format", "vllm", "--model", "{merged}"], 2, "takes an adapter"),
        (["--format", "adapter", "--model", "{merged}"], 2, "takes an adapter"),
        (["--format", "gguf", "--model", "/nowhere"], 4, "no such folder"),
        (["--format", "gguf", "--model", "{run}/adapter"], 4, "config.json"),
        (["--format", "gguf", "--adapter", "{merged}"], 4, "a whole model, not an adapter"),
        (["--format", "vllm", "-q", "q8_0", "--adapter", "{run}"], 2, "--quantization is for gguf"),
        (["--format", "gguf", "--num-ctx", "9", "--adapter", "{run}"], 2, "--num-ctx is for ollama"),
        (["--format", "adapter", "--no-dry-run", "--adapter", "{run}"], 2, "are for --push"),
        (["--format", "adapter", "--public", "--adapter", "{run}"], 2, "are for --push"),
        (["--format", "exe", "--adapter", "{run}"], 2, "exe"),
        (["--format", "gguf", "-q", "q4_k", "--adapter", "{run}"], 2, "q4_k"),
        (["--format", "ollama", "--num-ctx", "0", "--adapter", "{run}"], 2, "num-ctx"),
    ],
)
def test_what_cannot_be_exported_is_one_message_and_leaves_nothing(
    cli: CLI, run: Path, merged: Path, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    filled = [argument.format(run=run, merged=merged) for argument in arguments]
    done = cli("export", *filled, "--output", tmp_path / "out")
    assert (done.exit_code, words in done.stderr) == (code, True), done.stderr
    assert nothing_left(tmp_path / "out")


def test_vllm_refuses_what_it_cannot_serve_and_says_what_to_do(cli: CLI, run: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "dora"
    shutil.copytree(run / "adapter", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(len(tensors[name]))
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    done = cli("export", "--adapter", adapter, "--format", "vllm", "--output", tmp_path / "out")
    assert done.exit_code == 4
    assert "DoRA" in done.stderr
    assert "loratune merge" in done.stderr.replace("\n", " ")
    assert nothing_left(tmp_path / "out")


def test_a_gguf_file_that_is_not_the_model_is_never_left(
    cli: CLI, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratune.delivery.export.gguf import file as gguf_file

    real = gguf_file.write_gguf

    def write_another(model: Path, target: Path, quantization: str) -> None:
        other = tmp_path / "other"
        shutil.copytree(model, other)
        weights = load_file(other / "model.safetensors")
        weights["model.norm.weight"][0] += 1
        save_file(weights, other / "model.safetensors", {"format": "pt"})
        real(other, target, quantization)

    monkeypatch.setattr(gguf_file, "write_gguf", write_another)
    done = cli("export", "--model", merged, "--format", "gguf", "--output", tmp_path / "out")
    assert done.exit_code == 4
    assert "norm" in done.stderr
    assert nothing_left(tmp_path / "out")


def test_keys_that_state_another_head_size_than_the_tensors_have_are_caught(
    cli: CLI, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratune.delivery.export.gguf import file as gguf_file
    from loratune.delivery.export.gguf import keys as gguf_keys

    wrong = {"qwen2.attention.key_length": 16}  # written and expected alike: only loading the file can tell
    monkeypatch.setattr(gguf_file, "describe", lambda *given: gguf_keys.describe(*given) | wrong)
    done = cli("export", "--model", merged, "--format", "gguf", "--output", tmp_path / "out")
    assert done.exit_code == 4
    assert "shapes that its keys state" in done.stderr.replace("\n", " ")
    assert nothing_left(tmp_path / "out")


def test_a_file_that_transformers_cannot_load_is_kept_and_said_to_be_unproved(
    cli: CLI, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(file: Path) -> Any:
        raise KeyError("a key of another version")

    monkeypatch.setattr("loratune.delivery.export.gguf.reference.load_gguf", cannot)
    done = cli("export", "--model", merged, "--format", "gguf", "--output", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["logits"] is None
    assert "logits are not compared" in done.stderr.replace("\n", " ")


def test_a_missing_gguf_package_is_told_before_the_merge(
    cli: CLI, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "loratune.delivery.export.gguf.file", raising=False)
    done = cli("export", "--adapter", run, "--format", "gguf", "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert "loratune[export]" in done.stderr
    assert "merging" not in done.stderr
    assert nothing_left(tmp_path / "out")


def test_an_export_is_replaced_only_when_asked(cli: CLI, run: Path, tmp_path: Path) -> None:
    arguments = ["export", "--adapter", run, "--format", "adapter", "--output", tmp_path / "out"]
    assert cli(*arguments).exit_code == 0
    again = cli(*arguments)
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
    assert cli(*arguments, "--overwrite").exit_code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    foreign = cli(*arguments[:-1], tmp_path / "mine", "--overwrite")
    assert foreign.exit_code == 2
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_too_little_memory_for_the_loader_is_said_and_the_rest_is_proved(
    cli: CLI, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratune.delivery.export.export.free_main_memory_bytes", lambda: 1000)
    done = cli("export", "--model", merged, "--format", "gguf", "--output", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["logits"] is None
    assert "logits are not compared" in done.stderr.replace("\n", " ")


def test_export_s_help_loads_no_torch() -> None:
    code = "import sys; from loratune.cli.app import app\ntry: app(['export', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
