"""Counts launches, waits and copies of a piece of work, and how long the GPU was busy with it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu_checks import machine

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Calls that return when the GPU is done; copies to or from pageable memory end with the first."""
TO_GPU = "Memcpy HtoD"


class StepProfile:
    """Profiles from `start` to `stop`; the wait that ends it does not count."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}
        self._profiler: Any = None
        self._start = 0.0

    @property
    def is_running(self) -> bool:
        return self._profiler is not None

    def start(self) -> None:
        machine.synchronize()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profiler = profile(activities=activities)
        self._profiler.start()
        self._start = time.perf_counter()

    def stop(self) -> None:
        host = time.perf_counter() - self._start
        is_gpu = torch.cuda.is_available()
        machine.synchronize()
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self.figures = summary(profiler.events(), own_waits=int(is_gpu)) | {"host ms": 1000 * host}
        if is_gpu and not self.figures["launches"]:
            raise RuntimeError("the profiler has seen no launch, so its counts mean nothing")


def summary(events: Iterable[Any], own_waits: int) -> dict[str, Any]:
    """Count what profiled events are.

    Args:
        events: torch's FunctionEvents.
        own_waits: waits of the measurement itself.

    Returns:
        launches, waits, copies to the GPU, and the share of the time that the GPU was busy, from its first kernel to
        the end of its last one.
    """
    names: Counter[str] = Counter()
    spans = []
    for event in events:
        if event.device_type == DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end))
            names[TO_GPU] += event.name.startswith(TO_GPU)
        else:
            names[event.name] += 1
    return {
        "launches": sum(names[name] for name in LAUNCHES),
        "waits": sum(names[name] for name in WAITS) - own_waits,
        "copies": names[TO_GPU],
        "GPU busy": busy_share(spans),
    }


def busy_share(spans: list[tuple[float, float]]) -> float:
    """Return the share of the time from the first start to the last end that at least one span covers."""
    if not spans:
        return 0.0
    covered, reached = 0.0, min(start for start, _ in spans)
    first = reached
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered / (reached - first)
