"""Which commands there are, with their one-line helps, and the module of each."""

from __future__ import annotations

from types import ModuleType

# Command → its one-line help.
COMMANDS = {
    "sft": "Train a LoRA adapter, or a model's own weights, from a recipe.",
    "sweep": "Train a recipe with many values of some settings, and say which are best.",
    "import": "Translate a config of LLaMA-Factory, ms-swift, axolotl, unsloth or TRL into a recipe.",
    "data": "Inspect the training data of a recipe.",
    "merge": "Merge an adapter into its base model, and verify the result.",
    "export": "Convert an adapter or merged model for another program, and verify it.",
    "verify": "Check that a merged model, an export or a run is unchanged.",
    "infer": "Chat with a trained adapter, answer one prompt, or answer a file of rows.",
    "eval": "Compare an adapter with its base or another adapter; exit code 7 if it is worse.",
    "serve": "Serve an OpenAI-compatible HTTP API and a chat page.",
    "runs": "Inspect runs.",
    "doctor": "Examine this machine: what works, what is slower than it could be, and what mends it.",
    "launch": "Write a job file for a cluster: training that goes on after a preemption.",
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
RUNS_COMMANDS = {"show": "Show a run's state, losses, checkpoints, and the next command."}


def command_module(name: str) -> ModuleType:
    """Import a command's module only when it runs, since some take seconds to import."""
    match name:
        case "sft":
            from loratune.cli import sft

            return sft
        case "sweep":
            from loratune.cli import sweep

            return sweep
        case "import":
            from loratune.cli import import_

            return import_
        case "merge":
            from loratune.cli import merge

            return merge
        case "export":
            from loratune.cli import export

            return export
        case "verify":
            from loratune.cli import verify

            return verify
        case "infer":
            from loratune.cli import infer

            return infer
        case "eval":
            from loratune.cli import eval

            return eval
        case "serve":
            from loratune.cli import serve

            return serve
        case "doctor":
            from loratune.cli import doctor

            return doctor
        case _:
            return _module_in_group(name)


def _module_in_group(name: str) -> ModuleType:
    match name:
        case "data_check":
            from loratune.cli import data_check

            return data_check
        case "data_preview":
            from loratune.cli import data_preview

            return data_preview
        case "runs_show":
            from loratune.cli import runs_show

            return runs_show
        case "launch_slurm":
            from loratune.cli import launch_slurm

            return launch_slurm
        case "launch_sky":
            from loratune.cli import launch_sky

            return launch_sky
        case "launch_k8s":
            from loratune.cli import launch_k8s

            return launch_k8s
        case _:
            raise ValueError(name)
