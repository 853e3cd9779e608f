"""Job files for clusters: what they run, and what becomes of the job when it is stopped or fails."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import Result

from loratune.cli.launching import one_word
from loratune.errors import Exit
from loratune.recipe.loading import load_recipe
from loratune.recipe.sections import Recipe

CLI = Callable[..., Result]
SLURM = ("slurm",)
ANY_GPU = ("sky", "--bucket", "s3://runs", "--install", "git+https://host/loratune")
SKY = (*ANY_GPU, "--gpu-type", "H100")
K8S = ("k8s", "--image", "registry/loratune:1")
PLAIN = (*K8S, "--plain")
EVERY = pytest.mark.parametrize("scheduler", [SLURM, SKY, K8S, PLAIN], ids=["slurm", "sky", "k8s", "k8s --plain"])
# A task of `srun`, as Slurm describes it to it, and everything else that a script asks Slurm for.
STUBS = {
    "srun": """
shift_flags() { while [[ $1 == --* ]]; do shift; done; exec "$@"; }
echo "srun $*" >> "$LOG"
for task in $(seq 0 $((TASKS - 1))); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=$TASKS shift_flags "$@" &
done
wait
exit "$CODE"
""",
    "scontrol": """
[ "$1" = show ] && printf 'n1\\nn2\\n' && exit
echo "scontrol $*" >> "$LOG"
exit "${REFUSED:-0}"
""",
    "sleep": 'echo "sleep" >> "$LOG"',
    "training": 'echo "task ${RANK-} ${LOCAL_RANK-} ${WORLD_SIZE-} ${LOCAL_WORLD_SIZE-} ${MASTER_ADDR-} $*" >> "$LOG"',
}


@pytest.fixture
def recipe_file(tmp_path: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose rows are named as from the folder that it is in, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    values = {
        "model": {"base": "tiny-qwen"},
        "data": {"train": ["rows.json#5"], "placeholders": {"name": "小李"}},
        "prompt": {"system": "Be brief.\n\nRECIPE\n"},  # a line that could end a here-document
        "output": "out/My Run",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


@pytest.fixture
def launch(cli: CLI, recipe_file: Path) -> Callable[..., str]:
    """Return a job file's text."""

    def made(*arguments: Any) -> str:
        done = cli("launch", *arguments, "--config", recipe_file)
        assert done.exit_code == 0, done.stderr
        return done.stdout

    return made


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[int, list[str], str]]:
    """Run a script with programs in place of Slurm's; returns its exit code, what it has called, and its output."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, code in STUBS.items():
        (programs / name).write_text(f"#!/bin/bash\n{code}")
        (programs / name).chmod(0o755)

    def ran(script: str, code: int = 0, tasks: int = 1, **variables: str) -> tuple[int, list[str], str]:
        log = tmp_path / "calls"
        log.write_text("")
        environment = {"PATH": f"{programs}:{os.environ['PATH']}", "LOG": str(log), "CODE": str(code)}
        environment |= {"TASKS": str(tasks), "SLURM_JOB_ID": "25007", "SLURM_JOB_NODELIST": "n[1-2]", **variables}
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
        return done.returncode, log.read_text().splitlines(), done.stdout + done.stderr

    return ran


def recipe_in(text: str, folder: Path) -> Recipe:
    """The recipe in the objects of Kubernetes or in SkyPilot's commands, read as sft reads it."""
    path = folder / "from-the-job.yaml"
    documents = list(yaml.safe_load_all(text))
    held = (
        [document["data"]["recipe.yaml"] for document in documents if document["kind"] == "ConfigMap"]
        if ("kind" in documents[0])
        else [re.search(r"<<'(RECIPE_*)'\n(.*?)^\1$", documents[0]["run"], re.DOTALL | re.MULTILINE)[2]]
    )
    path.write_text(held[0], encoding="utf-8")
    return load_recipe(str(path), {})


def of_kind(text: str, kind: str) -> dict[str, Any]:
    (found,) = (document for document in yaml.safe_load_all(text) if document["kind"] == kind)
    return dict(found)


# --- the recipe ---


@EVERY
def test_the_job_reads_the_recipe_that_was_given_with_its_own_paths(
    launch: Callable[..., str], run: Callable[..., Any], recipe_file: Path, tmp_path: Path, scheduler: tuple[str, ...]
) -> None:
    text = launch(*scheduler, "--lora.rank", "3", "--data.validation", "rows.json")
    if scheduler == SLURM:
        assert run(text.replace(sys.executable, "training"))[0] == 0
        read = load_recipe(str(tmp_path / "out" / "My Run.job.yaml"), {})
    else:
        read = recipe_in(text, tmp_path)
    rows, output = {
        "slurm": (str(tmp_path / "rows.json"), str(tmp_path / "out" / "My Run")),
        "sky": (str(Path("~/loratune-files/rows.json").expanduser()), "/loratune-runs/out/My Run"),
        "k8s": ("/workspace/rows.json", "/workspace/out/My Run"),
    }[scheduler[0]]
    given = load_recipe(str(recipe_file), {"lora.rank": "3", "data.validation": [str(tmp_path / "rows.json")]})
    data = given.data.model_copy(update={"train": [f"{rows}#5"], "validation": [rows]})
    assert read == given.model_copy(update={"data": data, "output": output})


@EVERY
def test_rows_of_shipped_recipes_and_hub_names_need_no_file(
    cli: CLI, tmp_path: Path, scheduler: tuple[str, ...]
) -> None:
    flags = ("--data.train", "hf:org/rows:train", "--model.base", "Qwen/Qwen3-8B")
    assert json.loads(cli("launch", *scheduler, "--config", "qwen7b", *flags, "--json").stdout)["moved"] == {}
    moved = json.loads(cli("launch", *scheduler, "--config", "quickstart", "--json").stdout)["moved"]
    assert sorted(Path(here).name for here in moved) == (
        ["general.json", "identity.json"] if scheduler == SLURM else []
    )


@EVERY
def test_missing_inputs_are_told_all_at_once(
    cli: CLI, recipe_file: Path, tmp_path: Path, scheduler: tuple[str, ...]
) -> None:
    wrong = ("--data.train", "gone.json", "--data.train", "lost.csv", "--model.base", "no/such/model")
    done = cli("launch", *scheduler, "--config", recipe_file, *wrong, "--file", tmp_path / "job")
    assert done.exit_code == Exit.DATA
    assert all(name in done.stderr for name in ("gone.json: no such file", "lost.csv", "no/such/model"))
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("scheduler", [K8S, PLAIN], ids=["trainer", "plain"])
def test_what_is_below_the_volume_is_left_to_the_job(
    launch: Callable[..., str], tmp_path: Path, scheduler: Any
) -> None:
    flags = ("--data.train", "/workspace/rows.json#2x", "--model.base", "/workspace/models/qwen")
    read = recipe_in(launch(*scheduler, *flags, "--output", "/workspace/run"), tmp_path)
    assert (read.data.train, read.model.base) == (["/workspace/rows.json#2x"], "/workspace/models/qwen")
    assert read.output == "/workspace/run"


@EVERY
def test_inputs_of_one_name_do_not_meet(
    cli: CLI, recipe_file: Path, tmp_path: Path, scheduler: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.json").write_bytes((tmp_path / "rows.json").read_bytes())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    rows = [str(tmp_path / name / "rows.json") for name in ("one", "two")]
    flags = ("--data.train", f"{rows[0]}#5", "--data.train", f"{rows[0]}#2x", "--data.train", rows[1])
    moved = json.loads(cli("launch", *scheduler, "--config", recipe_file, *flags, "--json").stdout)["moved"]
    assert list(moved) == rows
    assert len(set(moved.values())) == 2


@EVERY
def test_a_broken_recipe_is_refused_before_it_is_queued(
    cli: CLI, recipe_file: Path, scheduler: tuple[str, ...]
) -> None:
    done = cli("launch", *scheduler, "--config", recipe_file, "--lora.rank", "0", "--training.epochs", "no")
    assert (done.exit_code, done.stdout) == (Exit.USAGE, "")
    assert "--lora.rank" in done.stderr
    assert "--training.epochs" in done.stderr


# --- the file ---


@EVERY
def test_a_file_is_replaced_only_on_request_and_json_says_what_to_do(
    cli: CLI, launch: Callable[..., str], recipe_file: Path, tmp_path: Path, scheduler: tuple[str, ...]
) -> None:
    job, command = tmp_path / "job", ("launch", *scheduler, "--config", recipe_file, "--file", tmp_path / "job")
    assert cli(*command).exit_code == 0
    assert job.read_text(encoding="utf-8") == launch(*scheduler)
    assert cli(*command).exit_code == Exit.USAGE
    assert cli(*command[:-1], tmp_path / "no" / "job").exit_code == Exit.IO
    told = json.loads(cli(*command, "--overwrite", "--json").stdout)
    assert (told["file"], told["text"]) == (str(job), job.read_text(encoding="utf-8"))
    assert told["next"].endswith(str(job))


@EVERY
def test_no_value_of_the_environment_is_written(
    launch: Callable[..., str], monkeypatch: pytest.MonkeyPatch, scheduler: tuple[str, ...]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_never_to_be_seen")
    text = launch(*scheduler, "--secret", "HF_TOKEN")
    assert "HF_TOKEN" in text
    assert "hf_never_to_be_seen" not in text


@EVERY
def test_a_secret_with_its_value_is_refused(cli: CLI, recipe_file: Path, scheduler: tuple[str, ...]) -> None:
    done = cli("launch", *scheduler, "--config", recipe_file, "--secret", "HF_TOKEN=hf_never_to_be_seen")
    assert (done.exit_code, done.stdout) == (Exit.USAGE, "")
    assert "hf_never_to_be_seen" not in done.stderr


@pytest.mark.parametrize("flag", ["--partition", "--account", "--time", "--gpu-type", "--sbatch"])
def test_an_option_of_slurm_is_one_word(cli: CLI, recipe_file: Path, flag: str) -> None:
    done = cli("launch", "slurm", "--config", recipe_file, flag, "a\n#SBATCH --uid=0")
    assert (done.exit_code, done.stdout) == (Exit.USAGE, "")


@pytest.mark.parametrize("text", ["a b", "$(id)", "`id`", "'", '"', "a\n", "\\", "#", "", "ä"])
def test_what_a_shell_or_yaml_would_read_is_no_word(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        one_word(text)


def test_the_type_of_gpu_that_skypilot_needs_is_asked_for(cli: CLI, recipe_file: Path) -> None:
    done = cli("launch", *ANY_GPU, "--config", recipe_file)
    assert done.exit_code == Exit.USAGE
    assert "--gpu-type" in done.stderr


@pytest.mark.parametrize("scheduler", [SLURM, ANY_GPU], ids=["slurm", "sky"])
def test_a_type_of_gpu_without_gpus_is_refused(cli: CLI, recipe_file: Path, scheduler: tuple[str, ...]) -> None:
    done = cli("launch", *scheduler, "--config", recipe_file, "--gpus", "0", "--gpu-type", "H100")
    assert done.exit_code == Exit.USAGE


def test_flags_of_what_is_not_made_are_refused(cli: CLI, recipe_file: Path) -> None:
    for flags in (("--volume", "mine", "--storage", "9"), ("--from-secret", "mine")):
        assert cli("launch", *K8S, "--config", recipe_file, *flags).exit_code == Exit.USAGE


# --- Slurm ---


@pytest.mark.parametrize("shape", [(1, 0), (1, 1), (1, 8), (4, 8)], ids=str)
def test_the_script_is_one_that_bash_reads(launch: Callable[..., str], shape: tuple[int, int]) -> None:
    script = launch(
        "slurm", "--nodes", shape[0], "--gpus", shape[1], "--name", "job", "--partition", "gpu", "--sbatch", "--qos=a"
    )
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") or not line for line in lines[:last]), "sbatch reads no option after a command"
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert (options["nodes"], options["ntasks-per-node"]) == (str(shape[0]), str(max(1, shape[1])))
    assert options.get("gres") == (f"gpu:{shape[1]}" if shape[1] else None)
    assert (options["signal"], options["requeue"], options["open-mode"]) == ("TERM@120", "", "append")
    assert (options["partition"], options["qos"]) == ("gpu", "a")


def test_each_task_is_a_process_of_the_group(
    launch: Callable[..., str], run: Callable[..., Any], tmp_path: Path
) -> None:
    script = launch("slurm", "--nodes", 2, "--gpus", 2, "--python", "training")
    code, calls, output = run(script, tasks=4)
    assert code == 0, output
    started = sorted(call for call in calls if call.startswith("task"))
    sft = f"-m loratune sft --config {tmp_path / 'out' / 'My Run.job.yaml'} --resume auto"
    assert started == [f"task {rank} {rank % 2} 4 2 n1 {sft}" for rank in range(4)]
    (srun,) = (call for call in calls if call.startswith("srun"))
    assert "--wait=0" in srun
    assert "--kill-on-bad-exit=0" in srun
    assert not any("requeue" in call for call in calls)


def test_one_process_is_not_told_of_a_group(launch: Callable[..., str], run: Callable[..., Any]) -> None:
    _, calls, _ = run(launch("slurm", "--python", "training"))
    (started,) = (call for call in calls if call.startswith("task"))
    assert started.startswith("task      -m loratune sft")


@pytest.mark.parametrize(
    ("code", "restarts", "is_requeued"),
    [
        (143, None, True),
        (143, "1", True),
        (143, "2", False),
        (0, None, False),
        (1, None, False),
        (3, "1", False),
        (137, None, False),
    ],
)
def test_only_a_job_that_sigterm_has_stopped_is_requeued(
    launch: Callable[..., str], run: Callable[..., Any], code: int, restarts: str | None, is_requeued: bool
) -> None:
    script = launch("slurm", "--python", "training", "--max-requeues", 2)
    restarted = {} if restarts is None else {"SLURM_RESTART_COUNT": restarts}
    ended, calls, _ = run(script, code, **restarted)
    assert ended == code
    assert calls[1:][-2:] == ["scontrol requeue 25007", "sleep"] if is_requeued else "sleep" not in calls


def test_a_job_that_slurm_does_not_requeue_ends_with_the_code(
    launch: Callable[..., str], run: Callable[..., Any]
) -> None:
    ended, calls, _ = run(launch("slurm", "--python", "training"), 143, REFUSED="1")
    assert ended == 143
    assert "sleep" not in calls


def test_a_secret_that_is_not_set_ends_the_job_before_it_trains(
    launch: Callable[..., str], run: Callable[..., Any]
) -> None:
    script = launch("slurm", "--python", "training", "--secret", "HF_TOKEN")
    ended, calls, output = run(script)
    assert ended != 0
    assert calls == []
    assert "HF_TOKEN" in output
    assert run(script, HF_TOKEN="given")[0] == 0


# --- SkyPilot ---


def test_a_task_mounts_the_runs_and_ends_with_the_training_s_exit_code(
    launch: Callable[..., str], tmp_path: Path
) -> None:
    task = yaml.safe_load(launch(*SKY, "--gpus", 2, "--secret", "HF_TOKEN"))
    assert task["resources"]["accelerators"] == "H100:2"
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [143], "max_restarts_on_errors": 3}
    assert task["file_mounts"]["/loratune-runs"] == {"source": "s3://runs", "mode": "MOUNT_CACHED"}
    assert task["secrets"] == {"HF_TOKEN": None}
    assert task["setup"].split() == ["pip", "install", "git+https://host/loratune"]
    program = tmp_path / "loratune"
    program.write_text('#!/bin/sh\necho "$@"\nexit 143')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    # SkyPilot appends commands that wait for the uploads.
    script = f"{task['run']}\nended=$?\necho waited\nexit $ended"
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 143
    recipe = tmp_path / "loratune-files" / "recipe.yaml"
    assert done.stdout.split("\n")[:2] == [f"sft --config {recipe} --resume auto --gpus 2", "waited"]
    assert load_recipe(str(recipe), {}).prompt.system == "Be brief.\n\nRECIPE\n"


def test_several_nodes_meet_at_the_first(launch: Callable[..., str], tmp_path: Path) -> None:
    task = yaml.safe_load(launch(*SKY, "--gpus", 2, "--nodes", 3, "--no-spot"))
    assert (task["num_nodes"], task["resources"]["use_spot"]) == (3, False)
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 3}, "torchrun hides the exit code"
    program = tmp_path / "torchrun"
    program.write_text('#!/bin/sh\necho "$@"')
    program.chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}", "SKYPILOT_NODE_RANK": "2"}
    environment["SKYPILOT_NODE_IPS"] = "10.0.0.1\n10.0.0.2\n10.0.0.3"
    done = subprocess.run(["bash", "-c", task["run"]], env=environment, capture_output=True, text=True, check=True)
    assert torchrun_reads(done.stdout.split()) == (3, 2, 2, "10.0.0.1")


def torchrun_reads(words: list[str]) -> tuple[int, int, int, str]:
    """Nodes, processes of each, number of the node, and first host, as torchrun itself reads its command line."""
    from torch.distributed.run import parse_args

    read = parse_args(words)
    assert (read.training_script, read.module) == ("loratune", True)
    assert read.training_script_args[0] == "sft"
    return int(read.nnodes), int(read.nproc_per_node), int(read.node_rank), read.master_addr


# --- Kubernetes ---


def job_spec(text: str, is_plain: bool) -> dict[str, Any]:
    if is_plain:
        return dict(of_kind(text, "Job")["spec"])
    (replicated,) = of_kind(text, "TrainingRuntime")["spec"]["template"]["spec"]["replicatedJobs"]
    return dict(replicated["template"]["spec"])


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("scheduler", [K8S, PLAIN], ids=["trainer", "plain"])
def test_a_preempted_pod_is_no_failure_and_has_time_for_its_checkpoint(
    launch: Callable[..., str], scheduler: tuple[str, ...], nodes: int
) -> None:
    text = launch(*scheduler, "--nodes", nodes, "--gpus", 4, "--grace", 300, "--retries", 5)
    spec = job_spec(text, scheduler == PLAIN)
    pod = spec["template"]["spec"]
    first, *rest = spec["podFailurePolicy"]["rules"]
    assert first == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    # torchrun, which starts the processes of several nodes, hides the exit code.
    assert [rule["onExitCodes"]["values"] for rule in rest] == ([[2, 3, 4, 5]] if nodes == 1 else [])
    assert (spec["backoffLimit"], pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == (
        5 * nodes,
        "Never",
        300,
    )
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"runs": "/workspace", "recipe": "/etc/loratune", "shared-memory": "/dev/shm"}
    assert {volume["name"] for volume in pod["volumes"]} == mounts.keys()
    assert of_kind(text, "PersistentVolumeClaim")["spec"]["accessModes"] == [
        "ReadWriteMany" if nodes > 1 else "ReadWriteOnce"
    ]


def test_the_pods_of_a_plain_job_meet_at_the_first(launch: Callable[..., str]) -> None:
    text = launch(*PLAIN, "--nodes", 2, "--gpus", 4, "--name", "night", "--namespace", "on")
    job, service = of_kind(text, "Job"), of_kind(text, "Service")
    assert all(document["metadata"]["namespace"] == "on" for document in yaml.safe_load_all(text))
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": "night"}
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    command = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in pod["containers"][0]["command"]]
    assert command[0] == "torchrun"
    assert torchrun_reads(command[1:]) == (2, 4, 1, "night-0.night")


def test_torchrun_takes_from_kubeflow_what_it_is_not_given(
    launch: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = launch(*K8S, "--nodes", 2, "--gpus", 4)
    trainer = of_kind(text, "TrainJob")["spec"]
    assert trainer["runtimeRef"] == {
        "kind": "TrainingRuntime",
        "name": of_kind(text, "TrainingRuntime")["metadata"]["name"],
    }
    assert trainer["trainer"] == {"numNodes": 2, "numProcPerNode": 4}
    set_by_trainer = {"NNODES": "2", "NPROC_PER_NODE": "4", "NODE_RANK": "1", "MASTER_ADDR": "a-node-0-0.a"}
    for name, value in set_by_trainer.items():
        monkeypatch.setenv(f"PET_{name}", value)
    command = job_spec(text, False)["template"]["spec"]["containers"][0]["command"]
    assert torchrun_reads(command[1:]) == (2, 4, 1, "a-node-0-0.a")


@pytest.mark.parametrize("scheduler", [K8S, PLAIN], ids=["trainer", "plain"])
def test_one_node_starts_its_processes_itself_and_secrets_come_from_a_secret(
    launch: Callable[..., str], scheduler: tuple[str, ...]
) -> None:
    text = launch(*scheduler, "--gpus", 8, "--secret", "HF_TOKEN", "--from-secret", "on", "--volume", "null")
    pod = job_spec(text, scheduler == PLAIN)["template"]["spec"]
    (container,) = pod["containers"]
    expected = ["loratune", "sft", "--config", "/etc/loratune/recipe.yaml", "--resume", "auto", "--gpus", "8"]
    assert container["command"] == expected
    (secret,) = (variable for variable in container["env"] if "valueFrom" in variable)
    assert secret == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "on", "key": "HF_TOKEN"}}}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "null"}
    assert "PersistentVolumeClaim" not in {document["kind"] for document in yaml.safe_load_all(text)}


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("scheduler", [K8S, PLAIN], ids=["trainer", "plain"])
def test_the_client_of_kubernetes_knows_every_field(
    launch: Callable[..., str], scheduler: tuple[str, ...], nodes: int
) -> None:
    models = pytest.importorskip("kubernetes.client")
    text = launch(*scheduler, "--nodes", nodes, "--gpus", 4, "--secret", "HF_TOKEN", "--namespace", "ml")
    for document in yaml.safe_load_all(text):
        if document["kind"] == "TrainingRuntime":
            name, document = "V1JobSpec", job_spec(text, False)
        elif document["kind"] == "TrainJob":
            continue
        else:
            name = f"V1{document['kind']}"
        assert getattr(models, name).from_dict(document).model_dump(by_alias=True, exclude_none=True) == document
