"""Runs checks one after the other, each in a process of its own, and keeps their results in a file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import descendants

from gpu_checks.table import Check, Workplace

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "gpu_checks."
OK, FAIL, SKIPPED = "ok", "FAIL", "skipped"
LAST_LETTERS = 200


@dataclass(frozen=True)
class Result:
    """How a check ended."""

    status: str
    """ok, FAIL or skipped."""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    missed: tuple[str, ...] = ()
    """The bounds that do not hold, each beside its figure."""
    reason: str = ""
    """Why it was skipped, or has no figures."""


def run_checks(
    checks: Sequence[Check], place: Workplace, machine: dict[str, Any], json_file: Path, patience: float = 1.0
) -> int:
    """Run checks, print a line for each as it ends, and add the results to a file.

    Args:
        checks: what to run, in this order.
        place: where.
        machine: what to record of the machine; results of another one are dropped from the file.
        json_file: results so far, and from now on.
        patience: factor of all time limits.

    Returns:
        The exit code: 1 if a check has failed.
    """
    results = _earlier(json_file, machine)
    failed = 0
    for check in checks:
        result = run_check(check, place, patience)
        failed += result.status == FAIL
        print(line_of(check, result, place.is_gpu), flush=True)
        results[check.name] = asdict(result)
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"machine": machine, "checks": results}, indent=2, ensure_ascii=False) + "\n")
    return min(failed, 1)


def run_check(check: Check, place: Workplace, patience: float = 1.0) -> Result:
    """Run one check, and judge its figures."""
    if check.needs_gpu and not place.is_gpu:
        return Result(SKIPPED, reason="needs a GPU")
    log, answer = (place.folder / f"{check.name}.{ending}" for ending in ("log", "json"))
    answer.unlink(missing_ok=True)
    start, limit = time.perf_counter(), check.seconds * patience
    function = check.function if "." in check.function else PACKAGE + check.function
    kind = "gpu" if place.is_gpu else "cpu"
    command = [sys.executable, "-m", "gpu_checks.child", function, kind, str(place.folder), str(answer)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=_environment(place), cwd=place.folder)
        try:
            process.wait(limit)
            fault = f"its process ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            fault = f"not done after {limit:g} s"
        finally:
            _end(process)
    seconds = round(time.perf_counter() - start, 1)
    if not answer.is_file():
        return Result(FAIL, seconds, reason=f"{fault}; {_last_words(log)}")
    return _judged(check, place, json.loads(answer.read_text()), seconds)


def line_of(check: Check, result: Result, is_gpu: bool) -> str:
    """Return name, figures beside their bounds (missed ones first), and how it ended."""
    told = [bound.told(result.figures) for bound in check.bounds if bound.is_required(is_gpu)] if result.figures else []
    told = [*result.missed, *(one for one in told if one not in result.missed)]
    told += [result.reason] if result.reason and result.status == FAIL else []
    end = f"{result.status} ({result.reason})" if result.status == SKIPPED else result.status
    seconds = f"{result.seconds:.0f} s" if result.seconds else ""
    return f"{check.name:<15} {seconds:>6}  {', '.join(told)}  {end}"


def _judged(check: Check, place: Workplace, answer: dict[str, Any], seconds: float) -> Result:
    if "error" in answer:
        return Result(FAIL, seconds, reason=answer["error"])
    figures = answer["figures"]
    bounds = [bound for bound in check.bounds if bound.is_required(place.is_gpu)]
    missed = tuple(bound.told(figures) for bound in bounds if not bound.holds(figures))
    return Result(FAIL if missed else OK, seconds, figures, missed)


def _earlier(json_file: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """Return the results in a file, if they are of this machine."""
    with suppress(OSError, ValueError, KeyError):
        found = json.loads(json_file.read_text(encoding="utf-8"))
        return dict(found["checks"]) if found["machine"] == machine else {}
    return {}


def _environment(place: Workplace) -> dict[str, str]:
    """Nothing may ask a hub, and the user's cache stays as it is."""
    paths = [str(REPOSITORY / "scripts"), str(REPOSITORY), os.environ.get("PYTHONPATH", ""), str(REPOSITORY / "tests")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "LORATUNE_CACHE": str(place.folder / "cache")}
    return os.environ | own | {"HF_HUB_OFFLINE": "1", "COLUMNS": "20000"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a check's process and all that it has started, if it still runs."""
    if process.poll() is None:
        for pid in reversed(descendants(process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][-LAST_LETTERS:] if lines else "no output"
