"""`loratune doctor`: every fault of a machine is found, with what mends it, and none is found in a good one."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from typer.testing import Result

from loratune.doctor import measuring
from loratune.doctor.examination import Examination, judge
from loratune.doctor.facts import (
    BaseFacts,
    Failure,
    Gpu,
    HubFacts,
    Machine,
    PackingFacts,
    Place,
    RecipeFacts,
    TorchFacts,
    Trial,
    Version,
)
from loratune.doctor.finding import Finding
from loratune.doctor.judgement.packages import PACKAGES
from loratune.doctor.judgement.storage import LEAST_BYTES
from loratune.errors import Exit

Cli = Callable[..., Result]
CRASH, HANG = Failure("signal", "the process crashed with SIGSEGV"), Failure("timeout", "no answer after 240 s")
ERROR, RIGHT = Failure("error", "ImportError: undefined symbol"), Trial(0.001, 0.02)
WRONG = Trial(0.7, 0.02)
H100 = Gpu("NVIDIA H100", (9, 0), 80_000_000_000, has_bfloat16=True)
V100 = Gpu("Tesla V100", (7, 0), 16_000_000_000, has_bfloat16=False)
T4 = Gpu("Tesla T4", (7, 5), 16_000_000_000, has_bfloat16=False)
LATER = Gpu("a later card", (13, 0), 200_000_000_000, has_bfloat16=True)
TORCH = TorchFacts(
    version="2.13.0+cu130",
    cuda="13.0",
    architectures=("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120a"),
    gpus=(H100,),
    reason="",
    indirect=(),
    cpu_has_bfloat16=True,
    threads=16,
    cores=16,
    free_memory_bytes=100_000_000_000,
)
GOOD = Machine(
    driver="580.95.05",
    has_nvidia_device=True,
    are_gpus_hidden=False,
    torch=TORCH,
    works_without_gpu=False,
    packages=dict.fromkeys(PACKAGES, "1.0"),
    trials=dict.fromkeys(["torch", *PACKAGES], RIGHT),
    packing=PackingFacts("varlen: one kernel for all documents of a batch", True, "apart", "bfloat16", 0),
    places={name: Place(f"/disk/{name}", 10**12, "") for name in LEAST_BYTES},
    shared_memory_bytes=10**10,
    hub=HubFacts("https://huggingface.co", False, "", "accepted", None, ""),
    exchanges={},
    versions={"torch": Version("2.13.0+cu130", ">=2.8", "2.13.0")},
)
WHOLE = BaseFacts("/models/base", (), (), (), 10**9, 2)
RECIPE = RecipeFacts("r.yaml", "/models/base", "huggingface", False, False, WHOLE, None, {"rows.json": True})
FROM_HUB = dataclasses.replace(RECIPE, base="org/name", is_from_hub=True)
CPU_ONLY = dataclasses.replace(TORCH, gpus=(), reason="no NVIDIA driver", architectures=())


def changed(**fields: Any) -> Machine:
    """The good machine but for some facts; those of torch by their own names."""
    known = {field.name for field in dataclasses.fields(TorchFacts)}
    about_torch = {name: fields.pop(name) for name in [*fields] if name in known}
    torch = fields.pop("torch", TORCH)
    return dataclasses.replace(
        GOOD, torch=dataclasses.replace(torch, **about_torch) if about_torch else torch, **fields
    )


def without(*packages: str) -> dict[str, str | None]:
    return {name: None if name in packages else "1.0" for name in PACKAGES}


def failing(package: str, how: Trial | Failure) -> dict[str, Trial | Failure]:
    return {**GOOD.trials, package: how}


def placed(name: str, how: Place | Failure) -> dict[str, Place | Failure]:
    return {**GOOD.places, name: how}


def bad(examination: Examination) -> list[Finding]:
    return [finding for finding in examination.findings if finding.state != "fine"]


NO_GPU: dict[str, Any] = {"gpus": (), "architectures": (), "reason": "CUDA driver version is insufficient"}
TWO: dict[str, Any] = {"gpus": (H100, H100)}
SMALL = 64 * 2**20
OFFLINE = HubFacts("https://huggingface.co", True, "", "not tried", None, "")
UNREACHABLE = HubFacts("https://huggingface.co", False, "ConnectError: no route to host", "not tried", None, "")
REFUSED = dataclasses.replace(UNREACHABLE, reason="", token="refused")
GATED = dataclasses.replace(UNREACHABLE, reason="", token="none", base_reason="GatedRepoError: access is restricted")
LARGE = dataclasses.replace(UNREACHABLE, reason="", token="none", base_bytes=2 * 10**12)

# Name of the finding, its state, the machine, a remedy's line, and what the text says.
MACHINES: dict[str, tuple[str, str, Machine, str, str]] = {
    "an old driver": (
        "driver", "broken", changed(driver="535.104.05", **NO_GPU), "download.pytorch.org/whl/cu126", "older than 580"
    ),
    "a driver too old for any build": (
        "driver", "broken", changed(driver="390.157", **NO_GPU), "", "https://www.nvidia.com/drivers"
    ),
    "torch without CUDA": ("torch", "broken", changed(cuda=None, **NO_GPU), "/whl/cu130", "built without CUDA"),
    "a driver that fails": ("GPU", "broken", changed(**NO_GPU), "nvidia-smi", "insufficient"),
    "torch that crashes": ("torch", "broken", changed(torch=CRASH, packing=None), "pip install --force", "SIGSEGV"),
    "a GPU that does not answer": (
        "GPU", "broken", changed(torch=HANG, works_without_gpu=True, packing=None), "nvidia-smi", "torch itself works"
    ),
    "a card of capability 7.0": ("GPU 0", "broken", changed(gpus=(V100,)), "/whl/cu126", "no kernels"),
    "a card later than torch": ("GPU 0", "broken", changed(gpus=(LATER,)), "--upgrade torch", "no kernels"),
    "a second card of capability 7.0": ("GPU 1", "broken", changed(gpus=(H100, V100)), "/whl/cu126", "7.0"),
    "a GPU that computes wrongly": ("products", "broken", changed(trials=failing("torch", WRONG)), "nvidia-smi", "70%"),
    "a GPU that computes no numbers": (
        "products", "broken", changed(trials=failing("torch", Trial(None, 0.02))), "nvidia-smi", "not finite"
    ),
    "a GPU that hangs": ("products", "broken", changed(trials=failing("torch", HANG)), "pip install", "no answer"),
    "hidden GPUs": ("GPU", "slower", changed(are_gpus_hidden=True, **NO_GPU), "unset CUDA_VISIBLE", "hides"),
    "a container without GPUs": (
        "GPU", "slower", changed(has_nvidia_device=False, **NO_GPU), "docker run --gpus all", "no GPU"
    ),
    "few threads": (
        "CPU",
        "slower",
        changed(driver=None, has_nvidia_device=False, torch=CPU_ONLY, threads=1),
        "unset OMP_NUM_THREADS",
        "1 of 16",
    ),
    "bitsandbytes missing": (
        "bitsandbytes",
        "broken",
        changed(packages=without("bitsandbytes"), versions={"bitsandbytes": Version(None, ">=0.49", None)}),
        "pip install",
        "quantization needs it",
    ),
    "liger-kernel missing": ("liger-kernel", "slower", changed(packages=without("liger-kernel")), "loratune[gpu]", ""),
    "liger-kernel fails": ("liger-kernel", "slower", changed(trials=failing("liger-kernel", ERROR)), "liger", "symbol"),
    "liger-kernel crashes": (
        "liger-kernel", "broken", changed(trials=failing("liger-kernel", CRASH)), "pip uninstall liger", "SIGSEGV"
    ),
    "kernels of a recurrent model missing": (
        "causal-conv1d",
        "slower",
        changed(packages=without("causal-conv1d"), packing=dataclasses.replace(GOOD.packing, recurrent_layers=3)),  # type: ignore[type-var]
        "pip install causal-conv1d",
        "recurrent",
    ),
    "rows that are padded": (
        "packed rows",
        "slower",
        changed(
            packages=without("flash-linear-attention"),
            packing=PackingFacts("sdpa", False, "rows are padded, since documents see each other", "bfloat16", 3),
        ),
        "pip install flash-linear-attention",
        "padded",
    ),
    "attention without a kernel for packed rows": (
        "attention",
        "slower",
        changed(
            packages=without("flash-attn"),
            packing=PackingFacts("sdpa: one call per document, since it fails", True, "", "bfloat16", 0),
        ),
        "pip install flash-attn",
        "one call per document",
    ),
    "attention in float32": (
        "attention",
        "slower",
        changed(packing=PackingFacts("sdpa: one call per document", True, "", "float32", 0)),
        "--model.dtype auto",
        "one call per document",
    ),
    "a model that does not fit": (
        "model", "broken", changed(packing=Failure("refused", "out of memory: 15 GB")), "quantization nf4", "15 GB"
    ),
    "a model whose kernels crash": ("model", "broken", changed(packing=CRASH), "pip uninstall flash-attn", "SIGSEGV"),
    "little memory": ("memory", "broken", changed(free_memory_bytes=10**8), "ps ", "100 MB"),
    "a hub that does not answer": ("hub", "slower", changed(hub=UNREACHABLE), "HTTPS_PROXY", "no route"),
    "a hub that hangs": ("hub", "slower", changed(hub=HANG), "HF_HUB_OFFLINE=1", "only models that are on"),
    "a hub's client that crashes": ("hub", "broken", changed(hub=CRASH), "HF_HUB_OFFLINE=1", "SIGSEGV"),
    "a token that is refused": ("token", "broken", changed(hub=REFUSED), "hf auth login", "expired"),
    "an exchange that hangs": (
        "all-reduce", "broken", changed(exchanges={"": HANG, "NCCL_P2P_DISABLE=1": RIGHT}, **TWO),
        "export NCCL_P2P_DISABLE=1", "no answer",
    ),
    "an exchange that hangs in any way": (
        "all-reduce", "broken", changed(exchanges={"": HANG, "NCCL_P2P_DISABLE=1": HANG}, **TWO), "NCCL_DEBUG", ""
    ),
    "a wrong sum": ("all-reduce", "broken", changed(exchanges={"": WRONG}, **TWO), "CUDA_VISIBLE_DEVICES=0", "wrong"),
    "small shared memory": (
        "/dev/shm", "broken", changed(shared_memory_bytes=SMALL, exchanges={"": ERROR}, **TWO), "--shm-size", "67.1 MB"
    ),
    "an older version": (
        "torch", "broken", changed(versions={"torch": Version("2.5.0", ">=2.8", None)}), "'torch>=2.8'", "needs >=2.8"
    ),
    "a missing package": ("trl", "broken", changed(versions={"trl": Version(None, ">=1.16,<2", None)}), "trl", ""),
}  # fmt: skip
for package in ("flash-attn", "flash-linear-attention", "causal-conv1d"):
    for name, how in {"crashes": CRASH, "hangs": HANG, "fails": ERROR, "is wrong": WRONG}.items():
        machine = changed(trials=failing(package, how))
        MACHINES[f"{package} {name}"] = (package, "broken", machine, f"pip uninstall {package}", "")
for place, remedy in {
    "output": "--output FOLDER",
    "model cache": "export HF_HOME",
    "row cache": "export LORATUNE_CACHE",
    "temporary files": "export TMPDIR",
}.items():
    full = Place("/full", 50_000_000, "")
    MACHINES[f"{place}: full"] = (place, "broken", changed(places=placed(place, full)), remedy, "50.0 MB")
    refused = Place("/disk", 10**12, "Disk quota exceeded")
    MACHINES[f"{place}: refused"] = (place, "broken", changed(places=placed(place, refused)), remedy, "quota")
    MACHINES[f"{place}: dead"] = (place, "broken", changed(places=placed(place, HANG)), remedy, "does not answer")


@pytest.mark.parametrize("name", MACHINES)
def test_a_fault_of_a_machine_is_found_with_its_remedy(name: str) -> None:
    about, state, machine, remedy, text = MACHINES[name]
    examination = judge(machine, None)
    found = [finding for finding in bad(examination) if finding.name == about]
    assert [finding.state for finding in found] == [state]
    assert text in found[0].text
    if remedy:
        assert any(remedy in command.line for command in found[0].remedies), found[0].remedies
    assert (examination.exit_code == Exit.OK) == (state == "slower")


def test_a_good_machine_has_no_fault() -> None:
    assert not bad(judge(changed(hub=HANG), RECIPE))  # a hub that the recipe does not need
    for machine in (GOOD, changed(exchanges={"": Trial(0, 0)}, **TWO), changed(hub=OFFLINE)):
        for recipe in (None, RECIPE):
            examination = judge(machine, recipe)
            assert not bad(examination)
            assert examination.exit_code == Exit.OK
            assert not any(finding.remedies for finding in examination.findings)


def test_one_fault_makes_one_line_unless_another_is_its_cause() -> None:
    several = {name for name, (_, _, machine, *_) in MACHINES.items() if len(bad(judge(machine, None))) != 1}
    assert several == {"small shared memory", "rows that are padded"}


@pytest.mark.parametrize(
    ("about", "machine", "recipe", "remedy", "text", "code"),
    [
        ("base", GOOD, {"files": dataclasses.replace(WHOLE, problems=("a: 5 bytes where its header declares 9",))},
         "hf download ORG/NAME --local-dir /models/base", "declares 9", Exit.MODEL),
        ("base", GOOD, {"files": dataclasses.replace(WHOLE, pointers=("model.safetensors",))}, "lfs pull", "LFS",
         Exit.MODEL),
        ("base", GOOD, {"files": Failure("refused", "no such folder")}, "--model.base MODEL", "no such folder",
         Exit.MODEL),
        ("base", GOOD, {"files": HANG}, "hf download", "no answer", Exit.MODEL),
        ("template", GOOD, {"template": Failure("refused", "no chat template")}, "hf download", "template",
         Exit.MODEL),
        ("rows", GOOD, {"rows": {"a.json": Failure("refused", "a.json: no such file")}}, "data check --config r.yaml",
         "no such", Exit.DATA),
    ],
)  # fmt: skip
def test_a_fault_of_a_recipe_s_files_is_found_with_its_remedy(
    about: str, machine: Machine, recipe: dict[str, Any], remedy: str, text: str, code: Exit
) -> None:
    examination = judge(machine, dataclasses.replace(RECIPE, **recipe))
    (found,) = bad(examination)
    assert (found.name, found.state, examination.exit_code) == (about, "broken", code)
    assert text in found.text
    assert any(remedy in command.line for command in found.remedies), found.remedies


ABSENT = BaseFacts(None, (), (), (), 0, 0)
HALF = dataclasses.replace(ABSENT, unfinished=("abc.incomplete",))
LACKING = dataclasses.replace(WHOLE, problems=("weights are missing: b.safetensors",), lacks_files=True)


@pytest.mark.parametrize(
    ("hub", "files", "about", "remedy", "code"),
    [
        (UNREACHABLE, ABSENT, "hub", "HTTPS_PROXY", Exit.IO),
        (UNREACHABLE, HALF, "hub", "--model.base FOLDER", Exit.IO),
        (UNREACHABLE, LACKING, "hub", "--model.base FOLDER", Exit.IO),
        (HANG, ABSENT, "hub", "HTTPS_PROXY", Exit.IO),
        (CRASH, ABSENT, "hub", "HTTPS_PROXY", Exit.IO),
        (OFFLINE, ABSENT, "hub", "unset HF_HUB_OFFLINE", Exit.MODEL),
        (GATED, ABSENT, "base", "hf auth login", Exit.MODEL),
        (LARGE, ABSENT, "model cache", "hf cache prune", Exit.IO),
        (REFUSED, HALF, "base", "hf download org/name", Exit.IO),
    ],
)
def test_a_base_that_is_to_be_downloaded_needs_the_hub_and_space(
    hub: HubFacts | Failure, files: BaseFacts, about: str, remedy: str, code: Exit
) -> None:
    examination = judge(changed(hub=hub), dataclasses.replace(FROM_HUB, files=files))
    found = {finding.name: finding for finding in bad(examination)}
    assert found[about].state == "broken"
    assert any(remedy in command.line for command in found[about].remedies)
    assert examination.exit_code == code
    without_size = dataclasses.replace(hub, base_bytes=None) if isinstance(hub, HubFacts) else hub
    for on_this_machine in (RECIPE, dataclasses.replace(FROM_HUB, files=WHOLE)):
        assert not bad(judge(changed(hub=without_size), on_this_machine))


@pytest.mark.parametrize("hub", [UNREACHABLE, HANG, OFFLINE])
def test_a_base_that_the_hub_cannot_mend_is_the_only_fault_where_there_is_no_hub(hub: HubFacts | Failure) -> None:
    """A quantised model, and a name that is neither a folder nor a hub id."""
    for files in (dataclasses.replace(WHOLE, problems=("quantised already",)), Failure("refused", "no such folder")):
        examination = judge(changed(hub=hub), dataclasses.replace(FROM_HUB, files=files))
        assert [finding.name for finding in bad(examination)] == ["base"]
        assert examination.exit_code == Exit.MODEL


def test_rows_that_are_to_be_downloaded_need_the_hub() -> None:
    absent = dataclasses.replace(RECIPE, rows={"hf:org/rows": False})
    assert judge(changed(hub=OFFLINE), absent).exit_code == Exit.DATA
    (found,) = bad(judge(changed(hub=UNREACHABLE), absent))
    assert (found.name, found.state) == ("hub", "broken")
    assert not any("--model.base" in command.line for command in found.remedies)
    assert not bad(judge(changed(hub=OFFLINE), dataclasses.replace(RECIPE, rows={"hf:org/rows": True})))


@pytest.mark.parametrize(("gpu", "state"), [(T4, "slower"), (H100, "fine")])
def test_a_recipe_s_type_that_the_gpu_only_emulates_is_slower(gpu: Gpu, state: str) -> None:
    examination = judge(changed(gpus=(gpu,)), dataclasses.replace(RECIPE, asks_for_bfloat16=True))
    (found,) = (finding for finding in examination.findings if finding.name == "number type")
    assert found.state == state
    assert [command.line for command in found.remedies] == (
        ["loratune sft --config r.yaml --model.dtype auto --model.compute_dtype auto"] if state == "slower" else []
    )
    assert not bad(judge(changed(gpus=(gpu,)), RECIPE))


def test_versions_other_than_the_tested_ones_are_named() -> None:
    versions = {"torch": Version("2.14.0", ">=2.8", "2.13.0"), "trl": Version("1.16.0", ">=1.16,<2", "1.16.0")}
    (found,) = (one for one in judge(changed(versions=versions), None).findings if one.name == "packages")
    assert found.state == "fine"
    assert "torch 2.14.0 (2.13.0)" in found.text
    assert "trl" not in found.text


# --- the command ---


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], None]:
    """Have the command measure a machine that there is not."""

    def put(machine: Machine) -> None:
        monkeypatch.setattr(measuring, "measure_machine", lambda *_: machine)

    return put


def test_the_page_fits_80_columns_but_for_commands(cli: Cli, on: Callable[[Machine], None]) -> None:
    on(MACHINES["an old driver"][2])
    result = cli("doctor", env={"COLUMNS": "80"})
    assert result.exit_code == Exit.IO
    lines = result.stdout.splitlines()
    commands = [line for line in lines if line.startswith(" " * 10)]
    assert any("--index-url" in line for line in commands)
    assert max(cell_len(line) for line in lines if line not in commands) <= 80
    assert lines[-1] == f"1 broken, 0 slower than could be, {sum(line.startswith('fine') for line in lines)} fine"
    assert any(line.startswith("broken  driver: 535.104.05 is older") for line in lines)


def test_json_holds_what_the_page_says(cli: Cli, on: Callable[[Machine], None]) -> None:
    on(MACHINES["a card of capability 7.0"][2])
    result = cli("doctor", "--json")
    values = json.loads(result.stdout)
    assert (result.exit_code, values["exit_code"], values["format_version"]) == (Exit.IO, Exit.IO, 1)
    found = {one["name"]: one for group in values["groups"] for one in group["findings"]}
    assert found["GPU 0"]["state"] == "broken"
    assert found["GPU 0"]["remedies"][0]["line"].startswith("pip install --force-reinstall 'torch>=2.8'")
    assert values["machine"]["torch"]["gpus"][0]["capability"] == [7, 0]
    assert values["recipe"] is None


def test_the_page_of_the_docs_names_every_field_of_the_json(cli: Cli, on: Callable[[Machine], None]) -> None:
    on(MACHINES["a container without GPUs"][2])
    values = json.loads(cli("doctor", "--json").stdout)

    def fields(value: Any, place: str) -> Iterator[str]:
        if place in ("machine", "recipe") or place.endswith(".chosen"):
            return
        for key, inner in value.items() if isinstance(value, dict) else ():
            name = f"{place}.{key}" if place else key
            yield name
            yield from fields(inner, name)
        for inner in value if isinstance(value, list) else ():
            yield from fields(inner, f"{place}[]")

    page = (Path(__file__).parent.parent / "docs" / "doctor.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w.\[\]]+)` \|", page, re.MULTILINE) == [*dict.fromkeys(fields(values, ""))]


def test_the_command_succeeds_where_something_is_only_slower(cli: Cli, on: Callable[[Machine], None]) -> None:
    on(MACHINES["liger-kernel missing"][2])
    assert cli("doctor").exit_code == Exit.OK
