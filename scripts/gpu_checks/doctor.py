"""Has `loratune doctor` examine a machine that is in order, and the same machine with a package that crashes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gpu_checks.commands import LORATUNE, run
from gpu_checks.table import Figures, Workplace

SECONDS = 240
CRASHING = "causal-conv1d"


def doctor(place: Workplace) -> Figures:
    """Return how much is broken, and how many trials have computed.

    Packages that this machine does not have are not tried. The all-reduce needs several GPUs; here NCCL adds up over
    one.
    """
    from loratune.doctor.facts import Trial
    from loratune.doctor.isolated import measured

    found = examined()
    trials = found["machine"]["trials"]
    summed = measured(Trial, "exchange", {"count": 1}, SECONDS)
    (place.folder / "crashing").mkdir(exist_ok=True)
    planted = examined(PYTHONPATH=os.pathsep.join([str(_plant(place.folder / "crashing")), *_python_path()]))
    return {
        "broken": len(_in_state(found, "broken")), "not fine": _in_state(found, "broken") | _in_state(found, "slower"),
        "trials that compute": sum(trial.get("has_computed", False) for trial in trials.values()), "trials": trials,
        "packing": found["machine"]["packing"], "wrong sums": summed.difference if isinstance(summed, Trial) else 1,
        "crashes found": sum("SIGSEGV" in text for text in _in_state(planted, "broken").values()),
        "broken beside the crash": len(_in_state(planted, "broken")) - 1,
    }  # fmt: skip


def examined(**environment: str) -> dict[str, Any]:
    """Return what the command says of this machine, which has no network."""
    done = run([*LORATUNE, "doctor", "--json"], SECONDS, HF_HUB_OFFLINE="1", **environment)
    try:
        values: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        raise RuntimeError(f"doctor ended with {done.exit_code}: {done.last_words}") from error
    return values


def _plant(folder: Path) -> Path:
    """Put a package that crashes when it is imported, in the place of one that may be installed, into a folder."""
    package = folder / CRASHING.replace("-", "_")
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text("import os\nos.kill(os.getpid(), 11)\n")
    described = folder / f"{package.name}-9.9.dist-info"
    described.mkdir(exist_ok=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {CRASHING}\nVersion: 9.9\n")
    return folder


def _python_path() -> list[str]:
    path = os.environ.get("PYTHONPATH")
    return [path] if path else []


def _in_state(found: dict[str, Any], state: str) -> dict[str, str]:
    findings = (finding for group in found["groups"] for finding in group["findings"])
    return {finding["name"]: finding["text"] for finding in findings if finding["state"] == state}
