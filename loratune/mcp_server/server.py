"""The tools of the MCP server, over standard input and output."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from loratune import __version__
from loratune.errors import Exit, LoratuneError
from loratune.extras import required
from loratune.mcp_server.arguments import SETTINGS, meant, refused_settings, require_arguments, setting_problems
from loratune.mcp_server.bounds import Bounds
from loratune.mcp_server.calls import TELL, Calls, Document, flags, setting_words
from loratune.mcp_server.training import start_training
from loratune.mcp_server.wording import in_arguments

with required("loratune mcp", "mcp", package="mcp"):
    from mcp.server import MCPServer
    from mcp.server.mcpserver.tools import Tool as MadeTool
    from mcp.types import CallToolResult, TextContent, ToolAnnotations
    from mcp.types import Tool as ListedTool

INSTRUCTIONS = """\
Fine-tunes language models with LoRA. Usual order: check the recipe and its rows; sft starts the training and returns
once it runs; status until its state is finished; eval or infer; merge. Results are the JSON documents of the command
line; `loratune schema NAME` prints their schemas. Paths are relative to {root}, and results are written below it alone.
Inputs are read from there, and from {readable}. Nothing is replaced.
"""
READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
WRITES = ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=False)

Recipe = Annotated[str, Field(description="A recipe: the path of a YAML file, or the name of a shipped one.")]
Settings = Annotated[
    dict[str, Any] | None,
    Field(description='Settings that override the recipe, by dotted name: {"training.max_steps": 100}.'),
]
Resume = Annotated[
    bool | int | str,
    Field(
        description="Continue the run that is there: true from its newest checkpoint, or from the step of another one; "
        '"auto" starts it where there is none.'
    ),
]
Adapter = Annotated[str, Field(description="Run folder, one of its checkpoints, or a plain PEFT folder.")]
Output = Annotated[str, Field(description="Folder of the result, which must not exist.")]
Tool = Callable[..., Awaitable[Document]]
Failed = Callable[[Exception], Document]
Started = Callable[[Document], Document]


class Tools:
    """What agents can do; each tool runs a command of the command line.

    Args:
        bounds: the folders.
        calls: runs the commands.
        started: makes the document of a training that was started.
    """

    def __init__(self, bounds: Bounds, calls: Calls, started: Started) -> None:
        self.bounds, self.calls, self.started = bounds, calls, started

    async def check(self, recipe: Recipe, settings: Settings = None) -> Document:
        """Check a recipe and all of its rows, as sft does, without loading the model."""
        return await self._with_recipe("data check", recipe, settings)

    async def plan(
        self,
        recipe: Recipe,
        settings: Settings = None,
        gpu: Annotated[str | None, Field(description="Memory of a card, such as 24GB; else this machine's.")] = None,
        gpus: Annotated[int | None, Field(description="Number of cards.")] = None,
    ) -> Document:
        """Predict the memory that a recipe takes, without loading the model, and what makes it fit."""
        return await self._with_recipe("plan", recipe, settings, {"--gpu": gpu, "--gpus": gpus})

    async def sft(self, recipe: Recipe, settings: Settings = None, resume: Resume = False) -> Document:
        """Start a training in the background, and return its run folder; it goes on if this server ends.

        It is written to the folder of the setting "output", which must not hold a run unless that is resumed.
        """
        words, shown = await self._recipe_words(recipe, settings)
        if "recipe" not in shown:
            return shown
        output = self.bounds.to_write(shown["recipe"]["output"])
        line = ["sft", *words, *flags({"--output": output, "--resume": "newest" if resume is True else resume})]
        found = await start_training(self.calls, line, output)
        return self.started(found) if "state" in found else found

    async def status(self, run: Annotated[str, Field(description="Run folder.")]) -> Document:
        """Say how a training is going: state, step, losses, seconds that are left, and the next command."""
        return await self.calls.run("runs", "show", str(self.bounds.to_read(run)))

    async def infer(
        self,
        prompt: Annotated[str, Field(max_length=100_000)],
        adapter: Annotated[str | None, Field(description="As for merge; leave it out for a model alone.")] = None,
        model: Annotated[str | None, Field(description="A model's folder or name, instead of an adapter.")] = None,
        system: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
    ) -> Document:
        """Answer one prompt with an adapter, or with a model such as a merged one."""
        if adapter and model:  # the command line takes the model for the adapter's base
            raise LoratuneError("give `adapter` or `model`, not both", Exit.USAGE)
        asked = {
            "--prompt": prompt,
            "--system": system,
            "--adapter": self.bounds.adapter(adapter) if adapter else None,
            "--model": self.bounds.model(model) if model else None,
            "--max-new-tokens": max_new_tokens,
            "--temperature": temperature,
        }
        return await self.calls.run("infer", *flags(asked))

    async def eval(
        self,
        adapter: Adapter,
        tests: Annotated[str, Field(description="File of rows with expected answers or asserts.")],
        output: Annotated[str, Field(description="Folder of the results; the same again goes on where it stopped.")],
        against: Annotated[str | None, Field(description="Another adapter to compare with, not the base.")] = None,
        general: Annotated[bool, Field(description="Look for what was forgotten, too.")] = True,
        max_new_tokens: int | None = None,
    ) -> Document:
        """Compare an adapter with its base or another adapter, row by row, with intervals and a verdict."""
        asked = {
            "--adapter": self.bounds.adapter(adapter),
            "--tests": self.bounds.to_read(tests),
            "--output": self.bounds.to_write(output),
            "--against": self.bounds.adapter(against) if against else None,
            "--no-general": not general,
            "--max-new-tokens": max_new_tokens,
        }
        return await self.calls.run("eval", *flags(asked))

    async def merge(self, adapter: Adapter, output: Output) -> Document:
        """Merge an adapter into its base, and prove that the files are the model that was trained."""
        asked = {"--adapter": self.bounds.adapter(adapter), "--output": self.bounds.to_write(output)}
        return await self.calls.run("merge", *flags(asked))

    async def _with_recipe(
        self, command: str, recipe: str, settings: dict[str, Any] | None, others: Mapping[str, object] | None = None
    ) -> Document:
        """Run a command that takes a recipe, its settings and other flags, once the recipe is within the bounds."""
        words, shown = await self._recipe_words(recipe, settings)
        return await self.calls.run(*command.split(), *words, *flags(others or {})) if "recipe" in shown else shown

    async def _recipe_words(self, recipe: str, settings: dict[str, Any] | None) -> tuple[list[str], Document]:
        """Return the flags of a recipe, and the document of the resolved one, or of what is wrong with it."""
        given = settings or {}
        usable = {name: value for name, value in given.items() if name in SETTINGS}
        words = [*flags({"--config": self.bounds.recipe(recipe)}), *setting_words(usable)]
        shown = await self.calls.run("sft", *words, "--show")
        if wrong := setting_problems(given):
            raise refused_settings(wrong, None if "recipe" in shown else shown)
        if "recipe" in shown:
            self.bounds.require_recipe(shown["recipe"])
        return words, shown


class StrictServer(MCPServer[Any]):
    """Answers every mistake of a call with the document of an error, and tells of the progress of calls.

    The SDK leaves out arguments that a tool does not have, and tells of others in pydantic's words.

    Args:
        failed: makes the document of an error.
        tools: the tools.
    """

    def __init__(self, failed: Failed, tools: Sequence[MadeTool], **settings: Any) -> None:
        super().__init__(tools=[*tools], **settings)
        self._failed = failed
        self._made = {tool.name: tool for tool in tools}

    async def list_tools(self) -> list[ListedTool]:
        """Return the tools, whose schemas say that there are no other arguments."""
        tools: list[ListedTool] = await super().list_tools()
        for tool in tools:
            tool.input_schema = {**tool.input_schema, "additionalProperties": False}
        return tools

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Any = None) -> Any:
        """Run a tool, or return the document of what is wrong with its arguments."""
        try:
            if name not in self._made:
                raise LoratuneError(f"there is no tool {name}; {meant(name, self._made)}", Exit.USAGE)
            require_arguments(self._made[name], arguments)
        except LoratuneError as error:
            return _result(self._failed(error))
        TELL.set(_teller(context) if context else None)
        result = await super().call_tool(name, arguments, context)
        is_told = result.is_error and result.structured_content
        own = {tool: made.parameters.get("properties", {}) for tool, made in self._made.items()}
        return _result(in_arguments(result.structured_content, name, own)) if is_told else result


def _teller(context: Any) -> Callable[[str], Awaitable[None]]:
    """Return what tells the client a line as the progress of its call, which is a number that only grows."""
    numbers = itertools.count(1)

    async def tell(line: str) -> None:
        await context.report_progress(next(numbers), message=line)

    return tell


def make_server(bounds: Bounds, failed: Failed, started: Started) -> MCPServer[Any]:
    """Return the server.

    Args:
        bounds: the folders.
        failed: makes the document of an error.
        started: makes the document of a training that was started.
    """
    tools = Tools(bounds, Calls(bounds.root), started)
    offered: list[tuple[Tool, ToolAnnotations]] = [
        *((tool, READS) for tool in (tools.check, tools.plan, tools.status, tools.infer)),
        *((tool, WRITES) for tool in (tools.sft, tools.eval, tools.merge)),
    ]
    made = [MadeTool.from_function(_answered(tool, failed), annotations=about) for tool, about in offered]
    told = INSTRUCTIONS.format(root=bounds.root, readable=", ".join(map(str, bounds.readable)))
    return StrictServer(failed, made, name="loratune", version=__version__, instructions=told, log_level="WARNING")


def serve(bounds: Bounds, failed: Failed, started: Started) -> None:
    """Serve until the client closes standard input."""
    logging.getLogger("mcp").setLevel(logging.WARNING)
    make_server(bounds, failed, started).run("stdio")


def _answered(tool: Tool, failed: Failed) -> Callable[..., Any]:
    """Turn a tool's document into a result of the protocol; an error's is marked as one."""

    @functools.wraps(tool)
    async def answer(**arguments: Any) -> CallToolResult:
        try:
            document = await tool(**arguments)
        except Exception as error:
            document = failed(error)
            if document["exit_code"] == Exit.BUG:
                traceback.print_exc()
        return _result(document)

    return answer


def _result(document: Document) -> CallToolResult:
    text = TextContent(type="text", text=json.dumps(document, ensure_ascii=False, indent=1))
    is_error = str(document.get("schema", "")).startswith("loratune/error/")
    return CallToolResult(content=[text], structured_content=document, is_error=is_error)
