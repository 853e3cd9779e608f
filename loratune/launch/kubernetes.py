"""Objects of Kubernetes that run a job: an ordinary Job, or a TrainJob of Kubeflow Trainer."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from loratune.commands import Command
from loratune.launch.job import (
    GRACE_SECONDS,
    HOPELESS,
    PORT,
    Job,
    JobFile,
    commented,
    own_processes,
    quoted,
    recipe_text,
    sft_words,
    torchrun_words,
)
from loratune.launch.paths import below, placed

RECIPE_FOLDER = "/etc/loratune"
GPU = "nvidia.com/gpu"


@dataclass(frozen=True)
class KubernetesOptions:
    """What Kubernetes alone asks for."""

    image: str
    """With loratune in it."""
    namespace: str | None = None
    volume: str | None = None
    """An existing volume claim; None makes one."""
    storage: int = 100
    """Of the claim that is made, in GB."""
    mount: str = "/workspace"
    """Where the volume is mounted."""
    secret: str = "loratune"
    """The secret whose keys are the names of the job's secrets."""
    retries: int = 10
    """Failures of the program that are followed by another attempt; preemptions are not counted."""
    grace_seconds: int = GRACE_SECONDS
    is_plain: bool = False
    """An ordinary Job, without Kubeflow Trainer."""


def kubernetes_objects(job: Job, options: KubernetesOptions) -> JobFile:
    """Return the objects of a job whose inputs and run folder are on a volume."""
    mount = options.mount
    files = placed(
        job.recipe, lambda path: below(mount, str(path), "data"), below(mount, job.recipe.output, "out"), mount
    )
    objects = [
        _claim(job, options) if options.volume is None else "",
        _recipe(job, options, recipe_text(files.recipe)),
        *(_plain(job, options) if options.is_plain else _trainer(job, options)),
    ]
    documents = "\n---\n".join(part for part in objects if part)
    text = f"{_about(job, options, files.recipe.output, files.moved)}\n{documents}\n"
    return JobFile(text, Command("submit it", ("kubectl", "apply", "--filename", "FILE")), files.moved)


def _about(job: Job, options: KubernetesOptions, output: str, moved: dict[str, str]) -> str:
    claim = options.volume or job.name
    kind = "job" if options.is_plain else "trainjob"
    ending = f"Deleting the claim deletes the run; to end the job alone: kubectl delete {kind} {job.name}"
    return commented(
        f"Trains {output} on the volume of the claim {claim}. A pod that is preempted or evicted gets SIGTERM and "
        f"{options.grace_seconds} seconds for a step and its checkpoint. The next one goes on from the newest whole "
        f"checkpoint; there is one every {job.saved_every}.",
        *(f"Copy {here} to {there} on the volume before the job starts." for here, there in moved.items()),
        *([] if options.volume else [ending]),
    )


def _metadata(name: str, options: KubernetesOptions) -> str:
    space = f"\n  namespace: {quoted(options.namespace)}" if options.namespace else ""
    return f"metadata:\n  name: {quoted(name)}{space}"


def _claim(job: Job, options: KubernetesOptions) -> str:
    mode = "ReadWriteMany" if job.nodes > 1 else "ReadWriteOnce"
    return f"""\
apiVersion: v1
kind: PersistentVolumeClaim
{_metadata(job.name, options)}
spec:
  accessModes: [{mode}]
  resources:
    requests:
      storage: {options.storage}G"""


def _recipe(job: Job, options: KubernetesOptions, text: str) -> str:
    return f"""\
apiVersion: v1
kind: ConfigMap
{_metadata(_recipe_name(job), options)}
data:
  recipe.yaml: |
{textwrap.indent(text.rstrip(), "    ")}"""


def _recipe_name(job: Job) -> str:
    return f"{job.name}-recipe"


def _plain(job: Job, options: KubernetesOptions) -> list[str]:
    described = f"""\
apiVersion: batch/v1
kind: Job
{_metadata(job.name, options)}
spec:
  completionMode: Indexed
  completions: {job.nodes}
  parallelism: {job.nodes}
{textwrap.indent(_attempts(job, options), "  ")}
  template:
    spec:
{textwrap.indent(_pod(job, options, subdomain=job.nodes > 1), "      ")}"""
    return [*([_service(job, options)] if job.nodes > 1 else []), described]


def _service(job: Job, options: KubernetesOptions) -> str:
    return f"""\
{commented(f"Gives the first pod the name {_first_host(job)}.")}
apiVersion: v1
kind: Service
{_metadata(job.name, options)}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    batch.kubernetes.io/job-name: {quoted(job.name)}
  ports:
    - port: {PORT}"""


def _first_host(job: Job) -> str:
    return f"{job.name}-0.{job.name}"


def _trainer(job: Job, options: KubernetesOptions) -> list[str]:
    about = commented(
        "A runtime of the job's own: the ones that Kubeflow Trainer brings fail with the first pod that is lost."
    )
    runtime = f"""\
{about}
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainingRuntime
{_metadata(job.name, options)}
spec:
  mlPolicy:
    numNodes: {job.nodes}
    torch: {{}}
  template:
    spec:
      replicatedJobs:
        - name: node
          template:
            metadata:
              labels:
                trainer.kubeflow.org/trainjob-ancestor-step: trainer
            spec:
{textwrap.indent(_attempts(job, options), " " * 14)}
              template:
                spec:
{textwrap.indent(_pod(job, options), " " * 18)}"""
    train_job = f"""\
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
{_metadata(job.name, options)}
spec:
  runtimeRef:
    kind: TrainingRuntime
    name: {quoted(job.name)}
  trainer:
    numNodes: {job.nodes}
    numProcPerNode: {job.processes_per_node}"""
    return [runtime, train_job]


def _attempts(job: Job, options: KubernetesOptions) -> str:
    parts = [
        f"backoffLimit: {options.retries * job.nodes}",
        "podFailurePolicy:",
        "  rules:",
        commented("Preempted, evicted, drained or lost with its node: not counted.", indent=4),
        '    - {action: Ignore, onPodConditions: [{type: DisruptionTarget, status: "True"}]}',
    ]
    if job.nodes > 1:
        about = "A lost node costs each of the others a failure. torchrun ends with 1, whatever a failure was."
        return "\n".join([commented(about), *parts])
    codes = ", ".join(str(int(code)) for code in HOPELESS)
    hopeless = [
        commented(
            "The recipe, the rows, the model, or a loss that is no number: the same would happen again.", indent=4
        ),
        f"    - {{action: FailJob, onExitCodes: {{containerName: node, operator: In, values: [{codes}]}}}}",
    ]
    return "\n".join([*parts, *hopeless])


def _pod(job: Job, options: KubernetesOptions, subdomain: bool = False) -> str:
    named = f"subdomain: {quoted(job.name)}\n" if subdomain else ""
    return f"""\
restartPolicy: Never
{named}{commented("For a step and its checkpoint, after SIGTERM.")}
terminationGracePeriodSeconds: {options.grace_seconds}
containers:
  - name: node
    image: {quoted(options.image)}
    command: [{", ".join(map(quoted, _command(job, options)))}]
    env:
{textwrap.indent(_environment(job, options), " " * 6)}
    resources:
{textwrap.indent(_resources(job), " " * 6)}
    volumeMounts:
      - {{name: runs, mountPath: {quoted(options.mount)}}}
      - {{name: recipe, mountPath: {RECIPE_FOLDER}}}
      - {{name: shared-memory, mountPath: /dev/shm}}
volumes:
  - name: runs
    persistentVolumeClaim:
      claimName: {quoted(options.volume or job.name)}
  - name: recipe
    configMap:
      name: {quoted(_recipe_name(job))}
{commented("The processes of a node exchange tensors here; a container's own /dev/shm has 64 MB.", indent=2)}
  - name: shared-memory
    emptyDir:
      medium: Memory
      sizeLimit: {max(1, job.memory // 4)}G"""


def _command(job: Job, options: KubernetesOptions) -> list[str]:
    words = sft_words(f"{RECIPE_FOLDER}/recipe.yaml")
    if job.nodes == 1:
        return ["loratune", *words, *own_processes(job)]
    if options.is_plain:
        return [*torchrun_words(job, "$(JOB_COMPLETION_INDEX)", _first_host(job), options.grace_seconds), *words]
    # Kubeflow Trainer sets the rest in PET_ variables, of which torchrun takes what it is not given.
    return ["torchrun", "--shutdown-timeout", str(options.grace_seconds), "-m", "loratune", *words]


def _environment(job: Job, options: KubernetesOptions) -> str:
    caches = {"HF_HOME": "huggingface", "LORATUNE_CACHE": "loratune"}
    lines = [commented("On the volume, so that the next pod neither downloads nor encodes anything again.")]
    lines += [
        f"- {{name: {name}, value: {quoted(f'{options.mount}/.cache/{folder}')}}}" for name, folder in caches.items()
    ]
    for name in job.secrets:
        lines += [f"- name: {name}", f"  valueFrom: {{secretKeyRef: {{name: {quoted(options.secret)}, key: {name}}}}}"]
    return "\n".join(lines)


def _resources(job: Job) -> str:
    gpu = [f"  {GPU}: {quoted(str(job.gpus))}"] if job.gpus else []
    lines = [
        "requests:",
        f"  cpu: {quoted(str(job.cpus))}",
        f"  memory: {quoted(f'{job.memory}G')}",
        *gpu,
        "limits:",
        f"  memory: {quoted(f'{job.memory}G')}",
        *gpu,
    ]
    return "\n".join(lines)
