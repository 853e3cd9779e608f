"""The chat: on a pseudo-terminal, through a pipe, and its parts with an engine that says what a test wants."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_toolkit.utils import get_cwidth
from rich.console import Console
from typer.testing import Result

from loratune import console
from loratune.data.formats.chat_rows import MESSAGES
from loratune.engine.sampling import Sampling
from loratune.engine.types import Delta, GenerationRequest
from loratune.errors import Exit, LoratuneError
from loratune.generation.chat.answering import Reply
from loratune.generation.chat.columns import Column, Columns
from loratune.generation.chat.commands import complete, run_command
from loratune.generation.chat.history import MOST_ENTRIES, ChatHistory, history_path
from loratune.generation.chat.screen import LineEnds, OneAnswer
from loratune.generation.chat.session import Chat, clean
from loratune.generation.chat.settings import changed
from loratune.generation.chat.state import ChatState, Turn

NASTY = "a\x1b[31mred\x1b]0;title\x07b\r\nc\rd\x9b2Je\u202ef\tg\x00\x7f"
SEEN = "a␛[31mred␛]0;title␇b\nc␍d⟨009B⟩2Je⟨202E⟩f\tg␀␡"
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class FakeEngine:
    """Answers each question, in a thread of its own, with what a function says; a word is a token.

    Args:
        answer: question → pieces of text; a piece `!` waits until the answer is cancelled, `?text` is reasoning.
        context: in words.
    """

    base_name = "plain"

    def __init__(
        self, answer: Callable[[GenerationRequest], Any], adapters: tuple[str, ...] = (), context: int = 2048
    ) -> None:
        self.answer = answer
        self.adapters = list(adapters)
        self.context_tokens = context
        self.asked: list[GenerationRequest] = []

    def prompt_tokens(self, question: GenerationRequest) -> int:
        return sum(len(message["content"].split()) for message in question.messages)

    def submit(self, question: GenerationRequest, deliver: Callable[[Delta], None]) -> Any:
        if self.prompt_tokens(question) >= self.context_tokens:
            raise LoratuneError("the prompt is too long", Exit.USAGE)
        self.asked.append(question)
        cancelled = threading.Event()

        def work() -> None:
            tokens, finish = 0, "stop"
            for piece in self.answer(question):
                if piece == "!":
                    cancelled.wait(60)
                if cancelled.is_set():
                    finish = "cancelled"
                    break
                tokens += 1
                deliver(Delta(piece if piece[0] != "?" else "", piece[1:] if piece[0] == "?" else "", tokens))
            deliver(Delta(tokens=tokens, finish=finish))

        threading.Thread(target=work, daemon=True).start()
        return SimpleNamespace(prompt_tokens=self.prompt_tokens(question), cancel=cancelled.set)


def last_words(question: GenerationRequest) -> list[str]:
    """An answer that tells who answers what."""
    who = (question.adapter if question.use_adapter else None) or "plain"
    return [f"{who}", f" on {question.messages[-1]['content']}"]


def a_state(answer: Callable[[GenerationRequest], Any] = last_words, **options: Any) -> ChatState:
    engine: Any = FakeEngine(answer, ("robin", "wren"), options.pop("context", 2048))
    return ChatState(engine, Sampling(**options), "robin", None)


def say(chat: Chat, *lines: str) -> None:
    """Have lines answered as if they had come through a pipe."""
    for line in lines:
        chat._answer_if_asked(chat._asked(line))


def a_chat(answer: Callable[[GenerationRequest], Any] = last_words, **options: Any) -> tuple[Chat, FakeEngine]:
    engine = FakeEngine(answer, options.pop("adapters", ("robin", "wren")), options.pop("context", 2048))
    any_engine: Any = engine
    return Chat(any_engine, Sampling(**options), next(iter(engine.adapters), None)), engine


# What a model says cannot steer the terminal.


def shown(pieces: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    screen = OneAnswer(is_terminal=False)
    for piece in pieces:
        screen.show(0, Delta(piece))
    screen.close()
    return capsys.readouterr().out


def test_control_characters_are_shown_wherever_the_stream_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    for cut in range(len(NASTY)):
        assert shown([NASTY[:cut], NASTY[cut:]], capsys) == SEEN + "\n"
    assert shown(list(NASTY), capsys) == SEEN + "\n"


def test_control_characters_are_shown_in_columns_too(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Columns(("base\x1b[2J", "tuned"), 120)
    for character in NASTY:
        screen.show(0, Delta(character, character))
        screen.show(1, Delta(character))
    screen.close()
    out = capsys.readouterr().out
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out)
    assert "␛[31mred␛]0;title␇b" in out
    assert "base␛[2J" in out


@given(st.text(alphabet="a\r\n", max_size=12), st.data())
def test_line_ends_are_the_same_however_a_stream_is_cut(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    ends = LineEnds()
    parts = [ends.feed(text[start:end]) for start, end in itertools.pairwise([0, *cuts, len(text)])]
    assert "".join(parts) + ends.rest() == text.replace("\r\n", "\n")


@settings(max_examples=200)
@given(st.text(alphabet="ab 中文é\n", max_size=80), st.integers(4, 20), st.data())
def test_a_column_loses_nothing_and_stays_in_its_width(text: str, width: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(text)))
    column, whole = Column(width), Column(width)
    column.feed(text[:cut], "plain")
    column.feed(text[cut:], "plain")
    column.end()
    whole.feed(text, "plain")
    whole.end()
    assert all(get_cwidth(line) <= width for line, _ in column.lines)
    assert "".join(line for line, _ in column.lines).replace(" ", "") == re.sub(r"[ \n]", "", text)
    assert column.lines == whole.lines


def test_words_stay_whole_where_they_fit() -> None:
    column = Column(10)
    column.feed("one two three fourteen-and-more 中文字符很长很长", "plain")
    column.end()
    assert [line for line, _ in column.lines] == ["one two", "three", "fourteen-a", "nd-more 中", "文字符很长", "很长"]


def test_reasoning_stands_before_the_answer_and_not_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    for is_terminal, expected in [(True, "let me see\n\nfour\n"), (False, "four\n")]:
        screen = OneAnswer(is_terminal)
        for piece in [Delta(reasoning="let me "), Delta(reasoning="see"), Delta("four")]:
            screen.show(0, piece)
        screen.close()
        assert capsys.readouterr().out == expected


# Comparing.


def test_both_answers_grow_together_and_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    both = threading.Barrier(2, timeout=120)

    def answer(question: GenerationRequest) -> Iterator[str]:
        both.wait()  # breaks unless both questions are on their way
        yield "the same long words " * 3 + ("from robin" if question.use_adapter else "from the base")

    chat, engine = a_chat(answer)
    say(chat, "/compare Who?")
    assert capsys.readouterr().out.splitlines()[:3] == [
        "plain (base)",
        "the same long words " * 3 + "from the base",
        "",
    ]
    assert [(one.adapter, one.use_adapter) for one in engine.asked] == [("robin", False), ("robin", True)]
    assert chat.state.turns[-1].reply.text.endswith("from robin")
    assert not chat.state.compares

    screen = Columns(("plain (base)", "robin"), 80)
    screen.show(0, Delta("the same long words " * 3 + "from the base", finish="stop"))
    assert capsys.readouterr().out.count("\n") == 2  # the other side has nothing yet
    screen.show(1, Delta("short", finish="stop"))
    screen.close()
    rows = [line.split(" │ ") for line in capsys.readouterr().out.splitlines()]
    assert [row[0].rstrip() for row in rows] == [
        "the same long words the same long",
        "words the same long words from the base"[:37].rsplit(" ", 1)[0],
        "base",
    ]
    assert [row[1] for row in rows] == ["short", "", ""]


def test_a_narrow_terminal_gets_one_answer_below_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Columns(("plain (base)", "robin"), 40)
    screen.show(1, Delta("second", finish="stop"))
    screen.show(0, Delta("first", finish="stop"))
    screen.close()
    assert capsys.readouterr().out == "plain (base)\nfirst\n\nrobin\nsecond\n"


def test_without_an_adapter_there_is_nothing_to_compare() -> None:
    chat, _ = a_chat(adapters=())
    with pytest.raises(LoratuneError, match="--adapter"):
        say(chat, "/compare")


# Commands.


def test_the_conversation_is_told_and_undo_takes_the_last_turn_back() -> None:
    chat, engine = a_chat()
    say(chat, "one", "two", "/undo", "three", "/system Be brief.", "//path", "/reset", "four")
    told = [[message["content"] for message in one.messages] for one in engine.asked]
    assert told == [
        ["one"],
        ["one", "robin on one", "two"],
        ["one", "robin on one", "three"],
        ["Be brief.", "one", "robin on one", "three", "robin on three", "/path"],
        ["Be brief.", "four"],
    ]
    say(chat, "/undo", "/system default")
    assert chat.state.turns == []
    assert chat.state.system is None
    with pytest.raises(LoratuneError, match="nothing to undo"):
        say(chat, "/undo")


def test_retry_asks_the_same_with_another_seed_and_replaces_the_answer() -> None:
    answers = iter(["first", "second", "third"])
    chat, engine = a_chat(lambda _: [next(answers)], temperature=1.0, seed=2**32 - 1)
    say(chat, "one", "/retry", "/retry")
    assert [one.messages for one in engine.asked] == [engine.asked[0].messages] * 3
    assert [one.sampling.seed for one in engine.asked] == [2**32 - 1, 0, 1]
    assert [turn.reply.text for turn in chat.state.turns] == ["third"]


def test_a_retry_without_an_answer_leaves_the_earlier_one() -> None:
    answers: Iterator[list[str]] = iter([["first"], []])
    chat, _ = a_chat(lambda _: next(answers))
    say(chat, "one", "/retry")
    assert [turn.reply.text for turn in chat.state.turns] == ["first"]


def test_a_question_without_an_answer_is_not_told_again_but_can_be_retried() -> None:
    answers: Iterator[list[str]] = iter([[], ["there"]])
    chat, engine = a_chat(lambda _: next(answers))
    say(chat, "one")
    assert chat.state.turns == []
    say(chat, "/retry")
    assert [one.messages for one in engine.asked] == [[{"role": "user", "content": "one"}]] * 2
    assert [turn.question for turn in chat.state.turns] == ["one"]


def test_an_adapter_is_chosen_by_name_and_base_leaves_it_off() -> None:
    chat, engine = a_chat()
    say(chat, "a", "/adapter wren", "b", "/adapter base", "c", "/adapter robin", "d")
    assert [(one.adapter, one.use_adapter) for one in engine.asked] == [
        ("robin", True), ("wren", True), ("wren", False), ("robin", True),
    ]  # fmt: skip
    with pytest.raises(LoratuneError, match="did you mean wren"):
        say(chat, "/adapter wrn")


def test_an_adapter_that_is_called_base_can_be_chosen() -> None:
    chat, engine = a_chat(adapters=("robin", "base"))
    say(chat, "/adapter base", "a")
    assert (engine.asked[0].adapter, engine.asked[0].use_adapter) == ("base", True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/rety", "did you mean /retry"),
        ("/xyzzy", "/help"),
        ("/etc/hosts says?", "//"),
        ("/reset now", "takes no argument"),
        ("/retry", "no question"),
        ("/stats", "first answer"),
        ("/save", ".md or .json"),
        ("/set temprature=1", "did you mean temperature"),
        ("/set temperature", "temperature=value"),
        ("/set temperature=hot", "from 0 to 5"),
        ("/set temperature=nan", "from 0 to 5"),
        ("/set temperature=default", "from 0 to 5"),
        ("/set top_p=-0.1", "from 0 to 1, or default"),
        ("/set max_new_tokens=1.5", "an integer from 1 to 1,048,576"),
        ("/set stop='", "name=value"),
        ("/system " + "long " * 9000, "shorten"),
    ],
)
def test_a_wrong_command_says_what_would_be_right(line: str, words: str) -> None:
    with pytest.raises(LoratuneError, match=re.escape(words)):
        run_command(a_state(), line)


def test_set_changes_several_at_once_and_default_hands_back_to_the_model() -> None:
    new = changed(Sampling(top_p=0.5), 'temperature=0.2 top-p=default seed=7 stop="Human: " stop=\\n\\n')
    assert new == Sampling(temperature=0.2, top_p=None, seed=7, stop=("Human: ", "\n\n"))
    assert changed(new, "stop= seed=default") == Sampling(temperature=0.2)


def test_commands_adapters_and_settings_complete() -> None:
    state = a_state()
    assert [word for word, _ in complete(state, "/re")] == ["/reset", "/retry"]
    assert [word for word, _ in complete(state, "/adapter ")] == ["robin", "wren", "base"]
    assert [word for word, _ in complete(state, "/set temperature=1 top")] == ["top_p=", "top_k="]
    assert complete(state, "") == complete(state, "hello") == complete(state, "/undo ") == []


def test_stats_tell_tokens_speed_and_context(capsys: pytest.CaptureFixture[str]) -> None:
    chat, _ = a_chat(lambda _: ["one ", "two ", "three"], context=100)
    say(chat, "four words of question", "/stats")
    told = " ".join(capsys.readouterr().err.split())
    assert "prompt 4 tokens answer 3 tokens" in told
    assert "7 of 100 tokens (7%)" in told
    reply = Reply(tokens=11, seconds=3.0, seconds_to_first=1.0)
    assert reply.tokens_per_second == 5.0


# Long conversations.


def test_the_oldest_turns_are_left_out_with_a_word_and_saved_all_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chat, engine = a_chat(lambda _: ["word " * 9, "end"], context=100, max_new_tokens=40)
    for number in range(12):
        say(chat, f"question {number}")
        assert engine.prompt_tokens(engine.asked[-1]) <= 60
        assert engine.asked[-1].messages[0]["role"] == "user"
    # Five turns of twelve words would be the whole room already.
    assert engine.asked[-1].messages[0]["content"] == "question 7"
    told = " ".join(capsys.readouterr().err.split())
    assert "the prompt leaves out the oldest 1 turn " in told
    assert "the prompt leaves out the oldest 7 turns" in told
    say(chat, f"/save {tmp_path / 'all.json'}")
    assert len(json.loads((tmp_path / "all.json").read_text())[0]["messages"]) == 24


def test_a_question_longer_than_the_context_is_refused_and_forgets_nothing() -> None:
    chat, _ = a_chat(context=100)
    say(chat, "one")
    with pytest.raises(LoratuneError, match="too long"):
        say(chat, "word " * 120)
    with pytest.raises(LoratuneError, match=r"a text of 5,000,000 characters .* 100 tokens"):
        say(chat, "x" * 5_000_000)
    assert [turn.question for turn in chat.state.turns] == ["one"]


# Saving.


def a_conversation() -> ChatState:
    state = a_state()
    state.system = "Be brief."
    state.turns = [Turn("Who?", Reply("I am\x1b[31m Robin.\x9b", reasoning="hm\n\nyes")), Turn("And?", Reply("行。"))]
    return state


def test_reasoning_of_earlier_answers_goes_to_the_template_as_rows_give_it() -> None:
    earlier = a_conversation().question("So?").messages[1:-1]
    assert [message["content"] for message in earlier] == [
        "Who?", "<think>\nhm\n\nyes\n</think>\n\nI am\x1b[31m Robin.\x9b", "And?", "行。"
    ]  # fmt: skip


def test_a_saved_conversation_is_a_row_that_can_be_trained_on(tmp_path: Path) -> None:
    run_command(a_conversation(), f"/save {tmp_path / 'a.json'}")
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    (row,) = json.loads(text)
    assert MESSAGES.problems(row) == []
    assert MESSAGES.messages(row) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "<think>\nhm\n\nyes\n</think>\n\nI am\x1b[31m Robin.\x9b"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "行。"},
    ]


def test_a_conversation_is_saved_to_be_read(tmp_path: Path) -> None:
    run_command(a_conversation(), f"/save {tmp_path / 'a b.md'}")
    assert (tmp_path / "a b.md").read_text(encoding="utf-8") == (
        "**System**\n\nBe brief.\n\n**Question**\n\nWho?\n\n> hm\n>\n> yes\n\n**Answer**\n\nI am␛[31m Robin.⟨009B⟩\n\n"
        "**Question**\n\nAnd?\n\n**Answer**\n\n行。\n"
    )


def test_save_replaces_a_file_only_when_told_to(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("mine")
    with pytest.raises(LoratuneError, match=r"/save! .*a\.md replaces it"):
        run_command(a_conversation(), f"/save {path}")
    assert path.read_text() == "mine"
    run_command(a_conversation(), f"/save! {path}")
    assert "Robin" in path.read_text()


@pytest.mark.parametrize(
    "name", ["missing/a.md", "a.txt", "a", "file.md/a.md", "~nobody-of-this-name/a.md", "x" * 300 + ".md"]
)
def test_save_says_what_keeps_it_from_writing(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.md").write_text("")
    path = name if name.startswith("~") else tmp_path / name
    with pytest.raises(LoratuneError):
        run_command(a_conversation(), f"/save {path}")
    assert [one.name for one in tmp_path.iterdir()] == ["file.md"]


# What was typed in earlier chats.


def test_history_goes_from_one_chat_to_the_next_for_the_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "loratune" / "chat_history"
    first = ChatHistory(path)
    for entry in ["one", "two\nlines \x1b中\udce4"]:
        first.append_string(entry)
    path.chmod(0o644)
    assert list(ChatHistory(path).load_history_strings()) == ["two\nlines \x1b中\udce4", "one"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_history_stays_bounded_and_survives_damage(tmp_path: Path) -> None:
    path = tmp_path / "chat_history"
    lines = [json.dumps(f"entry {number}") for number in range(3 * MOST_ENTRIES)]
    path.write_bytes("\n".join([*lines, '"half', "[1]", "\udcff"]).encode(errors="surrogateescape") + b"\n")
    history = ChatHistory(path)
    assert next(iter(history.load_history_strings())) == f"entry {3 * MOST_ENTRIES - 1}"
    assert path.read_bytes().count(b"\n") == MOST_ENTRIES
    assert path.stat().st_mode & 0o777 == 0o600
    history.append_string("x" * 1_000_000)
    assert path.stat().st_size < 100_000
    path.write_bytes(b'"' + b"x" * 5_000_000 + b'"\n"last"\n')
    assert list(ChatHistory(path).load_history_strings()) == ["last"]
    assert path.stat().st_size < 5_000_000


@pytest.mark.parametrize("kind", ["folder", "pipe", "below a file"])
def test_a_history_that_cannot_be_kept_is_said_and_done_without(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "chat_history"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("")
        path /= "chat_history"
    history = ChatHistory(path)
    history.append_string("one")
    assert "not kept" in " ".join(capsys.readouterr().err.split())
    assert history.get_strings() == ["one"]


def test_history_lies_where_the_system_keeps_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert history_path() == Path("/var/state/loratune/chat_history")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert history_path() == tmp_path / ".local/state/loratune/chat_history"


# A pipe.


def test_piped_lines_are_a_conversation(cli: Callable[..., Result]) -> None:
    lines = "\ufeffWho are you?\n\n/system Be brief.\n/reset\n/nonsense\nWhat is 2+3?\n/exit\nnever asked\n"
    result = cli("infer", "--model", "tiny-qwen", input=lines)
    assert result.exit_code == 0, result.stderr
    answers = result.stdout.splitlines()
    assert len(answers) == 2
    assert "tiny-qwen" in answers[0]
    assert "5" in answers[1]
    assert "no command /nonsense" in result.stderr


@pytest.mark.parametrize(
    ("lines", "code", "words"),
    [
        (b"hello\n\xff\xfe\n", Exit.DATA, "line 2: not UTF-8"),
        (b"x" * 1_000_000 + b"\n", Exit.USAGE, "longer than the model's context"),
        (b"word " * 3_000 + b"\n", Exit.USAGE, "too long"),
    ],
)
def test_a_piped_line_that_cannot_be_asked_ends_the_chat(
    lines: bytes, code: Exit, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    chat, _ = a_chat()
    with pytest.raises(LoratuneError, match=words) as caught:
        chat.run()
    assert caught.value.exit_code == code


def test_what_no_encoding_can_write_never_reaches_the_model() -> None:
    assert clean("a\ud83d\ude00b") == "a😀b"
    assert clean("a\udce4\ud800b") == "a��b"
    chat, engine = a_chat()
    say(chat, "a\udce4")
    engine.asked[0].messages[0]["content"].encode()


# A terminal.


class Terminal:
    """A chat on a pseudo-terminal of 80 columns, in a process of its own."""

    def __init__(self, pid: int, master: int) -> None:
        self.pid = pid
        self.master = master
        self.seen = ""
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 80, 0, 0))

    def expect(self, text: str, seconds: float = 120) -> str:
        """Read until `text` has come since the last expectation; what came before it."""
        end = time.monotonic() + seconds
        while text not in ANSI.sub("", self.seen):
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} did not come; seen: {self.seen[-500:]!r}"
            self.seen += os.read(self.master, 65536).decode(errors="replace")
        before, _, self.seen = ANSI.sub("", self.seen).partition(text)
        return before

    def send(self, text: str) -> None:
        """Type; a long text in parts, while what the program writes is read."""
        data = text.encode()
        while data:
            readable, writable, _ = select.select([self.master], [self.master], [], 60)
            assert readable or writable, "the program takes no input"
            if readable:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
            if writable:
                data = data[os.write(self.master, data[:1024]) :]

    def status(self) -> int:
        """The program's exit status, once it has ended; negative where a signal has ended it."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            self._drain()
        raise AssertionError(f"the program has not ended; seen: {self.seen[-500:]!r}")

    def _drain(self) -> None:
        ready, _, _ = select.select([self.master], [], [], 0.05)
        try:
            self.seen += os.read(self.master, 65536).decode(errors="replace") if ready else ""
        except OSError as error:
            if error.errno != errno.EIO:  # the other side is closed
                raise

    def close(self) -> None:
        if self.pid:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.master)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Callable[[], int]], Terminal]]:
    """Start a function in a forked process on a pseudo-terminal."""
    opened: list[Terminal] = []
    monkeypatch.delenv("COLUMNS")  # the terminal says how wide it is
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def start(program: Callable[[], int]) -> Terminal:
        pid, master = pty.fork()
        if pid == 0:
            code = 70
            try:
                sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
                # What rich has found out about the test's own stderr does not hold here.
                console.stderr = Console(stderr=True, highlight=False)
                sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
                code = program()
            finally:
                os._exit(code)
        opened.append(Terminal(pid, master))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def faked(answer: Callable[[GenerationRequest], Any], **options: Any) -> Callable[[], int]:
    """A chat with an engine that says what a test wants; /stats shows what reached it."""

    def program() -> int:
        chat, _ = a_chat(answer, **options)
        chat.run()
        return 0

    return program


def told(question: GenerationRequest) -> list[str]:
    """An answer that repeats the whole conversation, each message by its last 40 letters."""
    return ["told: " + "|".join(message["content"][-40:] for message in question.messages).replace("\n", "/") + "."]


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(terminal: Callable[..., Terminal]) -> None:
    def answer(question: GenerationRequest) -> list[str]:
        asked = question.messages[-1]["content"]
        return {"endless": ["half an ", "answer", "!"], "silent": ["!"]}.get(asked, told(question))

    chat = terminal(faked(answer))
    chat.expect("robin >")
    chat.send("\r  \r")  # empty lines ask nothing
    chat.send("\x03")
    chat.expect("Ctrl-D or /exit leaves")
    chat.send("endless\r")
    chat.expect("half an answer")
    chat.send("\x03")
    chat.expect("[stopped; the partial answer is kept]")
    chat.send("silent\r")
    chat.expect("reading the question")
    chat.send("\x03")
    chat.expect("the question is not kept")
    chat.send("and?\r")
    chat.expect("told: endless|half an answer|and?.")
    chat.expect("robin >")
    chat.send("\x04")
    assert chat.status() == 0
    modes = termios.tcgetattr(chat.master)[3]
    assert modes & termios.ECHO
    assert modes & termios.ICANON


def test_questions_of_several_lines_and_history_over_two_chats(terminal: Callable[..., Terminal]) -> None:
    chat = terminal(faked(told))
    chat.expect("robin >")
    chat.send("one\\\rtwo\x1b\rthree")
    chat.send("\x1b[200~ four\r\nfive\x1b[201~\r")
    chat.expect("told: one/two/three four/five.")
    chat.expect("robin >")
    chat.send("/rese\t\r")
    chat.expect("cleared")
    chat.expect("robin >")
    chat.send("/exit\r")
    assert chat.status() == 0

    again = terminal(faked(told))
    again.expect("robin >")
    again.send("\x1b[A\x1b[A\x1b[A\r")  # up, over /exit and /reset
    again.expect("told: one/two/three four/five.")


def test_a_megabyte_pasted_neither_hangs_the_line_nor_reaches_the_model(terminal: Callable[..., Terminal]) -> None:
    chat = terminal(faked(told, context=1000))
    chat.expect("robin >")
    chat.send("\x1b[200~" + "word\n" * 200_000 + "\x1b[201~")
    chat.expect("not pasted: a text of 1,000,000 characters")
    chat.send("short\r")
    chat.expect("told: short.")


def test_a_terminal_that_does_not_mark_pastes_is_quick_too(terminal: Callable[..., Terminal]) -> None:
    chat = terminal(faked(told, context=4_000))
    chat.expect("robin >")
    chat.send("word " * 3_000 + "so?")
    chat.expect("[paste 1: ")
    chat.send(" now\r")
    chat.expect("word word so? now.")
    chat.send("word " * 20_000)
    chat.expect("not pasted: a text of 6")
    time.sleep(1.1)
    chat.send("\x15short\r")  # without the last letters, too few to be taken for a paste
    assert "not pasted" not in chat.expect("|short.")


def test_pastes_behind_each_other_grow_into_one_and_others_stay_apart(terminal: Callable[..., Terminal]) -> None:
    def paste(text: str) -> str:
        return f"\x1b[200~{text}\x1b[201~"

    chat = terminal(faked(lambda question: ["told: " + question.messages[-1]["content"].replace("a" * 1500, "A")]))
    chat.expect("robin >")
    chat.send(paste("a" * 1500) + paste("b" + "a" * 1500) + " c " + paste("a" * 1500) + "\r")
    assert "[paste 1: 3,001 characters, 1 line] c aaa" in chat.expect("told: AbA c A")
    chat.send("\x1b[A " + paste("a" * 3000) + "\r")  # the line before, and one more
    chat.expect("told: AbA c A AA")


def test_a_long_paste_stands_as_one_word_and_is_sent_whole(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    chat = terminal(faked(told, context=200_000))
    chat.expect("robin >")
    chat.send("see \x1b[200~" + "word\n" * 100_000 + "end\x1b[201~ so?\r")
    before = chat.expect("told: rd/word/word/word/word/word/word/end so?.")
    assert "[paste 1: 500,003 characters, 100,001 lines]" in before
    assert "word" not in before
    chat.send("/exit\r")
    assert chat.status() == 0
    assert "paste" not in (tmp_path / "state/loratune/chat_history").read_text()


def test_what_is_pasted_while_an_answer_appears_is_one_question_after_it(terminal: Callable[..., Terminal]) -> None:
    def slow(question: GenerationRequest) -> Iterator[str]:
        yield "begun "
        if question.messages[-1]["content"] == "first":
            time.sleep(1)
        yield from told(question)

    chat = terminal(faked(slow))
    chat.expect("robin >")
    chat.send("first\r")
    chat.expect("begun")
    chat.send("\x1b[200~sec\nond\x1b[201~\r")
    assert "sec" not in chat.expect("told: first.")
    chat.expect("|sec/ond.")


def test_escapes_of_the_model_reach_the_terminal_as_signs(terminal: Callable[..., Terminal]) -> None:
    chat = terminal(faked(lambda question: [*list("\x1b]0;owned\x07\x9b2J"), "?\x1b[5mthought", "!"]))
    chat.expect("robin >")
    chat.send("go\r")
    chat.expect("␛]0;owned␇⟨009B⟩2J")
    chat.expect("␛[5mthought")
    assert "\x1b]0;" not in chat.seen
    assert "\x1b[5m" not in chat.seen


def test_a_failing_answer_is_one_message_and_the_chat_goes_on(terminal: Callable[..., Terminal]) -> None:
    chat = terminal(faked(told, context=50))
    chat.expect("robin >")
    chat.send("word " * 60 + "\r")
    chat.expect("error: the prompt is too long")
    chat.send("short\r")
    chat.expect("told: short.")
    chat.expect("robin >")
    chat.send("\x04")
    assert chat.status() == 0


@pytest.mark.slow
def test_the_whole_program_on_a_terminal(terminal: Callable[..., Terminal], random_qwen: Path, tmp_path: Path) -> None:
    endless = shutil.copytree(random_qwen, tmp_path / "endless")  # random weights say the same token for ever
    config = json.loads((endless / "config.json").read_text()) | {"max_position_embeddings": 32768}
    (endless / "config.json").write_text(json.dumps(config))
    words = [sys.executable, "-m", "loratune", "infer", "--model", str(endless), "--max-new-tokens", "16000"]
    chat = terminal(lambda: os.execv(sys.executable, words))
    chat.expect("lists the commands")
    chat.expect(">")
    chat.send("Tell me everything\r")
    chat.expect("everything")
    time.sleep(2)
    chat.send("\x03")  # Ctrl-C ends the answer, not the program
    chat.expect("[stopped")
    chat.expect(">")
    chat.send("/stats\r")
    chat.expect("tokens/s")
    chat.expect(">")
    chat.send("\x04")  # Ctrl-D
    assert chat.status() == 0
