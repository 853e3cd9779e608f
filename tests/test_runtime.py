"""Whether a process is the main one, and how signals are taken over and given back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratune.errors import Exit
from loratune.model.hardware import detect_hardware
from loratune.runtime import ENDING, REPEATED_SECONDS, is_main_process, signals_to


@pytest.mark.parametrize(
    ("rank", "copies", "is_main"),
    [
        (None, None, True), ("0", "2", True), ("1", "2", False), ("7", "8", False), ("0", "1", True),
        ("abc", None, True), ("abc", "2", True), ("", "", True), ("3", None, True), ("-1", "2", True), ("2", "2", True),
        ("\u00b2", "4", True),
    ],
)  # fmt: skip
def test_only_a_numbered_copy_is_not_the_main_process(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, copies: str | None, is_main: bool
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for name, value in {"RANK": rank, "WORLD_SIZE": copies}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert is_main_process() is is_main
    monkeypatch.delenv("MASTER_ADDR")
    assert is_main_process(), "without a launcher they are left over"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'"),
        ({"WORLD_SIZE": "0", "MASTER_ADDR": "127.0.0.1"}, "WORLD_SIZE is '0'"),
        ({"LOCAL_RANK": "x", "MASTER_ADDR": "127.0.0.1"}, "LOCAL_RANK is 'x'"),
        ({"LOCAL_RANK": "7"}, "MASTER_ADDR is not"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR is not"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, None),
        ({"LORATUNE_LAUNCHER": "abc"}, "LORATUNE_LAUNCHER is 'abc'"),
        ({"LORATUNE_LAUNCHER": "99999999"}, "LORATUNE_LAUNCHER is '99999999'"),  # more than Linux gives to a process
    ],
)
def test_what_a_launcher_has_left_over_is_named_by_sft_and_ignored_by_others(
    cli: Callable[..., Any],
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    words: str | None,
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert detect_hardware().processes == 1
    flags = ["--data.train", rows_file, "--training.max_steps", "1", "--evaluation.questions_share", "0"]
    done = cli("sft", "--model.base", "tiny-qwen", "--output", tmp_path / "run", *flags)
    if words is None:
        assert done.exit_code == 0, done.stderr
        return
    assert done.exit_code == Exit.USAGE
    assert words in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()


LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("settings", "is_heard"), [({"RANK": "abc"}, True), ({"RANK": "1", "WORLD_SIZE": "2"}, True), (LAUNCHED, False)]
)
def test_a_foreign_rank_silences_nothing(settings: dict[str, str], is_heard: bool) -> None:
    code = "from loratune import console; console.say('told'); console.write_result('result')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True, check=True
    )
    assert (done.stderr.strip(), done.stdout.strip()) == (("told", "result") if is_heard else ("", ""))


def test_signals_come_to_the_handler_and_are_given_back() -> None:
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in ENDING}

    def work() -> None:
        with signals_to(lambda number, _: came.append(number)):
            for number in ENDING:
                signal.raise_signal(number)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        work()
    assert came == list(ENDING)
    assert {number: signal.getsignal(number) for number in ENDING} == before


def test_sigterm_counts_once_within_a_moment_and_other_signals_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = 100.0
    monkeypatch.setattr("loratune.runtime.time.monotonic", lambda: moment)
    came: list[int] = []
    with signals_to(lambda number, _: came.append(number)):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            signal.raise_signal(number)
        moment += REPEATED_SECONDS
        signal.raise_signal(signal.SIGTERM)
    assert came == [signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGTERM]


def test_an_ignored_signal_stays_ignored_and_others_are_left_alone() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    untouched = signal.getsignal(signal.SIGTERM)
    try:
        with signals_to(lambda *_: None, [signal.SIGHUP, signal.SIGINT]):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is untouched
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_nothing_is_taken_over() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with signals_to(lambda *_: None):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
