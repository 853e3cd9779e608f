"""Load test of `loratune serve` with clients that disconnect: errors, answers, memory; and 8 clients against one."""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.processes import descendants, memory_of
from loratune.errors import counted

QUESTIONS = ["Who are you?", "Who made you?", "Say hello.", "What can you do?", "Tell me about rivers.", "你是谁？"]
QUESTIONS += [f"What is {a}+{b}?" for a, b in ((2, 3), (4, 4), (7, 1), (10, 5), (6, 9), (8, 3))]
TEXTS = ["Once upon a time", "The river", "def main():", "从前", "1 2 3 4", "Dear all,"]
HEADERS = {"Content-Type": "application/json"}
MOST_GROWTH = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.add_argument("--model", default="tiny-qwen")
    parser.add_argument("--adapter", action="append", default=[], help="as for loratune serve")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument(
        "--leaving", type=float, default=0.3, help="share of requests whose client leaves before the end"
    )
    parser.add_argument("--slots", type=int, default=24)
    parser.add_argument("--max-queue", type=int, default=20)
    parser.add_argument(
        "--rate-seconds", type=float, default=20, help="seconds per measurement of throughput; 0 skips it"
    )
    parser.add_argument("--json", type=Path, help="file for all figures")


@dataclass
class Storm:
    """Results of the load test."""

    expected: dict[int, str]
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)
    """Resident bytes, sampled once per second."""

    @property
    def growth(self) -> float:
        """Growth of resident memory from the second quarter to the last, by medians."""
        quarter = max(1, len(self.resident) // 4)
        early, late = self.resident[quarter : 2 * quarter] or self.resident, self.resident[-quarter:]
        return statistics.median(late) / statistics.median(early) - 1

    def watch(self, pid: int, work: Callable[[], None]) -> None:
        """Sample the memory of a server and its children while a function runs."""
        working = threading.Thread(target=work)
        working.start()
        while working.is_alive():
            self.resident.append(sum(memory_of(one)[0] for one in descendants(pid)))
            working.join(1)


def run(arguments: argparse.Namespace) -> None:
    """Measure throughput, then run the load test; exit with 1 if a result is wrong."""
    with server(arguments) as (port, pid):
        requests = all_requests(port)
        expected = {number: answer(port, body)[0] for number, body in enumerate(requests)}
        rates = {}
        if arguments.rate_seconds:
            rates = {clients: throughput(port, pid, clients, arguments.rate_seconds) for clients in (1, 8)}
        storm = let_loose(port, pid, requests, expected, arguments)
        left = running_answers(port)
    figures = {
        "tokens_per_second": rates, "outcomes": dict(storm.outcomes), "wrong": storm.wrong[:20], "still_running": left,
        "resident": storm.resident, "growth": storm.growth,
    }  # fmt: skip
    for clients, rate in rates.items():
        wall, processor = rate
        print(f"{counted(clients, 'client')}: {wall:.0f} tokens/s, {processor:.0f} per second of processor time")
    print(", ".join(f"{name}: {count}" for name, count in sorted(storm.outcomes.items())))
    print(f"memory: {storm.resident[-1] / 1e6:.0f} MB, {storm.growth:+.1%}; answers still running: {left}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))
    known = {"right", "left", "429"}
    if storm.wrong or set(storm.outcomes) - known or storm.growth > MOST_GROWTH or left:
        sys.exit("\n".join(["not as it should be", *storm.wrong[:20]]))


@contextmanager
def server(arguments: argparse.Namespace, more: Sequence[str] = ()) -> Iterator[tuple[int, int]]:
    """Start `loratune serve`, with more flags if given, and yield its port and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [
        sys.executable,
        "-m",
        "loratune",
        "serve",
        "--model",
        arguments.model,
        "--port",
        str(port),
        "--no-api-key",
    ]
    command += ["--slots", str(arguments.slots), "--max-queue", str(arguments.max_queue)]
    command += [part for adapter in arguments.adapter for part in ("--adapter", adapter)] + list(more)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while not is_up(port):
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(log.read().decode())
                time.sleep(0.2)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait()


def is_up(port: int) -> bool:
    try:
        return send(port, "GET", "/health")[0] == 200
    except OSError:
        return False


def send(port: int, method: str, path: str, body: Any = None) -> tuple[int, str]:
    """Return status and text of a response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None, HEADERS)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def all_requests(port: int) -> list[dict[str, Any]]:
    """Return request bodies: every question to every model, and texts to continue."""
    models = [model["id"] for model in json.loads(send(port, "GET", "/v1/models")[1])["data"]]
    chats = [
        {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 40}
        for model in models
        for question in QUESTIONS
    ]
    return chats + [{"model": models[0], "prompt": text, "max_tokens": 10 + 8 * n} for n, text in enumerate(TEXTS)]


def path_of(body: dict[str, Any]) -> str:
    """Return the endpoint of a request."""
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


def answer(port: int, body: dict[str, Any]) -> tuple[str, int]:
    """Return the complete answer and its number of tokens."""
    status, text = send(port, "POST", path_of(body), body)
    if status != 200:
        raise RuntimeError(f"{status}: {text}")
    whole = json.loads(text)
    choice = whole["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"], whole["usage"]["completion_tokens"]


def throughput(port: int, pid: int, clients: int, seconds: float) -> tuple[float, float]:
    """Return tokens per second, and per second of CPU time, of clients that send requests continuously."""
    model = json.loads(send(port, "GET", "/v1/models")[1])["data"][0]["id"]
    counts = [0] * clients
    begin, used = time.monotonic(), processor_seconds(pid)

    def work(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < begin + seconds:
            body = {"model": model, "prompt": chance.choice(TEXTS), "max_tokens": chance.randrange(32, 64)}
            counts[number] += answer(port, body)[1]

    in_threads(clients, work)
    return sum(counts) / (time.monotonic() - begin), sum(counts) / (processor_seconds(pid) - used)


def processor_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run a function in several threads."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def let_loose(
    port: int, pid: int, requests: list[dict[str, Any]], expected: dict[int, str], arguments: argparse.Namespace
) -> Storm:
    """Run clients that send requests, stream, and disconnect at random."""
    storm = Storm(expected)
    end = time.monotonic() + arguments.seconds

    def work(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < end:
            number = chance.randrange(len(requests))
            try:
                outcome = ask(port, requests[number], expected[number], chance, arguments.leaving)
            except (OSError, ValueError, http.client.HTTPException) as error:
                outcome = f"{type(error).__name__}"
                storm.wrong.append(f"{requests[number]}: {error!r}")
            if outcome.startswith("wrong"):
                storm.wrong.append(f"{requests[number]}: {outcome}")
                outcome = "wrong"
            storm.outcomes[outcome] += 1
            if outcome == "429":
                time.sleep(chance.random())

    storm.watch(pid, lambda: in_threads(arguments.clients, work))
    return storm


def ask(port: int, body: dict[str, Any], expected: str, chance: random.Random, leaving: float) -> str:
    """Send one request, possibly streamed or aborted: return right, left, 429, or wrong with the difference."""
    streams, stays = chance.random() < 0.6, chance.random() >= leaving
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", path_of(body), json.dumps(body | {"stream": streams}), HEADERS)
        if not stays:
            time.sleep(chance.random() * 0.5)
            if streams and chance.random() < 0.5:
                connection.getresponse().read(chance.randrange(1, 2000))
            return "left"
        response = connection.getresponse()
        text = response.read().decode()
        if response.status != 200:
            return str(response.status)
        said = streamed_text(text) if streams else whole_text(text)
        return "right" if said == expected else f"wrong: {said!r} instead of {expected!r}"
    finally:
        connection.close()


def whole_text(text: str) -> str:
    choice = json.loads(text)["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def streamed_text(text: str) -> str:
    *parts, last = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if last != "[DONE]":
        return f"a stream without end: {last}"
    choices = [choice for part in parts for choice in json.loads(part)["choices"]]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)


def running_answers(port: int) -> float:
    """Return the number of running requests a moment after the last client has left."""
    left = 0.0
    for _ in range(100):
        text = send(port, "GET", "/metrics")[1]
        left = sum(float(number) for number in re.findall(r"^loratune_(?:running|waiting) (\S+)", text, re.MULTILINE))
        if not left:
            break
        time.sleep(0.1)
    return left
