"""The MCP server: its bounds, and with the SDK's own client what agents do with it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from documents import faults
from processes import comes_true

from loratune.errors import Exit, LoratuneError
from loratune.mcp_server.arguments import setting_problems
from loratune.mcp_server.bounds import Bounds
from loratune.mcp_server.calls import TELL, Calls, flags, setting_words
from loratune.mcp_server.wording import in_arguments
from loratune.recipe.loading import ASSETS, load_recipe
from loratune.runs.state import run_state

TOOLS = {"check", "plan", "sft", "status", "infer", "eval", "merge"}
REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project, beside which there is a secret."""
    (tmp_path / "secret.json").write_text("[]")
    folder = tmp_path / "project"
    (folder / "inner").mkdir(parents=True)
    (folder / "rows.json").write_text("[]")
    (folder / "out").symlink_to(tmp_path)
    return folder.resolve()


@pytest.fixture
def bounds(root: Path) -> Bounds:
    return Bounds(root, (ASSETS.resolve(),))


# --- bounds ---


@pytest.mark.parametrize(
    "path", ["../secret.json", "/etc/passwd", "out/secret.json", "inner/../../secret.json", "a\0b", "~/secret.json"]
)
def test_paths_outside_of_the_root_are_refused_also_behind_links(bounds: Bounds, path: str) -> None:
    for use in (bounds.to_read, bounds.to_write, bounds.adapter, bounds.recipe):
        with pytest.raises(LoratuneError) as caught:
            use(path)
        assert caught.value.exit_code == Exit.USAGE


def test_a_home_of_nobody_is_a_name_like_others(bounds: Bounds, root: Path) -> None:
    assert bounds.to_write("~nobody-of-that-name/run") == root / "~nobody-of-that-name" / "run"


def test_paths_inside_are_absolute_and_only_the_root_is_written(bounds: Bounds, root: Path) -> None:
    assert bounds.to_read("inner/../rows.json") == root / "rows.json"
    assert bounds.to_write("new/merged") == root / "new" / "merged"
    assert bounds.to_read(str(ASSETS / "tiny-qwen")) == (ASSETS / "tiny-qwen").resolve()
    with pytest.raises(LoratuneError, match="outside of"):
        bounds.to_write(str(ASSETS / "new"))
    assert (bounds.recipe("quickstart"), bounds.model("tiny-qwen")) == ("quickstart", "tiny-qwen")
    assert bounds.model("Qwen/Qwen2.5-7B") == "Qwen/Qwen2.5-7B"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("output", "/elsewhere/run"),
        ("output", "out/run"),
        ("data.train", ["out/secret.json#5"]),
        ("data.train", ["ms:org/rows"]),
        ("data.validation", ["/etc/passwd"]),
        ("model.base", "/"),
        ("model.base", "./out"),
        ("model.base", "~/model"),
        ("model.hub", "modelscope"),
        ("tracking.report_to", ["wandb"]),
    ],
)
def test_a_recipe_that_goes_beyond_the_bounds_is_refused(bounds: Bounds, root: Path, setting: str, value: Any) -> None:
    inside = {"model.base": "tiny-qwen", "data.train": ["rows.json#5"], "output": "run"}
    bounds.require_recipe(load_recipe(None, dict(inside)).model_dump(mode="json"))
    with pytest.raises(LoratuneError, match="the recipe goes beyond this server"):
        bounds.require_recipe(load_recipe(None, inside | {setting: value}).model_dump(mode="json"))


def test_an_adapter_whose_base_lies_outside_is_refused(bounds: Bounds, root: Path) -> None:
    for place, values in {
        "manifest.json": {"base": {"path": str(root.parent)}},
        "adapter/adapter_config.json": {"base_model_name_or_path": str(root.parent)},
    }.items():
        run = root / place.replace("/", "-")
        (run / place).parent.mkdir(parents=True)
        (run / "checkpoints" / "step-4").mkdir(parents=True)
        (run / place).write_text(json.dumps(values))
        with pytest.raises(LoratuneError, match="outside of"):
            bounds.adapter(str(run))
    with pytest.raises(LoratuneError, match="outside of"):
        bounds.adapter(str(root / "manifest.json" / "checkpoints" / "step-4"))


def test_no_value_becomes_a_flag_and_only_settings_are_settings() -> None:
    assert flags({"--prompt": "--force", "--general": False, "--x": None, "--y": True}) == ["--prompt=--force", "--y"]
    given = {"training.packing": False, "data.train": ["a", "-b"], "data.placeholders": {"name": "x"}}
    words = ["--no-training.packing", "--data.train=a", "--data.train=-b", "--data.placeholders=name=x"]
    assert setting_words(given) == words
    given = {"evaluation.early_stopping": None, "data.train": [{"path": "a.json", "weight": 2}]}
    assert setting_words(given) == ["--evaluation.early_stopping=null", '--data.train={"path": "a.json", "weight": 2}']
    for name in ("overwrite", "force", "training.nosuch", "output=x --overwrite"):
        with pytest.raises(LoratuneError, match="no such setting"):
            setting_words({name: True})
    with pytest.raises(LoratuneError) as caught:
        setting_words({"lora.rnk": 4, "lr": 1})
    assert [one.key for one in setting_problems({"data": {"train": [], "trian": []}, "lora": 4})] == [
        *("data", "data.trian", "lora")
    ]
    told = "; write its settings by dotted name: "
    with pytest.raises(LoratuneError, match=re.escape(f'{told}{{"training.packing": …, "training.epochs": …}}')):
        setting_words({"training": {"packing": False, "epochs": 2}})
    found = {one.key: one.message for one in caught.value.problems}
    assert found["lora.rnk"].endswith("did you mean lora.rank?")
    assert found["lr"].endswith("this is training.learning_rate")


# --- the words of messages ---

ERROR = {"schema": "loratune/error/1", "exit_code": 2, "commands": []}


@pytest.mark.parametrize(
    ("told", "arguments", "expected"),
    [
        ("give --max-new-tokens", ["max_new_tokens"], "give `max_new_tokens`"),
        ("leave out --config.", ["recipe"], "leave out `recipe`."),
        ("--output or --overwrite", ["output"], "`output` or --overwrite (only on the command line)"),
        ("raise --lora.rank", ["settings"], 'raise `settings["lora.rank"]`'),
        ("raise --lora.rank", ["adapter"], "raise --lora.rank (only on the command line)"),
        ("--no-general is quicker", ["general"], "`general`: false is quicker"),
        ("go on: loratune sft --resume; or --resume", ["resume"], "go on: loratune sft --resume; or `resume`"),
        ("give it with --model", ["adapter"], "give it with `model` of infer"),
        ("start the server with --read", ["read"], "start the server with --read"),
        ("a--b and ---", ["b"], "a--b and ---"),
        ("'--b': must be a number; got '--b --c'", ["b"], "'`b`': must be a number; got '--b --c'"),
        (
            "give --data.columns 'instruction=my question' --data.columns output=antwort; or --lora.rank",
            ["settings"],
            'give `settings["data.columns"]`: `{"instruction": "my question", "output": "antwort"}`; '
            'or `settings["lora.rank"]`',
        ),
        ("give --data.columns output=b", ["b"], "give --data.columns output=b (only on the command line)"),
    ],
)
def test_flags_in_messages_become_arguments(told: str, arguments: list[str], expected: str) -> None:
    problem = {"message": told, "remedy": None, "key": "--max-new-tokens"}
    found = in_arguments(
        {**ERROR, "message": told, "problems": [problem]}, "one", {"one": arguments, "infer": ["model"]}
    )
    assert found["message"] == found["problems"][0]["message"] == expected
    assert found["problems"][0]["remedy"] is None
    assert found["problems"][0]["key"] == ("max_new_tokens" if "max_new_tokens" in arguments else "max-new-tokens")


@pytest.mark.parametrize("value", ["小" * 90_000, "a\0b", "\ud800"])
def test_what_no_process_can_be_given_is_a_mistake_of_the_caller(root: Path, value: str) -> None:
    with pytest.raises(LoratuneError, match="an argument") as caught:
        asyncio.run(Calls(root).run("infer", *flags({"--prompt": value})))
    assert caught.value.exit_code == Exit.USAGE


# --- the protocol ---


def test_the_lines_of_a_command_are_told_while_it_runs_but_not_its_error(root: Path) -> None:
    told = []

    async def run() -> Any:
        async def tell(line: str) -> None:
            told.append(line)

        TELL.set(tell)
        words = ["sft", "--config=quickstart", "--output=run", "--model.attention=eager"]
        await Calls(root).run(*words, "--show")
        return await Calls(root).run(*words, "--lora.rank=0", "--show")

    error = asyncio.run(run())
    renamed = "--model.attention is now --model.attn_implementation (the old name still works)"
    assert "lora.rank" in error["message"]
    assert " ".join(told).count(renamed) == 2
    assert "lora.rank" not in " ".join(told)


Call = Callable[..., Awaitable[Any]]


def test_a_command_ends_whose_caller_can_no_longer_be_told_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "trap 'touch ended; exit' TERM; echo a line >&2; while :; do sleep 0.05; done"
    monkeypatch.setattr(Calls, "_line", lambda *_: ["sh", "-c", script])

    async def tell(line: str) -> None:
        raise ConnectionError(line)

    async def run() -> None:
        TELL.set(tell)
        with pytest.raises(ConnectionError, match="a line"):
            await Calls(tmp_path).run("sft")
        assert await asyncio.to_thread(comes_true, (tmp_path / "ended").exists)
        while len(asyncio.all_tasks()) > 1:  # which reads the output until it is closed
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)  # for the loop to see that the process has ended

    asyncio.run(run())


def in_session(
    root: Path, script: Callable[[Call], Awaitable[None]], progress: list[tuple[float, str | None]] | None = None
) -> set[str]:
    """Start the server as clients do, run a script of calls, and end it; return the names of its tools.

    Args:
        root: folder of the server.
        script: gets what calls a tool.
        progress: gets the numbers and lines that the server tells of calls.
    """
    mcp = pytest.importorskip("mcp")

    async def run() -> set[str]:
        line = ["-m", "loratune", "mcp", "--root", str(root)]
        server = mcp.StdioServerParameters(command=sys.executable, args=line, env=dict(os.environ), cwd=str(REPOSITORY))
        async with mcp.Client(server) as client:

            async def noted(number: float, total: float | None, line: str | None) -> None:
                if progress is not None:
                    progress.append((number, line))

            async def call(tool: str, is_error: bool = False, **arguments: Any) -> Any:
                result = await client.call_tool(tool, arguments, progress_callback=noted)
                assert result.is_error == is_error, result
                assert json.loads(result.content[0].text) == result.structured_content
                return result.structured_content

            await script(call)
            return {tool.name for tool in (await client.list_tools()).tools}

    return asyncio.run(run())


def test_a_client_lists_the_tools_and_gets_the_documents_of_the_command_line(short_run: Path, root: Path) -> None:
    model, progress = str(ASSETS / "tiny-qwen"), list[tuple[float, str | None]]()

    async def script(call: Call) -> None:
        state = await call("status", run=str(short_run))
        assert faults(state) == []
        assert state == state | run_state(short_run)
        for tool, arguments in {
            "status": {"run": str(root)},
            "check": {"recipe": "rows.json"},
            "merge": {"adapter": str(short_run), "output": str(root)},
            "sft": {"recipe": "quickstart", "settings": {"output": str(root.parent / "run")}},
        }.items():
            error = await call(tool, is_error=True, **arguments)
            assert faults(error) == []
            assert error["schema"] == "loratune/error/1"
        assert "outside of" in error["message"]
        for tool, arguments, told in [
            ("sft", {"recipe": "quickstart", "setting": {}}, "setting: no such argument; did you mean settings?"),
            ("infer", {"prompt": "hi", "max_tokens": 1}, "max_tokens: no such argument; did you mean max_new_tokens?"),
            ("infer", {}, "prompt: must be given"),
            ("infer", {"prompt": 5, "max_new_tokens": "many"}, "prompt: must be a valid string; got 5"),
            ("infer", {"promt": "hi", "max_new_tokens": "many"}, "did you mean prompt?\n  max_new_tokens: must be"),
            ("check", {"config": "quickstart", "settings": 1}, "did you mean recipe?\n  settings: must be"),
            ("sft", {"recipe": "quickstart", "output": "x"}, 'it is for settings: {"output": …}'),
            ("plan", {"recipe": "quickstart", "data": {}}, 'it is for settings: {"data.train": …}'),
            ("check", {"recipe": "quickstart", "settings": {"lora.rnk": 4, "seed": "x"}}, "did you mean lora.rank?\n`"),
            ("plan", {"recipe": "quickstart", "settings": {"lora.rnk": 4, "seed": "x"}}, '\n`settings["seed"]`: must'),
            ("merge", {"adapter": model, "output": "new"}, "an adapter; give it with `model` of infer, which "),
            ("infer", {"prompt": "hi", "adapter": model}, "an adapter; give it with `model`, which infer, "),
            ("infer", {"prompt": "hi"}, "give a run folder with `adapter`, or a model with `model`"),
            ("infer", {"prompt": "hi", "adapter": "a", "model": "b"}, "give `adapter` or `model`, not both"),
            ("mege", {}, "there is no tool mege; did you mean merge?"),
            ("check", {"recipe": "quickstart", "settings": {"lora.rnk": 4}}, "did you mean lora.rank?"),
            ("sft", {"recipe": "quickstart", "settings": {"output": "rows.json/x"}}, "rows.json: File exists"),
            ("sft", {"recipe": "quickstart", "settings": {"output": str(short_run)}}, 'with `settings["output"]`'),
            ("sft", {"recipe": "quickstart", "settings": {"output": "no"}, "resume": True}, "`resume` auto starts"),
        ]:
            error = await call(tool, is_error=True, **arguments)
            assert faults(error) == []
            assert told in error["message"]
            assert "--" not in re.sub(r"--[a-z]+ \(only on the command line\)", "", json.dumps(error))

    assert in_session(short_run.parent, script, progress) == TOOLS
    numbers, lines = zip(*progress, strict=True)
    assert lines[-1] == f"loading {model}"[: len(lines[-1])]
    assert numbers[-1] == 1


@pytest.mark.slow
def test_a_client_trains_waits_asks_evaluates_and_merges(tmp_path: Path) -> None:
    rows = [{"instruction": f"How much is {n}+{n}?", "output": f"It is {2 * n}."} for n in range(4)]
    (tmp_path / "tests.json").write_text(json.dumps(rows))
    small = {"training.max_steps": 40, "evaluation.questions_share": 0, "output": "run", "model.dtype": "float32"}

    async def start(call: Call) -> None:
        assert (await call("check", recipe="quickstart"))["refused"] is False
        started = await call("sft", recipe="quickstart", settings=small)
        assert (started["state"]["state"], started["output"]) == ("running", str(tmp_path / "run"))
        assert faults(started) == []

    in_session(tmp_path, start)
    assert run_state(tmp_path / "run")["state"] == "running", "the training outlives the server"
    assert len(list(tmp_path.glob("run-*"))) == 2, "the log and document of the one that runs"

    async def go_on(call: Call) -> None:
        while (state := await call("status", run="run"))["state"] == "running":
            await asyncio.sleep(1)
        assert (state["state"], state["step"]) == ("finished", 40)
        assert (await call("infer", adapter="run", prompt="Who are you?"))["answer"]
        found = await call("eval", adapter="run", tests="tests.json", output="found", general=False, max_new_tokens=8)
        assert found["rows"] == 4
        merged = await call("merge", adapter="run", output="merged")
        assert merged["verified"] != "nothing"
        assert (await call("infer", model="merged", prompt="Who are you?"))["tokens"] > 0
        again = await call("sft", is_error=True, recipe="quickstart", settings=small)
        assert "already holds a run" in again["message"]
        assert "already" in (await call("merge", is_error=True, adapter="run", output="merged"))["message"]

    in_session(tmp_path, go_on)
    (document,) = tmp_path.glob("run-*.json")
    assert faults(json.loads(document.read_text())) == []
    assert (tmp_path / "merged" / "verification.json").is_file()


def test_without_the_sdk_the_extra_is_named(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mcp", "mcp.server", "mcp.types"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "loratune.mcp_server.server", raising=False)
    result = cli("mcp")
    assert result.exit_code == Exit.USAGE
    assert 'pip install "loratune[mcp]"' in result.stderr
    assert all(f" {tool}" in " ".join(cli("mcp", "--help").stdout.partition("The tools")[2].split()) for tool in TOOLS)
    assert cli("mcp", "--root", "/nosuch").stderr.endswith("no such folder; give one that exists\n")
