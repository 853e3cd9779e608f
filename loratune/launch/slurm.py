"""An sbatch script that requeues itself when a signal has stopped the training."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from loratune.commands import Command
from loratune.launch.job import (
    GRACE_SECONDS,
    STOPPED,
    Job,
    JobFile,
    commented,
    heredoc,
    recipe_text,
    sft_words,
    shell_command,
)
from loratune.launch.paths import placed

PORTS = (10_000, 20_000)
"""First and number of the ports of which a job takes one by its number, below those that systems give to clients."""


@dataclass(frozen=True)
class SlurmOptions:
    """What Slurm alone asks for."""

    python: str
    """Of the environment that has loratune, on the nodes."""
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    gpu_type: str | None = None
    further: tuple[str, ...] = ()
    """Further options of sbatch, such as --qos=long."""
    grace_seconds: int = GRACE_SECONDS
    max_requeues: int = 100
    """Ends a job that is stopped each time before its first checkpoint."""


def sbatch_script(job: Job, options: SlurmOptions) -> JobFile:
    """Return the script of a job whose nodes see this machine's files."""
    output = Path(job.recipe.output).absolute()
    files = placed(job.recipe, str, str(output))
    recipe = f"{output}.job.yaml"
    parts = [
        "#!/bin/bash",
        _about(job, options, str(output)),
        _directives(job, options),
        _secrets(job),
        commented("The recipe as it was checked. A change of the original does not reach a job that waits or resumes.")
        + f"\nmkdir -p {shlex.quote(str(output.parent))}\n"
        + heredoc(shlex.quote(recipe), recipe_text(files.recipe)),
        _start(job, options, recipe),
        _end(options),
    ]
    return JobFile(
        "\n\n".join(part for part in parts if part) + "\n", Command("submit it", ("sbatch", "FILE")), files.moved
    )


def _about(job: Job, options: SlurmOptions, output: str) -> str:
    return commented(
        f"Trains {output}. Submit with: sbatch FILE. There is a checkpoint every {job.saved_every} and after SIGTERM, "
        "and --resume auto goes on from the newest whole one.",
        f"Every node must see these on the same paths: the folder {Path(output).parent}, the recipe's rows and local "
        f"models, and {options.python}. The caches of models (HF_HOME) and of encoded rows (LORATUNE_CACHE) are better "
        "shared too.",
    )


def _directives(job: Job, options: SlurmOptions) -> str:
    tasks = job.processes_per_node
    gpu = f"{options.gpu_type}:" if options.gpu_type else ""
    lines = [
        f"--job-name={job.name}",
        f"--partition={options.partition}" if options.partition else "",
        f"--account={options.account}" if options.account else "",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={max(1, job.cpus // tasks)}",
        f"--mem={job.memory}G",
        # Not --gpus-per-task, which hides the GPUs of a node from each other, so that NCCL cannot copy between them.
        f"--gres=gpu:{gpu}{job.gpus}" if job.gpus else "",
        f"--time={options.time}",
        "--output=%x-%j.log",
        *options.further,
    ]
    repeated = commented("A job that is requeued has the same number, and goes on in the same log.")
    warned = commented(
        f"Slurm sends SIGTERM to the tasks {options.grace_seconds} to {options.grace_seconds + 60} seconds before the "
        "time is up, which must be enough for a step and its checkpoint. Not B:TERM, which this shell alone would get: "
        "it could not pass it on, since srun ends its tasks with SIGKILL when it gets SIGTERM."
    )
    listed = "\n".join(f"#SBATCH {line}" for line in lines if line)
    return (
        f"{listed}\n{repeated}\n#SBATCH --requeue\n#SBATCH --open-mode=append\n"
        f"{warned}\n#SBATCH --signal=TERM@{options.grace_seconds}"
    )


def _secrets(job: Job) -> str:
    if not job.secrets:
        return ""
    tests = [f': "${{{name}:?is not set; set it in the shell that calls sbatch}}"' for name in job.secrets]
    told = commented("Comes from the environment of sbatch, which passes it on (--export=ALL is the default).")
    return "\n".join([told, *tests])


def _start(job: Job, options: SlurmOptions, recipe: str) -> str:
    words = [options.python, "-m", "loratune", *sft_words(recipe)]
    # srun does not take over --cpus-per-task from sbatch since Slurm 22.05.
    flags = [f"--cpus-per-task={max(1, job.cpus // job.processes_per_node)}", "--kill-on-bad-exit=0", "--wait=0"]
    waits = commented(
        "The first process may still write the checkpoint or the report when the others have ended, so srun must not "
        "end it then. The others of a process that fails end by themselves."
    )
    if job.processes == 1:
        return shell_command(["srun", *flags, *words]) + "\ncode=$?"
    first, count = PORTS
    meeting = (
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
        f"MASTER_PORT=$(({first} + SLURM_JOB_ID % {count}))\n"
        f"export MASTER_ADDR MASTER_PORT LOCAL_WORLD_SIZE={job.processes_per_node}"
    )
    why = commented(
        "A task per process, without torchrun: it passes on a signal that Slurm has sent to each process already, and "
        "ends with 1 whatever stopped it, so that a stop would look like an error."
    )
    names = "RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS"
    call = shell_command(["srun", *flags])
    task = f" \\\n    bash -c 'export {names}; exec \"$@\"' task \\\n    {shell_command(words)}"
    return "\n".join([meeting, *_network(job), why, waits, f"{call}{task}", "code=$?"])


def _network(job: Job) -> list[str]:
    if job.nodes == 1:
        return []
    return [
        commented("Only if the nodes have several networks and the start hangs: name the one that connects them."),
        f"# export {'NCCL' if job.gpus else 'GLOO'}_SOCKET_IFNAME=eth0",
    ]


def _end(options: SlurmOptions) -> str:
    told = commented(
        f"{STOPPED} means that SIGTERM stopped the training, before the end of the time or in the grace time of a "
        "preemption. Slurm itself requeues a job that it preempts or whose node fails. scancel ends the job, and this "
        "shell with it."
    )
    return f"""\
{told}
restarts=${{SLURM_RESTART_COUNT:-0}}
if [ "$code" -eq {STOPPED} ] && [ "$restarts" -lt {options.max_requeues} ]; then
    echo "stopped by SIGTERM; requeued as restart $((restarts + 1)) of at most {options.max_requeues}"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60  # Slurm ends this shell
fi
exit "$code\""""
