"""`loratune infer` on the practice model: one answer, whose it is, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY_QWEN
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from loratune.cli.app import app
from loratune.cli.flags import named_adapters
from loratune.engine.sampling import Sampling
from loratune.engine.types import Answer, GenerationRequest
from loratune.errors import Exit, LoratuneError, counted
from loratune.generation.chat.answering import Reply
from loratune.generation.chat.session import Chat

ROWS = [{"instruction": "Who are you?", "output": "I am Robin."}, {"instruction": "Your name?", "output": "Robin."}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose adapter has changed the practice model's name."""
    folder = tmp_path_factory.mktemp("infer")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    result = CliRunner().invoke(
        app,
        ["sft", "--model.base", "tiny-qwen", "--model.dtype", "float32", "--data.train", str(folder / "rows.json"),
         "--data.validation", "0", "--training.max_steps", "30", "--training.learning_rate", "5e-3",
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
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": question})
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_the_prompt_s_answer_is_all_of_stdout_and_what_plain_peft_says(cli: Callable[..., Result], run: Path) -> None:
    result = cli("infer", "--adapter", run, "--prompt", "Who are you?")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "I am Robin.\n"
    assert result.stdout.strip() == greedy(run / "adapter", "Who are you?", "Answer in one line.")


def test_base_leaves_the_adapter_off(cli: Callable[..., Result], run: Path) -> None:
    result = cli("infer", "--adapter", run, "--no-adapter", "--prompt", "Who are you?")
    assert result.stdout.strip() == greedy(None, "Who are you?", "Answer in one line.")
    assert "Robin" not in result.stdout


def test_a_checkpoint_and_a_plain_peft_folder_answer_too(cli: Callable[..., Result], run: Path, tmp_path: Path) -> None:
    (checkpoint,) = (run / "checkpoints").iterdir()
    plain = shutil.copytree(run / "adapter", tmp_path / "plain")
    assert cli("infer", "--adapter", checkpoint, "-p", "Who are you?").stdout == "I am Robin.\n"

    unknown = cli("infer", "--adapter", plain, "-p", "Who are you?")
    assert unknown.exit_code == Exit.MODEL
    assert "--base-model" in unknown.stderr

    known = cli(
        "infer",
        "--adapter",
        plain,
        "--base-model",
        "tiny-qwen",
        "--system",
        "Answer in one line.",
        "-p",
        "Who are you?",
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
    result = cli("infer", "--adapter", run, "--base-model", other, "-p", "hi")
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
    assert cli("infer", "--adapter", run, "--base-model", moved, "-p", "Who are you?").stdout == "I am Robin.\n"

    (checkpoint,) = (run / "checkpoints").iterdir()
    result = cli("infer", "--adapter", checkpoint, "--base-model", moved, "-p", "Who are you?")
    assert result.exit_code == Exit.MODEL
    assert "chat template has changed" in " ".join(result.stderr.split())


def test_a_base_that_has_moved_is_found_by_model(cli: Callable[..., Result], run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(TINY_QWEN, tmp_path / "moved")
    result = cli("infer", "--adapter", run, "--base-model", moved, "-p", "Who are you?")
    assert result.stdout == "I am Robin.\n"


def told(cli: Callable[..., Result], *arguments: Any) -> dict[str, Any]:
    """What --json says of an answer."""
    result = cli("infer", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def test_json_tells_the_answer_its_length_and_its_end(cli: Callable[..., Result]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    found = told(cli, "--model", "tiny-qwen", "--system", "Be brief.", "-p", "Who are you?")
    assert list(found) == ["schema", "answer", "reasoning", "prompt_tokens", "tokens", "finish"]
    assert found["prompt_tokens"] == len(prompt)
    assert found["tokens"] == len(tokenizer(found["answer"]).input_ids) + 1
    assert (found["reasoning"], found["finish"]) == ("", "stop")

    short = told(cli, "--model", "tiny-qwen", "--system", "Be brief.", "-p", "Who are you?", "--max-new-tokens", 3)
    assert (short["tokens"], short["finish"]) == (3, "length")
    assert found["answer"].startswith(short["answer"])


def test_every_sampling_flag_reaches_the_model(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[GenerationRequest] = []

    class Echo:
        adapters: tuple[str, ...] = ()
        warnings: tuple[str, ...] = ()

        def answers(self, questions: Iterable[GenerationRequest]) -> Iterator[tuple[int, Answer]]:
            asked.extend(questions)
            yield 0, Answer("", "", 1, 1, "stop")

        def close(self) -> None:
            """There is nothing to end."""

    monkeypatch.setattr("loratune.engine.engine.load_engine", lambda *_: Echo())
    told(cli, "--model", "tiny-qwen", "-p", "hi")
    flags = (
        *("--temperature", 0.5, "--top-p", 0.9, "--top-k", 40, "--min-p", 0.1, "--repetition-penalty", 1.2),
        *("--max-new-tokens", 7, "--stop", "a", "--stop", " ", "--seed", 3),
    )
    told(cli, "--model", "tiny-qwen", "-p", "hi", *flags)
    assert [question.sampling for question in asked] == [
        Sampling(),
        Sampling(
            temperature=0.5,
            top_p=0.9,
            top_k=40,
            min_p=0.1,
            repetition_penalty=1.2,
            max_new_tokens=7,
            stop=("a", " "),
            seed=3,
        ),
    ]


def test_a_stop_text_ends_the_answer(cli: Callable[..., Result]) -> None:
    result = cli("infer", "--model", "tiny-qwen", "-p", "Who are you?", "--stop", "the practice")
    assert result.stdout.strip() == greedy(None, "Who are you?", "").partition("the practice")[0].strip()


def test_of_several_adapters_the_first_answers_a_prompt(cli: Callable[..., Result], run: Path, short_run: Path) -> None:
    result = cli("infer", "--adapter", f"robin={run}", "--adapter", f"other={short_run}", "-p", "Who are you?")
    assert result.stdout == "I am Robin.\n"
    assert "robin answers; the other adapters are only used in the chat" in result.stderr


def test_adapters_are_called_as_they_are_named_or_as_their_folder(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    found = named_adapters(["out/run1", "x=out/run1", "y=a=b", str(tmp_path / "a=b"), "."])
    assert found == [
        ("run1", Path("out/run1")),
        ("x", Path("out/run1")),
        ("y", Path("a=b")),
        ("a=b", tmp_path / "a=b"),
        (Path.cwd().name, Path()),
    ]


def test_a_long_name_is_shortened_in_messages(cli: Callable[..., Result], tmp_path: Path) -> None:
    name = "x" * 5000
    result = cli("infer", "--adapter", f"{name}={tmp_path}", "--adapter", f"{name}={tmp_path}", "-p", "hi")
    assert result.exit_code == Exit.USAGE
    assert "another is called xxx" in result.stderr
    assert "x" * 100 not in result.stderr


@pytest.mark.parametrize(("tokens", "words"), [(1, "; --max-new-tokens 2 allows more"), (1_048_576, "")])
def test_a_single_answer_that_is_cut_off_names_the_flag(
    tokens: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine: Any = SimpleNamespace(adapters=[], context_tokens=2048, voices={}, base_name="base")
    chat = Chat(engine, Sampling(max_new_tokens=tokens))
    chat._takes_commands = False
    chat._say_how_it_ended(Reply("so", finish="length", tokens=tokens), None)
    assert capsys.readouterr().err.strip() == f"[cut off after {counted(tokens, 'token')}{words}]"


def test_a_question_from_the_command_line_is_answered_with_flags_alone(cli: Callable[..., Result]) -> None:
    result = cli("infer", "--model", "tiny-qwen", "-p", "Who are you?", "--max-new-tokens", 1)
    assert "[cut off after 1 token; --max-new-tokens 2 allows more]" in result.stderr
    piped = cli("infer", "--model", "tiny-qwen", "--max-new-tokens", 1, input="Who are you?\n")
    assert "[cut off after 1 token; /set max_new_tokens=2 allows more]" in piped.stderr


@pytest.mark.parametrize("values", [["a=x", "a=y"], ["x", "other/x"], ["=x"], ["x="], [""]])
def test_odd_names_of_adapters_are_refused(values: list[str]) -> None:
    with pytest.raises(LoratuneError) as caught:
        named_adapters(values)
    assert caught.value.exit_code == Exit.USAGE


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
        (["--model", "tiny-qwen", "-p", "long " * 5000, "--json"], Exit.USAGE),
        (["--model", "tiny-qwen", "-p", "half a pair \udce9"], Exit.USAGE),
        (["--model", "tiny-qwen", "-p", "hi", "--system", "\udce9"], Exit.USAGE),
        (["--model", "tiny-qwen", "-p", "hi", "--stop", ""], Exit.USAGE),
        (["--model", "tiny-qwen", "-p", "hi", "--input", "rows.json", "--output", "a.jsonl"], Exit.USAGE),
        (["--model", "tiny-qwen", "-p", "hi", "--output", "a.jsonl"], Exit.USAGE),
        (["--model", "tiny-qwen", "-p", "hi", "--metrics"], Exit.USAGE),
        (["--model", "tiny-qwen", "-p", "hi", "--overwrite"], Exit.USAGE),
        (["--model", "tiny-qwen", "--input", "rows.json"], Exit.USAGE),
        (["--model", "tiny-qwen", "--input", " ", "--output", "a.jsonl"], Exit.USAGE),
        (["--model", "tiny-qwen", "--input", "missing.json", "--output", "a.jsonl"], Exit.DATA),
        (["--model", "tiny-qwen", "--input", "rows.xlsx", "--output", "a.jsonl"], Exit.DATA),
        (["--model", "tiny-qwen", "--json"], Exit.USAGE),
        (["--model", "tiny-qwen", "--no-adapter", "--input", "r.json", "--output", "a.jsonl", "--metrics"], Exit.USAGE),
    ],
)
def test_what_cannot_work_is_one_message(cli: Callable[..., Result], arguments: list[str], code: Exit) -> None:
    result = cli("infer", *arguments)
    assert result.exit_code == code
    assert (json.loads(result.stdout)["exit_code"] == code) if "--json" in arguments else result.stdout == ""
    assert "Traceback" not in result.stderr
