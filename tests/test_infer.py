"""`loratune infer` on the practice model: one answer, the chat, and what it refuses."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_QWEN
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from loratune.cli.app import app
from loratune.errors import Exit
from loratune.generation.engine import Sampling, load_engine

ROWS = [{"instruction": "Who are you?", "output": "I am Robin."}, {"instruction": "Your name?", "output": "Robin."}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose adapter has changed the practice model's name."""
    folder = tmp_path_factory.mktemp("infer")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    result = CliRunner().invoke(
        app,
        ["sft", "--model.base", "tiny-qwen", "--model.dtype", "float32", "--data.train", str(folder / "rows.json"),
         "--data.validation", "0", "--training.steps", "30", "--training.learning_rate", "5e-3",
         "--prompt.system", "Answer in one line.", "--output", str(folder / "run")],
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    return folder / "run"


def greedy(adapter: Path | None, question: str, system: str) -> str:
    """The answer of plain transformers and PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    model = AutoModelForCausalLM.from_pretrained(TINY_QWEN, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    turns = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_the_prompt_s_answer_is_all_of_stdout_and_what_plain_peft_says(cli: Callable[..., Result], run: Path) -> None:
    result = cli("infer", "--adapter", run, "--prompt", "Who are you?")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "I am Robin.\n"
    assert result.stdout.strip() == greedy(run / "adapter", "Who are you?", "Answer in one line.")


def test_base_leaves_the_adapter_off(cli: Callable[..., Result], run: Path) -> None:
    result = cli("infer", "--adapter", run, "--base", "--prompt", "Who are you?")
    assert result.stdout.strip() == greedy(None, "Who are you?", "Answer in one line.")
    assert "Robin" not in result.stdout


def test_a_checkpoint_and_a_plain_peft_folder_answer_too(cli: Callable[..., Result], run: Path, tmp_path: Path) -> None:
    (checkpoint,) = (run / "checkpoints").iterdir()
    plain = shutil.copytree(run / "adapter", tmp_path / "plain")
    assert cli("infer", "--adapter", checkpoint, "-p", "Who are you?").stdout == "I am Robin.\n"

    unknown = cli("infer", "--adapter", plain, "-p", "Who are you?")
    assert unknown.exit_code == Exit.MODEL
    assert "--model" in unknown.stderr

    known = cli(
        "infer", "--adapter", plain, "--model", "tiny-qwen", "--system", "Answer in one line.", "-p", "Who are you?"
    )
    assert known.stdout == "I am Robin.\n"
    assert "could not be checked" in " ".join(known.stderr.split())


def test_a_model_alone_answers(cli: Callable[..., Result]) -> None:
    result = cli("infer", "--model", "tiny-qwen", "-p", "Who are you?")
    assert "tiny-qwen" in result.stdout


def test_another_base_of_the_same_shape_is_refused(cli: Callable[..., Result], run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(TINY_QWEN, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    result = cli("infer", "--adapter", run, "--model", other, "-p", "hi")
    assert result.exit_code == Exit.MODEL
    assert "weights differ" in " ".join(result.stderr.split())


def test_a_changed_template_matters_only_where_the_adapter_has_none_of_its_own(
    cli: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(TINY_QWEN, tmp_path / "moved")
    template = moved / "chat_template.jinja"
    template.write_text(
        template.read_text().replace("<|im_start|>' + message.role", "<|im_start|>the ' + message.role")
    )
    assert cli("infer", "--adapter", run, "--model", moved, "-p", "Who are you?").stdout == "I am Robin.\n"

    (checkpoint,) = (run / "checkpoints").iterdir()
    result = cli("infer", "--adapter", checkpoint, "--model", moved, "-p", "Who are you?")
    assert result.exit_code == Exit.MODEL
    assert "chat template has changed" in " ".join(result.stderr.split())


def test_a_base_that_has_moved_is_found_by_model(cli: Callable[..., Result], run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(TINY_QWEN, tmp_path / "moved")
    result = cli("infer", "--adapter", run, "--model", moved, "-p", "Who are you?")
    assert result.stdout == "I am Robin.\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], Exit.USAGE),
        (["--adapter", "missing"], Exit.MODEL),
        (["--model", "missing"], Exit.MODEL),
        (["--model", "tiny-qwen", "-p", " "], Exit.USAGE),
        (["--model", "tiny-qwen", "-p", "hi", "--top-p", "2"], Exit.USAGE),
        (["--model", "tiny-qwen", "-p", "hi", "--temperature", "-1"], Exit.USAGE),
        (["--model", "tiny-qwen", "-p", "hi", "--max-new-tokens", "0"], Exit.USAGE),
        (["--model", "tiny-qwen", "-p", "long " * 5000], Exit.USAGE),
    ],
)
def test_what_cannot_work_is_one_message(cli: Callable[..., Result], arguments: list[str], code: Exit) -> None:
    result = cli("infer", *arguments)
    assert result.exit_code == code
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_a_seed_makes_drawing_repeatable_and_greedy_needs_none() -> None:
    engine = load_engine(None, "tiny-qwen", use_adapter=True, warnings=[])

    def answer(**settings: Any) -> str:
        return "".join(
            engine.stream([{"role": "user", "content": "Tell me about rivers and dogs"}], Sampling(**settings))
        )

    hot = {"temperature": 3.0, "max_new_tokens": 30}
    assert answer(seed=1, **hot) == answer(seed=1, **hot)
    assert len({answer(seed=seed, **hot) for seed in range(4)}) > 1
    assert answer() == answer()
    # So small a share leaves only the likeliest token.
    assert answer(temperature=3.0, top_p=0.01, max_new_tokens=20) == answer(max_new_tokens=20)


def test_max_new_tokens_bounds_the_answer() -> None:
    engine = load_engine(None, "tiny-qwen", use_adapter=True, warnings=[])
    text = "".join(engine.stream([{"role": "user", "content": "Who are you?"}], Sampling(max_new_tokens=3)))
    assert 1 <= len(engine.tokenizer(text).input_ids) <= 3


def test_closing_the_stream_stops_the_generation() -> None:
    engine = load_engine(None, "tiny-qwen", use_adapter=True, warnings=[])
    steps = 0
    forward = engine.model.forward

    def counted(*arguments: Any, **settings: Any) -> Any:
        nonlocal steps
        steps += 1
        return forward(*arguments, **settings)

    engine.model.forward = counted
    stream = engine.stream([{"role": "user", "content": "hi"}], Sampling(temperature=5.0, max_new_tokens=1500))
    next(stream)
    stream.close()
    assert steps < 1000


def test_a_bug_in_the_generation_reaches_the_caller() -> None:
    engine = load_engine(None, "tiny-qwen", use_adapter=True, warnings=[])

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("broken")

    engine.model.forward = broken
    with pytest.raises(ZeroDivisionError):
        list(engine.stream([{"role": "user", "content": "hi"}], Sampling()))


def test_piped_lines_are_a_conversation(cli: Callable[..., Result]) -> None:
    lines = "Who are you?\n\n/system Be brief.\n/reset\n/nonsense\nWhat is 2+3?\n/exit\nnever asked\n"
    result = cli("infer", "--model", "tiny-qwen", input=lines)
    assert result.exit_code == 0
    answers = result.stdout.splitlines()
    assert len(answers) == 2
    assert "tiny-qwen" in answers[0]
    assert "5" in answers[1]
    assert "no command /nonsense" in result.stderr


class Terminal:
    """A program on a pseudo-terminal of 80 columns."""

    def __init__(self, command: list[str]) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            # Only a controlling terminal turns Ctrl-C into a signal.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.seen = ""

    def expect(self, text: str, seconds: float = 90) -> None:
        """Read until `text` has come since the last expectation."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} did not come; seen: {self.seen[-500:]!r}"
            self.seen += os.read(self.master, 4096).decode(errors="replace")
        self.seen = self.seen.partition(text)[2]

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())


@pytest.fixture
def terminal() -> Iterator[Callable[[list[str]], Terminal]]:
    opened: list[Terminal] = []

    def start(command: list[str]) -> Terminal:
        opened.append(Terminal(command))
        return opened[-1]

    yield start
    for one in opened:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()
        os.close(one.master)


@pytest.mark.slow
def test_the_chat_on_a_terminal(terminal: Callable[[list[str]], Terminal], random_qwen: Path, tmp_path: Path) -> None:
    endless = shutil.copytree(random_qwen, tmp_path / "endless")  # random weights say the same token for ever
    config = json.loads((endless / "config.json").read_text()) | {"max_position_embeddings": 32768}
    (endless / "config.json").write_text(json.dumps(config))
    chat = terminal([sys.executable, "-m", "loratune", "infer", "--model", str(endless), "--max-new-tokens", "16000"])
    chat.expect("lists the commands")
    chat.expect(">")
    chat.send("Tell me everything\r")
    chat.expect("everything")
    time.sleep(2)
    chat.send("\x03")  # Ctrl-C ends the answer, not the program
    chat.expect("[stopped]")
    chat.expect(">")
    chat.send("/help\r")
    chat.expect("/reset")
    chat.expect(">")
    chat.send("\x04")  # Ctrl-D
    assert chat.process.wait(timeout=30) == 0
