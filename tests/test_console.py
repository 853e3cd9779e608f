"""What the console writes itself: sizes, times, progress without a terminal, and commands for a shell."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from loratune import console, progress
from loratune.commands import Command, loratune

UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_949, "99.9 kB"), (99_960, "100 kB"), (999_499, "999 kB"),
        (999_500, "1.0 MB"), (999_600_000, "1.0 GB"), (1_000_000_000, "1.0 GB"), (24 * 10**9, "24.0 GB"),
        (999_960_000_000, "1.0 TB"), (2e15, "2000 TB"),
    ],
)  # fmt: skip
def test_a_size_has_the_largest_unit_that_leaves_a_digit(size: float, text: str) -> None:
    assert console.memory(size) == text


@given(st.integers(0, 10**15 - 10**12))
def test_a_size_is_what_it_says_to_its_last_digit_and_never_1000_of_a_unit(size: int) -> None:
    number, unit = console.memory(size).split()
    assert float(number) < 1000
    assert abs(float(number) * UNITS[unit] - size) <= (0.051 if "." in number else 0.501) * UNITS[unit]


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.2, "4.2 s"), (59.4, "59 s"), (60, "1 min"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_a_time_has_two_units_at_most(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


# --- progress without a terminal ---


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def told(clock: SimpleNamespace, counts: list[int], total: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of a progress whose count is told every half second."""
    with progress.counted_progress("answers", total, counts[0]) as show:
        for count in counts:
            show(count, "9 tokens/s")
            clock.seconds += 0.5
    return capsys.readouterr().err.splitlines()


def test_a_count_is_told_once_with_the_time_left(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(clock, [0] * 20 + [5] * 60 + [19] * 400 + [20], 20, capsys)
    assert lines == [
        "0/20 answers  9 tokens/s",
        "5/20 answers  9 tokens/s  1 min left",
        "19/20 answers  9 tokens/s  2.1 s left",
        "20/20 answers  9 tokens/s",
    ]


def test_the_time_left_is_that_of_what_was_not_kept(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(clock, [80] * 20 + [85] * 40, 100, capsys)
    assert lines == ["80/100 answers  9 tokens/s", "85/100 answers  9 tokens/s  1 min left"]


def test_what_is_begun_counts_for_the_time_left(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.counted_progress("answers", 24) as show:
        clock.seconds = 38.0
        show(1, "97 tokens/s", 22.8)
    assert capsys.readouterr().err == "1/24 answers  97 tokens/s  0.3 s left\n"


def test_no_time_left_is_told_before_there_is_as_much_as_one(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.counted_progress("answers", 80) as show:
        clock.seconds = 6.0
        show(0, "4 tokens/s", 0.02)
    assert capsys.readouterr().err == "0/80 answers  4 tokens/s\n"


def test_a_log_of_hours_has_few_lines_and_a_short_one_only_the_last(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = told(clock, list(range(20_000)), 20_000, capsys)
    assert progress.MOST_LINES / 2 < len(lines) <= progress.MOST_LINES + 1
    assert told(clock, list(range(8)), 7, capsys) == ["7/7 answers  9 tokens/s"]


@pytest.mark.parametrize("message", ["encoding [bold]a[/x] {b} {0}.json", "a\x1b[31mb"])
def test_names_are_shown_as_they_are_on_a_terminal(
    message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "stderr", Console(stderr=True, width=80, force_terminal=True, color_system=None))
    shown: list[Callable[[], AbstractContextManager[object]]] = [
        lambda: progress.row_progress(message),
        lambda: progress.byte_progress(message, 9),
        lambda: console.status(message),
        lambda: nullcontext(console.table([(message, "2 rows")])),
        lambda: nullcontext(console.bars([(message, 2)], "rows")),
    ]
    for show in shown:
        with show():
            pass
        assert message.replace("\x1b", "") in capsys.readouterr().err


# --- commands ---

ODD = ("out/faq 2", "out/it's", '{"a":\n "b"}', "a\u2028b\x85c")
WORDS = ("loratune", "eval", "--adapter", ODD[0], "--no-general", "--output", *ODD[1:])


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_a_command_in_lines_is_the_same_command_for_a_shell(columns: int) -> None:
    command = Command("", ("printf", "%s\\0", *WORDS))
    lines = console.command_lines(command, columns)
    done = subprocess.run(["sh", "-c", "\n".join(lines)[2:]], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0") == [*WORDS, ""]
    assert len(lines) > 1 or columns == 200


def test_an_indented_command_is_the_same_command_for_a_shell(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "stderr", Console(stderr=True, width=40))
    words = ("Be brief.\nBe kind.", "a" * 40, "\n\nWhy?")
    console.next_step(Command("", ("printf", "%s\\0", *words)), indent="  ")
    printed = capsys.readouterr().err
    done = subprocess.run(["sh", "-c", printed.removeprefix("  :\n")], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0") == [*words, ""]
    assert "\\\n      '\n\nWhy?'" in printed


def test_a_command_is_broken_between_flags_only_where_it_does_not_fit() -> None:
    command = loratune("merge it", "merge", {"--adapter": "out/小李", "--output": "OUT"}, {"OUT": "a folder"})
    whole = "merge it: loratune merge --adapter 'out/小李' --output OUT  (OUT: a folder)"
    assert console.command_lines(command, cell_len(whole)) == [whole]
    lines = console.command_lines(command, 50)
    assert lines == [
        *("merge it:", "  loratune merge --adapter 'out/小李' \\", "    --output OUT", "    (OUT: a folder)")
    ]
    assert max(map(cell_len, lines)) <= 50


def test_words_are_kept_whole_where_a_text_is_broken() -> None:
    text = "小李 reads " + "a-very-long-name-of-a-file " * 2
    assert console.wrapped(text, 12) == ["小李 reads", "a-very-long-name-of-a-file", "a-very-long-name-of-a-file"]


def test_lines_of_a_training_tell_at_most_one_validation_between_two_steps(capsys: pytest.CaptureFixture[str]) -> None:
    shown = progress.StepProgress(40)  # a line for every second step
    for step in range(1, 41):
        validated = step // 5 * 5 if step < 20 else step
        shown.update(step, "loss 1.0")
        shown.update(step, "loss 1.0", f"val {validated}", validated)
    lines = capsys.readouterr().err.splitlines()
    told = [int(line.rpartition(" ")[2]) for line in lines if " val " in line]
    assert [line for line in lines if " val " in line] == [f"step {step}/40  val {step}" for step in told]
    assert told[:4] == [5, 10, 15, 20]
    assert told[-1] == 40
    assert len(told) <= 20
    assert sum("loss" in line for line in lines) == 21


def test_a_path_wider_than_the_screen_is_told_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = f"/data/{'very long folder/' * 6}".replace(" ", "-")
    message = f"{path}: the file is not there; its folder has these:\n  - one file that is well below it\n\n  - 小李"
    console.error(message)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["error:", f"{path}:"]
    assert all(cell_len(line) <= 80 for line in lines[2:])
    assert " ".join(" ".join(lines).split()) == " ".join(f"error: {message}".split())
    assert lines[-3:] == ["  - one file that is well below it", "", "  - 小李"]


LONG = st.lists(st.text("ab/小 \n", max_size=30) | st.text("a/", min_size=70, max_size=90), max_size=30).map(" ".join)


@given(LONG | st.text(st.characters(codec="utf-8", categories=("L", "N", "Zs")), max_size=400))
def test_words_are_told_as_they_are_in_lines_that_fit(text: str) -> None:
    with pytest.MonkeyPatch.context() as patched, console.stderr.capture() as captured:
        patched.setenv("COLUMNS", "80")
        console.say(text)
    told = captured.get()
    assert told.split() == text.split()
    for line in told.split("\n"):
        assert cell_len(line.strip()) <= 80 or max(map(cell_len, line.split())) > 80


@pytest.mark.parametrize(("logged", "validating", "resumed"), [(1, 1, 0), (1, 3, 0), (1, 10, 20), (7, 10, 0)])
def test_lines_of_a_training_go_on_from_step_to_step_to_the_last_validation(
    logged: int, validating: int, resumed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, measured = progress.StepProgress(40), 0
    newest = (f"val {resumed}", resumed) if resumed else ("", 0)
    for step in range(resumed + 1, 41):
        if step % logged == 0 or step in (1, 40):
            measured = step
            shown.update(measured, f"loss {measured}", *newest)
        if step % validating == 0 or step == 40:
            newest = f"val {step}", step
            shown.update(measured, f"loss {measured}", *newest)
    lines = [line.split("  ") for line in capsys.readouterr().err.splitlines()]
    steps = [int(place.removeprefix("step ").removesuffix("/40")) for place, _ in lines]
    assert steps == sorted(steps)
    assert [int(figure.split()[1]) for _, figure in lines] == steps
    assert lines[-1] == ["step 40/40", "val 40"]
    told = [int(figure.removeprefix("val ")) for _, figure in lines if figure.startswith("val ")]
    assert validating < 3 or told == [*range(resumed + validating, 40, validating), 40]
