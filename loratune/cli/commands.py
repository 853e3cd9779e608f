"""Which commands there are, with their one-line helps, and the module of each."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType

from loratune.nearest import nearest

# Command → its one-line help.
COMMANDS = {
    "sft": "Train a LoRA adapter, or a model's own weights, from a recipe.",
    "plan": "Say what memory a recipe takes, whether it fits, and what would make it fit; exit code 6 if not.",
    "sweep": "Train a recipe with many values of some settings, and say which are best.",
    "import": "Translate a config of LLaMA-Factory, ms-swift, axolotl, unsloth or TRL into a recipe.",
    "data": "Inspect the training data of a recipe.",
    "merge": "Merge an adapter into its base model, and verify the result.",
    "export": "Convert an adapter or merged model for another program, and verify it.",
    "verify": "Check that a merged model, an export or a run is unchanged.",
    "infer": "Chat with a trained adapter, answer one prompt, or answer a file of rows.",
    "eval": "Compare an adapter with its base or another adapter; exit code 7 if it is worse.",
    "serve": "Serve an OpenAI-compatible HTTP API and a chat page.",
    "runs": "List, inspect, compare and tag runs.",
    "doctor": "Examine this machine: what works, what is slower than it could be, and what mends it.",
    "launch": "Write a job file for a cluster: training that goes on after a preemption.",
    "mcp": "Offer checks, training, answers, evaluation and merging to agents, over MCP.",
    "agents-md": "Write an AGENTS.md that tells coding agents how to use loratune in a project.",
    "schema": "Print the JSON Schema of recipes, or of what a command prints with --json.",
}
DATA_COMMANDS = {
    "check": "Check the rows of a recipe, as sft does; exit code 3 if sft would refuse them.",
    "preview": "Show some rows as rendered text, with the trained tokens marked.",
}
LAUNCH_COMMANDS = {
    "slurm": "Write an sbatch script that requeues itself.",
    "sky": "Write a SkyPilot task for spot instances.",
    "k8s": "Write a Kubeflow TrainJob, or an ordinary Kubernetes Job.",
}
RUNS_COMMANDS = {
    "list": "List runs, merged models and exports, with states, losses, verdicts and tags.",
    "show": "Show a run's state, losses, checkpoints, and the next command; or where a model comes from.",
    "compare": "Compare runs: settings, data, losses at equal steps, answers.",
    "tag": "Give a run tags, or remove them.",
    "serve": "Serve a page that shows the runs of a folder as they train.",
}

GROUPED = {"data": DATA_COMMANDS, "runs": RUNS_COMMANDS, "launch": LAUNCH_COMMANDS}
"""Group of commands → its commands, with their one-line helps."""

ELSEWHERE = {
    "train": "sft",
    "finetune": "sft",
    "fine-tune": "sft",
    "chat": "infer",
    "generate": "infer",
    "predict": "infer",
    "evaluate": "eval",
    "preprocess": "data check",
    "convert": "export",
    "api": "serve",
    "deploy": "serve",
}
"""Command of LLaMA-Factory, ms-swift, axolotl, unsloth, torchtune or litgpt → its equivalent here."""

MODULES = {"import": "import_", "agents-md": "agents_md"}
"""Command → its module, where the name cannot be a module's."""


def command_lines() -> list[tuple[str, ...]]:
    """Return the words of every command: `("merge",)`, `("data", "check")`."""
    lines: list[tuple[str, ...]] = []
    for name in COMMANDS:
        lines += [(name, inner) for inner in GROUPED[name]] if name in GROUPED else [(name,)]
    return lines


def command_meant(name: str, known: Iterable[str]) -> str:
    """Return the command that is likely meant by an unknown one; empty if none is.

    Args:
        name: as typed.
        known: the commands that there are at its place.
    """
    own = {one: one for one in known}
    grouped = {one: f"{group} {one}" for group, inner in GROUPED.items() if group in own for one in inner}
    names = {**grouped, **{one: here for one, here in ELSEWHERE.items() if here.split()[0] in own}, **own}
    return names.get(name) or names.get(nearest(name, names), "")


def command_module(name: str) -> ModuleType:
    """Import a command's module only when it runs, since some take seconds to import.

    Args:
        name: of a command above, or of one in a group, such as data_check.
    """
    return importlib.import_module(f"loratune.cli.{MODULES.get(name, name)}")
