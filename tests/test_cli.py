"""The command line as its users meet it: help, exit codes, messages, and what it costs to start."""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from rich.cells import cell_len
from typer.testing import Result

import loratune
from loratune.cli import app
from loratune.cli.commands import COMMANDS, ELSEWHERE, command_lines
from loratune.cli.flags import RENAMED_BESIDE_AN_ADAPTER, RENAMED_FLAGS
from loratune.errors import Exit, LoratuneError
from loratune.recipe.loading import ASSETS, load_recipe, shipped_recipes
from loratune.recipe.sections import iterate_settings

Cli = Callable[..., Result]
SETTINGS = dict(iterate_settings())
HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "accelerate", "numpy", "matplotlib")
COMMAND_LINES: list[tuple[str, ...]] = [(name,) for name in app.COMMANDS if name not in app.GROUPS]
COMMAND_LINES += [(name, inner) for name, group in app.GROUPS.items() for inner in group.table]
PAGES = [("--help",), *((*line, "--help") for line in COMMAND_LINES)]


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "80", **environment},
    )


def help_page(cli: Cli, *arguments: str) -> str:
    result = cli(*arguments, env={"COLUMNS": "80"})
    assert result.exit_code == 0
    return str(result.stdout)


def entries(page: str) -> dict[str, str]:
    """Option → its name, value, default and help, joined by single blanks."""
    found: dict[str, str] = {}
    name = ""
    for line in page.splitlines():
        if not line.startswith("│"):
            name = ""
            continue
        text = line.strip("│").rstrip()
        if not text.startswith("  ") and (option := re.search(r"--(?:\[no-\])?[\w.-]+", text)):
            name = option[0].replace("[no-]", "")
            found[name] = " ".join(text.split())
        elif name:
            found[name] += " " + " ".join(text.split())
    return found


# --- start ---


@pytest.mark.parametrize(
    ("page", "light_without"),
    [(("--help",), (*HEAVY, "pydantic", "yaml")), (("sft", "--help"), HEAVY), (("infer", "--help"), HEAVY)],
)
def test_help_imports_no_heavy_library(page: tuple[str, ...], light_without: tuple[str, ...]) -> None:
    run = run_python("-X", "importtime", "-m", "loratune", *page)
    assert run.returncode == 0
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in run.stderr.splitlines()}
    assert "loratune" in imported
    assert imported.isdisjoint(light_without)


def test_help_starts_about_as_fast_as_the_libraries_that_draw_it() -> None:
    def median_seconds(*arguments: str) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            assert run_python(*arguments).returncode == 0
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    assert median_seconds("-m", "loratune", "--help") <= 4 * median_seconds("-c", "import typer, rich.console")


# --- help ---


@pytest.mark.parametrize("page", PAGES)
def test_help_fits_eighty_columns(cli: Cli, page: tuple[str, ...]) -> None:
    lines = help_page(cli, *page).splitlines()
    assert max(map(cell_len, lines)) == 80  # the frames are as wide as the terminal


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_help_follows_the_width_of_the_terminal(cli: Cli, columns: str) -> None:
    result = cli("infer", "--help", env={"COLUMNS": columns})
    assert {cell_len(line) for line in result.stdout.splitlines() if line[:1] in "╭│╰" and line} == {int(columns)}


def test_the_overview_names_every_command_with_its_help(cli: Cli) -> None:
    page = help_page(cli, "--help")
    for name, text in {"sft": "Train a LoRA adapter", "infer": "Chat with a trained adapter"}.items():
        assert re.search(rf"│ {name} +│\n│ +{text}", page)


@pytest.mark.parametrize("dotted", SETTINGS)
def test_every_setting_is_in_the_help_of_sft_with_its_default_bounds_and_choices(cli: Cli, dotted: str) -> None:
    field = SETTINGS[dotted]
    head, found, bounds = entries(help_page(cli, "sft", "--help"))[f"--{dotted}"].partition(field.description)
    assert found
    for rule in field.metadata:
        for name, symbol in {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}.items():
            if getattr(rule, name, None) is not None:
                assert f"{symbol} {getattr(rule, name)}" in bounds
    words = head.split()
    assert words[0].replace("[no-]", "") == f"--{dotted}"
    if field.is_required():
        assert words[-1] == "required"
    elif isinstance(field.default, bool):
        assert words[1:] == [str(field.default).lower()]
    elif isinstance(field.default, int | float):
        assert float(words[-1]) == field.default
    elif field.default:
        assert words[-1] == (field.default if isinstance(field.default, str) else ", ".join(field.default))
    else:
        is_switch = field.annotation == (bool | None)
        assert len(words) == (1 if is_switch else 2)
    if get_origin(field.annotation) is Literal:
        assert words[1] == "|".join(get_args(field.annotation))


def test_infer_shows_the_defaults_of_its_numbers(cli: Cli) -> None:
    shown = entries(help_page(cli, "infer", "--help"))
    defaults = {"--temperature": "0", "--top-p": "the", "--max-new-tokens": "512"}
    assert {name: re.findall(r"(?:number|integer) (\S+)", shown[name])[0] for name in defaults} == defaults


def test_the_help_of_sft_names_the_shipped_recipes(cli: Cli) -> None:
    page = " ".join(help_page(cli, "sft", "--help").split())
    for path in shipped_recipes():
        assert path.stem in page


def test_short_and_long_help_are_the_same(cli: Cli) -> None:
    for page in PAGES:
        assert help_page(cli, *page[:-1], "-h") == help_page(cli, *page)


def test_version_is_the_packages(cli: Cli) -> None:
    result = cli("--version")
    assert (result.exit_code, result.stdout) == (0, f"loratune {loratune.__version__}\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_printed(cli: Cli, monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    # Typer asks the processes above for the shell, and a test that runs in the background has none there.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    result = cli("--show-completion", shell)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"complete_{shell}" in result.stdout


@pytest.mark.parametrize("flag", ["--show-completion", "--install-completion"])
@pytest.mark.parametrize("shell", ["banana", "x" * 5000, "sft"], ids=["banana", "long", "command"])
def test_a_shell_without_a_completion_is_refused(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, shell: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where it would be installed
    result = cli(flag, shell)
    assert (result.exit_code, result.stdout) == (Exit.USAGE, "")
    assert "bash, zsh, fish, powershell, pwsh" in result.stderr
    assert not list(tmp_path.iterdir())
    assert "x" * 100 not in result.stderr


def test_a_named_shell_is_taken_whatever_shell_asks() -> None:
    line = f"{sys.executable} -m loratune --show-completion fish; exit $?"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "complete_fish" in done.stdout


def test_a_completion_is_installed_for_a_named_shell(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli("--install-completion", "fish").exit_code == 0
    (script,) = (tmp_path / ".config" / "fish").rglob("*.fish")
    assert "complete_fish" in script.read_text()
    assert not (tmp_path / ".bashrc").exists()


def test_the_completion_script_is_that_of_the_shell_that_asks() -> None:
    line = f"{sys.executable} -m loratune --show-completion; exit $?"  # the shell has to be there still
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "complete_bash" in done.stdout


# --- flags of earlier versions ---


ALONE, ADAPTER = ("--model", "./nowhere"), ("--adapter", "./nowhere")
REST = {
    "infer": ("-p", "hi"),
    "serve": ("--port", "0"),
    "merge": (*ADAPTER, "--output", "./out"),
    "verify": ("./nowhere", *ADAPTER),
    "export": ("--format", "gguf", "--output", "./out"),
}
RENAMED = [
    *((c, (*REST[c], *(ALONE if c in ("infer", "serve") else ())), o, n)
      for c, names in RENAMED_FLAGS.items() for o, n in names.items()),
    *((c, (*REST[c], *ADAPTER), o, n) for c, names in RENAMED_BESIDE_AN_ADAPTER.items() for o, n in names.items()),
]  # fmt: skip


@pytest.mark.parametrize(("command", "rest", "old", "new"), RENAMED)
def test_a_renamed_flag_works_names_the_new_one_and_is_not_in_the_help(
    cli: Cli, command: str, rest: tuple[str, ...], old: str, new: str
) -> None:
    shown = entries(help_page(cli, command, "--help"))
    assert (old in shown) == (old == "--model" and command in RENAMED_BESIDE_AN_ADAPTER)
    assert new in shown
    value = ("key",) if new in ("--api-key", "--base-model") else ()
    joined = (f"{old}{value[0]}" if len(old) == 2 else f"{old}={value[0]}",) if value else (old,)
    for spelled in ((old, *value), joined):
        before, now = (cli(command, *rest, *flags) for flags in (spelled, (new, *value)))
        assert before.stderr == f"{old} is now {new} (the old name still works)\n{now.stderr}"
        assert before.exit_code == now.exit_code == Exit.MODEL
        assert cli(command, *spelled, *rest).stderr == before.stderr
    both = cli(command, *rest, old, *value, new, *value)
    assert both.exit_code == Exit.USAGE
    assert f"{old} is now called {new}" in both.stderr


@pytest.mark.parametrize("text", ["--base", "--adapter", "-a"])
def test_the_text_of_another_flag_is_no_renamed_flag(cli: Cli, text: str) -> None:
    result = cli("infer", "--model", "./nowhere", "--prompt", text)
    assert "is now" not in result.stderr
    assert "no such folder" in result.stderr


@pytest.mark.parametrize("command", RENAMED_BESIDE_AN_ADAPTER)
def test_a_base_without_an_adapter_is_refused(cli: Cli, command: str) -> None:
    for given in ((), ALONE):
        result = cli(command, *REST[command], *given, "--base-model", "./base")
        assert result.exit_code == Exit.USAGE
        assert "--base-model is where the base of an adapter lies; give the adapter with --adapter" in " ".join(
            result.stderr.split()
        )


# --- wrong usage ---


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("--nonsense",),
        ("sft", "--nonsense"),
        ("sft", "--lora.ranks", "8"),
        ("sft", "--lora.rank"),
        ("sft", "stray"),
        ("sft",),
        ("sft", "--config", "nonsense"),
        ("sft", "--config", "quickstart", "--show", "--lora.rank", "0"),
        ("infer",),
        ("infer", "--adapter", "x", "--prompt", "  "),
        ("infer", "--adapter", "x", "--temperature", "-1"),
        ("infer", "--adapter", "x", "--temperature", "warm"),
        ("infer", "--adapter", "x", "--top-p", "-0.1"),
        ("infer", "--adapter", "x", "--max-new-tokens", "0"),
    ],
)
def test_wrong_usage_exits_2_with_words_on_stderr_alone(cli: Cli, arguments: tuple[str, ...]) -> None:
    result = cli(*arguments)
    assert result.exit_code == Exit.USAGE
    assert result.stdout == ""
    assert result.stderr
    assert "Traceback" not in result.stderr


def test_no_command_at_all_shows_the_overview_and_exits_2(cli: Cli) -> None:
    result = cli(env={"COLUMNS": "80"})
    assert result.exit_code == Exit.USAGE
    assert result.stdout.strip() == help_page(cli, "--help").strip()


def test_a_missing_recipe_is_told_with_the_shipped_names_and_the_nearest(cli: Cli) -> None:
    result = cli("sft", "--config", "quikstart")
    told = " ".join(result.stderr.split())
    assert result.exit_code == Exit.USAGE
    assert told.startswith("error: recipe 'quikstart': no such file")
    assert "did you mean quickstart?" in told
    for path in shipped_recipes():
        assert path.stem in told


# --- failures ---


@pytest.mark.parametrize("code", [code for code in Exit if code not in (Exit.OK, Exit.BUG)])
def test_a_failure_that_the_user_can_fix_is_one_message_and_its_exit_code(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, code: Exit
) -> None:
    def fail(*_: Any) -> None:
        raise LoratuneError("rows.json: [bold]0 rows[/bold]", code)

    monkeypatch.setattr("loratune.cli.sft.load_recipe", fail)
    result = cli("sft")
    assert result.exit_code == code
    assert result.stderr == "error: rows.json: [bold]0 rows[/bold]\n"
    assert result.stdout == ""


def test_debug_shows_the_traceback_of_a_failure() -> None:
    plain = run_python("-m", "loratune", "sft", "--config", "nonsense")
    debug = run_python("-m", "loratune", "sft", "--config", "nonsense", "--debug")
    assert plain.returncode == Exit.USAGE
    assert "Traceback" not in plain.stderr
    assert "Traceback (most recent call last)" in debug.stderr
    assert "LoratuneError: recipe 'nonsense'" in debug.stderr


def test_a_bug_keeps_its_traceback_and_exits_1() -> None:
    script = (
        "import loratune.cli.sft as sft, loratune.cli.app as app\n"
        "def fail(*_): raise RuntimeError('a bug')\n"
        "sft.load_recipe = fail\n"
        "import sys; sys.argv = ['loratune', 'sft']\n"
        "app.main()"
    )
    run = run_python("-c", script)
    assert run.returncode == Exit.BUG
    assert "Traceback (most recent call last)" in run.stderr
    assert run.stderr.endswith("RuntimeError: a bug\n")


def test_ctrl_c_is_one_word_and_exit_code_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("loratune.cli.sft.load_recipe", interrupt)
    result = cli("sft")
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


# --- sft --show ---


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_what_show_prints_loads_back_as_the_same_recipe(cli: Cli, path: Path, tmp_path: Path) -> None:
    result = cli("sft", "-c", path.stem, "--show", "--lora.rank", "4", "--no-checkpoints.keep_best")
    shown = tmp_path / "shown.yaml"
    shown.write_text(result.stdout, encoding="utf-8")
    expected = load_recipe(path.stem, {"lora.rank": "4", "checkpoints.keep_best": False})
    assert load_recipe(str(shown), {}) == expected
    assert expected.lora.rank == 4


def test_flags_reach_the_recipe_as_they_are_written(cli: Cli, tmp_path: Path) -> None:
    flags = [
        "--model.base",
        "x",
        "--data.train",
        "a.json",
        "--data.train",
        "b.jsonl#5",
        "--lora.target_modules",
        "q_proj",
    ]
    flags += ["--data.placeholders", "name=小李", "--data.placeholders", "author=a=b", "--lora.use_dora"]
    flags += ["--no-model.double_quantization", "--training.learning_rate", "2e-4", "--prompt.system", ""]
    assert "A list takes its flag once per value" in " ".join(cli("sft", "--help").stdout.split())
    result = cli("sft", "--show", *flags)
    shown = tmp_path / "shown.yaml"
    shown.write_text(result.stdout, encoding="utf-8")
    recipe = load_recipe(str(shown), {})
    assert recipe.data.train == ["a.json", "b.jsonl#5"]
    assert recipe.data.placeholders == {"name": "小李", "author": "a=b"}
    assert recipe.lora.target_modules == ["q_proj"]
    assert recipe.lora.use_dora
    assert not recipe.model.double_quantization
    assert recipe.training.learning_rate == 2e-4
    assert recipe.prompt.system == ""


def test_the_module_and_the_console_script_are_the_same_program() -> None:
    run = run_python("-m", "loratune", "--version")
    assert (run.returncode, run.stdout) == (0, f"loratune {loratune.__version__}\n")


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        (("sf",), "sft"),
        (("data", "chek"), "check"),
        (("xyzzy",), ""),
        # What other tools call it, and a command without its group.
        *[(("train",), "sft"), (("fine-tune",), "sft"), (("chat",), "infer"), (("check",), "data check")],
        *[(("trian",), "sft"), (("chekc",), "data check"), (("srve",), "serve"), (("runs", "srve"), "serve")],
        *[(("data", "train"), ""), (("runs", "slurm"), "")],
    ],
)
def test_a_misspelt_command_is_told_with_its_nearest(
    cli: Callable[..., Result], typed: tuple[str, ...], near: str
) -> None:
    done = cli(*typed)
    assert done.exit_code == Exit.USAGE
    assert f"No such command '{typed[-1]}'." in done.stderr
    assert (f"Did you mean {near}?" in done.stderr) == bool(near)


def test_commands_of_other_tools_stand_for_commands_that_there_are() -> None:
    assert {tuple(command.split()) for command in ELSEWHERE.values()} <= {*command_lines()}
    assert not ELSEWHERE.keys() & COMMANDS.keys()


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (("sft", "--steps", "5"), "--steps; did you mean --training.max_steps?"),
        (("plan", "--steps=5"), "--steps; did you mean --training.max_steps?"),
        (("sft", "--iters", "5"), "--iters; in loratune this is --training.max_steps"),
        (("sft", "--load_in_4bit", "true"), "in loratune this is --model.quantization nf4"),
        (("sft", "--output_dir", "x"), "in loratune this is --output"),
        (("sft", "--resume_from_checkpoint", "x"), "in loratune this is the flag --resume"),
        (("sft", "--group_by_length"), "loratune has none: packing leaves no padding"),
        (("sft", "--overwrit"), "did you mean --overwrite?"),
        (("merge", "--adaptr", "x"), "(Possible options: --adapter)"),
        (("sft", "recipe.yaml"), "(recipe.yaml); a recipe is given as --config recipe.yaml"),
        (("plan", "--seed", "x.yaml", "quickstart"), "(quickstart); a recipe is given as --config quickstart"),
        (("merge", "--format", "gguf"), "No such option: --format; export takes it"),
        (("infer", "--tests", "a.jsonl"), "No such option: --tests; eval takes it"),
        (("sft", "rows.json"), "(rows.json); rows are given as --data.train rows.json"),
        (("sft", "quickstart", "a.jsonl.gz"), "--config quickstart; rows are given as --data.train a.jsonl.gz"),
        (("infer", "a.csv", "b.csv"), "(a.csv b.csv); rows are given as --input a.csv"),
        (("eval", "tests.jsonl"), "rows are given as --tests tests.jsonl"),
        (("sft", "it's mine.json"), """rows are given as --data.train 'it'"'"'s mine.json'"""),
        (("serve", str(Path(__file__).parent)), "; an adapter is given as --adapter /"),
        (("infer", str(ASSETS / "tiny-qwen")), "; a model is given as --model /"),
        (("sft", "--lora.use_dora", "True"), "(True); a flag to switch on or off takes no value: --NAME, or --no-NAME"),
        (("infer", "Who are you?", "-a", "run"), "(Who are you?); a prompt is given as --prompt 'Who are you?'"),
        (("infer", "who", "are", "you"), "; a prompt is given as --prompt 'who are you'"),
        (("infer", str(Path(__file__).parent), "hi"), "; a prompt is given as --prompt hi"),
        (("export", "-o", "x", "--format", "gguff"), "--format' / '-f': 'gguff' is not one of 'gguf', 'ollama', "),
        (("export", "-o", "x", "--format", "gguff"), "; did you mean gguf?"),
        (("export", "-o", "x", "-f", "gguf", "-q", "q4_k_m"), "llama.cpp's llama-quantize makes smaller ones"),
        (("merge", "-a", "x", "-o", "y", "--density", "5"), "it must be less than or equal to 1"),
    ],
)
def test_an_unknown_flag_or_word_is_told_with_the_flag_that_is_meant(
    cli: Cli, typed: tuple[str, ...], told: str
) -> None:
    done = cli(*typed, env={"COLUMNS": "200"})
    assert done.exit_code == Exit.USAGE
    assert told in done.stderr


@pytest.mark.parametrize("typed", [("merge", "--lora_r", "8"), ("sft", "rows.json"), ("merge", "recipe.yaml")])
def test_nothing_is_made_of_a_word_that_means_nothing_there(cli: Cli, typed: tuple[str, ...]) -> None:
    done = cli(*typed)
    assert done.exit_code == Exit.USAGE
    assert "in loratune this is" not in done.stderr
    assert "--config" not in done.stderr


@pytest.mark.parametrize(
    ("typed", "missing", "line"),
    [
        (("merge", "--adapter", "out/run"), ["--output"], "merge --adapter out/run --json --output OUTPUT"),
        (("merge", "-o", "x"), ["--adapter"], "merge -o x --json --adapter ADAPTER"),
        (("merge", "TESTS"), ["--adapter", "--output"], "merge --json --adapter TESTS --output OUTPUT"),
        (("merge", "nowhere"), ["--adapter", "--output"], "merge --json --adapter ADAPTER --output OUTPUT"),
        (("merge", "A", "b c"), ["--adapter", "--output"], "merge --json --adapter A --output 'b c'"),
        (("merge", "TESTS", "new"), ["--adapter", "--output"], "merge --json --adapter TESTS --output new"),
        (
            ("export", "TESTS", "gguf", "new"),
            ["--output", "--format"],
            "export --json --output new --format gguf --adapter TESTS",
        ),
        (("export", "-fgguf"), ["--output"], "export -fgguf --json --output OUTPUT"),
        (
            ("export", "--adapter=a"),
            ["--output", "--format"],
            "export --adapter=a --json --output OUTPUT --format FORMAT",
        ),
        (("merge", "TESTS", "-o", "TESTS"), ["--adapter"], "merge -o TESTS --json --adapter TESTS"),
        (("export", "TESTS", "-fgguf"), ["--output"], "export -fgguf --json --output OUTPUT --adapter TESTS"),
        (("merge", "-o", "x", "--", "y"), ["--adapter"], "merge -o x --adapter ADAPTER"),
        (("verify",), ["FOLDER"], "verify --json FOLDER"),
        (("runs", "tag"), ["RUN", "NAMES"], "runs tag --json RUN NAMES"),
        (("runs", "tag", "TESTS"), ["NAMES"], "runs tag TESTS --json NAMES"),
    ],
)
def test_all_that_a_line_lacks_is_told_with_the_whole_line(
    cli: Cli, typed: tuple[str, ...], missing: list[str], line: str
) -> None:
    here = str(Path(__file__).parent)
    done = cli(*(word.replace("TESTS", here) for word in typed), "--json")
    assert done.exit_code == Exit.USAGE
    error = json.loads(done.stdout)
    (command,) = error["commands"]
    assert command["line"] == f"loratune {line}".replace("TESTS", here)
    assert [(one["key"], one["remedy"]) for one in error["problems"]] == [(name, f"give {name}") for name in missing]
    assert all(name in command["line"].split() for name in command["chosen"])
    assert error["message"].endswith("no flag is given for it: nowhere") == (typed == ("merge", "nowhere"))


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (("merge", "--", "-run", "new"), "merge --json --adapter -run --output new"),
        (("merge", "", "new", "-a", "x"), "merge -a x --json --output new"),
        (("merge", "-a", "x", ""), "merge -a x --json --output OUTPUT"),
        (("export", "-a", "x", "y", "z"), "export -a x --json --output OUTPUT --format FORMAT"),
        (("runs", "tag", "--", "-run"), "runs tag --json -- -run NAMES"),
    ],
)
def test_a_whole_line_is_one_that_the_command_takes(cli: Cli, typed: tuple[str, ...], line: str) -> None:
    end = typed.index("--") if "--" in typed else len(typed)
    (command,) = json.loads(cli(*typed[:end], "--json", *typed[end:]).stdout)["commands"]
    assert command["line"] == f"loratune {line}"
    again = cli(*(word.replace("FORMAT", "gguf") for word in shlex.split(line)))
    assert again.exit_code == Exit.MODEL, again.stderr


@pytest.mark.parametrize("chosen", [None, "64"])
def test_kernels_of_16_bit_products_are_bounded_unless_the_user_bounds_them(chosen: str | None) -> None:
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    code = (
        "import atexit, os; from loratune.cli.app import main; "
        f"atexit.register(lambda: print([os.environ[name] for name in {names}])); main()"
    )
    given = {name: value for name, value in os.environ.items() if name not in names}
    given |= dict.fromkeys(names, chosen) if chosen else {}
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"], env=given, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == str([chosen or "256"] * 2)
