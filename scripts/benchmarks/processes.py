"""Measures wall time and memory of whole processes."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def measure(command: list[str], output: Path | None = None) -> tuple[float, float, float]:
    """Run a command; return wall seconds, and the peaks of resident and anonymous bytes of its largest process.

    Args:
        command: program and arguments.
        output: file for its output.
    """
    with output.open("w+b") if output else tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log)
        resident = anonymous = 0.0
        while process.poll() is None:
            for pid in descendants(process.pid):
                found_resident, found_anonymous = memory_of(pid)
                resident, anonymous = max(resident, found_resident), max(anonymous, found_anonymous)
            time.sleep(0.02)
        wall = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            sys.exit(f"{shlex.join(command)} failed:\n{log.read().decode(errors='replace')[-4000:]}")
    return wall, resident, anonymous


def printed_figures(program: Path, *settings: object) -> dict[str, Any]:
    """Return the figures that a program prints as JSON after the word FIGURES, and its resident memory."""
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "output"
        _, resident, _ = measure([sys.executable, str(program), *map(str, settings)], log)
        line = next(line for line in log.read_text().splitlines() if line.startswith("FIGURES"))
    found: dict[str, Any] = json.loads(line.removeprefix("FIGURES"))
    return found | {"resident": resident}


def descendants(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    found = [pid]
    for place in found:
        try:
            text = Path(f"/proc/{place}/task/{place}/children").read_text()
        except OSError:
            continue
        found += [int(child) for child in text.split()]
    return found


def memory_of(pid: int) -> tuple[float, float]:
    """Return the resident and anonymous bytes of a process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    return sizes.get("VmRSS", 0), sizes.get("RssAnon", 0)
