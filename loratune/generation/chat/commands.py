"""The chat's commands: names, actions and completion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loratune import console
from loratune.errors import Exit, LoratuneError, counted
from loratune.generation.chat.settings import NAMES, changed, rows_of
from loratune.generation.chat.state import BASE, ChatState, Turn
from loratune.nearest import nearest

TRAINED = "default"
KEYS = [
    ("//TEXT", "a question that begins with /"),
    ("Alt+Enter", "a new line in the question; \\ at its end does the same"),
    ("Ctrl-C", "stop the answer"),
    ("Ctrl-D", "leave, like /exit"),
]


@dataclass(frozen=True)
class Asked:
    """A question that results from a command."""

    text: str
    compares: bool = False
    is_retry: bool = False
    earlier: Turn | None = None
    """The turn to restore if no new answer arrives."""


class Left(Exception):  # noqa: N818 - not an error
    """Ends the chat."""


@dataclass(frozen=True)
class Command:
    """A command that starts with /."""

    run: Callable[[ChatState, str], Asked | None]
    takes: str
    """The arguments, for help; empty if there are none."""
    help: str
    """Empty for an alias, which is not listed."""


def run_command(state: ChatState, line: str) -> Asked | None:
    """Run a command line that starts with /.

    Returns:
        A question to answer, if the command results in one.

    Raises:
        LoratuneError: the command is unknown, or failed.
        Left: the chat ends.
    """
    name, _, rest = line.partition(" ")
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        hint = f"did you mean {near}?" if near else "/help lists them"
        raise LoratuneError(f"no command {name}; {hint} (a question that begins with / is typed //…)", Exit.USAGE)
    command = COMMANDS[name]
    if rest.strip() and not command.takes:
        raise LoratuneError(f"{name} takes no argument", Exit.USAGE)
    return command.run(state, rest.strip())


def complete(state: ChatState, beginning: str) -> list[tuple[str, str]]:
    """Return possible completions of the last word, each with a short explanation."""
    name, gap, rest = beginning.partition(" ")
    if not gap:
        return [(word, one.help) for word, one in COMMANDS.items() if beginning and word.startswith(beginning)]
    if name == "/adapter":
        return [(word, "") for word in [*state.engine.adapters, BASE] if word.startswith(rest)]
    if name == "/set":
        last = rest.rpartition(" ")[2]
        return [(f"{word}=", "") for word in NAMES if word.startswith(last)]
    return []


def _tell(message: str) -> None:
    console.say(message, style="dim")


def _help(state: ChatState, rest: str) -> None:
    rows = [(f"{name} {one.takes}".strip(), one.help) for name, one in COMMANDS.items() if one.help]
    console.table([*rows, *KEYS])


def _exit(state: ChatState, rest: str) -> None:
    raise Left


def _reset(state: ChatState, rest: str) -> None:
    state.forget()
    _tell("cleared; the next question starts a new conversation")


def _undo(state: ChatState, rest: str) -> None:
    turn = state.take_back()
    if turn is None:
        raise LoratuneError("there is nothing to undo", Exit.USAGE)
    _tell(f"removed: {_begun(turn.question)}")


def _retry(state: ChatState, rest: str) -> Asked:
    question, earlier = state.unanswered, None
    if question is None:
        earlier = state.take_back()
        if earlier is None:
            raise LoratuneError("there is no question yet to answer again", Exit.USAGE)
        question = earlier.question
    _tell(f"again: {_begun(question)}")
    return Asked(question, is_retry=True, earlier=earlier)


def _system(state: ChatState, rest: str) -> None:
    if rest:
        state.check_length(rest)
        state.system = None if rest == TRAINED else rest
        state.left_out = 0
    _tell(f"system prompt: {state.system or 'the default of the training or the model'}")
    if rest and state.turns:
        _tell("the conversation continues with it; /reset starts a new one")


def _set(state: ChatState, rest: str) -> None:
    state.sampling = changed(state.sampling, rest)
    state.left_out = 0
    console.table(rows_of(state.sampling))
    if state.sampling.temperature == 0 and any(name in rest for name in ("top_", "min_p", "seed")):
        _tell("temperature 0 is greedy decoding, so top_p, top_k, min_p and seed have no effect")


def _adapter(state: ChatState, rest: str) -> None:
    names = state.engine.adapters
    if rest in names:
        state.adapter, state.use_adapter = rest, True
    elif rest == BASE:
        state.use_adapter = False
    elif rest:
        near = nearest(rest, [*names, BASE])
        hint = f"did you mean {near}?" if near else f"there are {', '.join([*names, BASE])}"
        raise LoratuneError(f"no adapter {rest!r}; {hint}", Exit.USAGE)
    rows = [*names, *([] if BASE in names else [BASE])]
    notes = {BASE: state.engine.base_name} if BASE not in names else {}
    console.table([(f"{'*' if name == state.answers_from else ' '} {name}", notes.get(name, "")) for name in rows])


def _compare(state: ChatState, rest: str) -> Asked | None:
    if state.adapter is None:
        raise LoratuneError("there is no adapter to compare the base with; start with --adapter", Exit.USAGE)
    if rest:
        return Asked(rest, compares=True)
    state.compares = not state.compares
    every = "every question is answered by base and adapter; the conversation continues with the adapter's answers"
    _tell(every if state.compares else "questions are answered by one model again")
    return None


def _save(state: ChatState, rest: str) -> None:
    _save_to(state, rest, overwrite=False)


def _save_over(state: ChatState, rest: str) -> None:
    _save_to(state, rest, overwrite=True)


def _save_to(state: ChatState, rest: str, overwrite: bool) -> None:
    if not rest:
        raise LoratuneError("/save needs the name of a file that ends in .md or .json", Exit.USAGE)
    path = Path(rest)
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise LoratuneError(f"{rest}: there is no such home folder", Exit.USAGE) from error
    state.save(path, overwrite)
    _tell(f"{counted(len(state.turns), 'turn')} saved to {path}")


def _stats(state: ChatState, rest: str) -> None:
    reply, context = state.last, state.engine.context_tokens
    if reply is None:
        raise LoratuneError("there are no statistics before the first answer", Exit.USAGE)
    speed, first = reply.tokens_per_second, reply.seconds_to_first
    used = reply.prompt_tokens + reply.tokens
    rows = [
        ("prompt", counted(reply.prompt_tokens, "token")),
        ("answer", f"{counted(reply.tokens, 'token')}, {reply.seconds:.1f} s"),
        ("first token after", "–" if first is None else f"{first:.2f} s"),
        ("speed", "–" if speed is None else f"{speed:.1f} tokens/s"),
        ("context", f"{used:,} of {context:,} tokens ({used / context:.0%})"),
        ("conversation", counted(len(state.turns), "turn") + _left_out(state)),
        ("since the start", f"{counted(state.asked, 'answer')}, {counted(state.tokens, 'token')}"),
    ]
    console.table(rows)


def _left_out(state: ChatState) -> str:
    return f", the oldest {state.left_out:,} left out of the prompt" if state.left_out else ""


def _begun(question: str, length: int = 60) -> str:
    line = " ".join(question[: 2 * length].split())
    return line if len(line) <= length and len(question) <= 2 * length else line[:length] + "…"


COMMANDS = {
    "/help": Command(_help, "", "show this help"),
    "/reset": Command(_reset, "", "clear the conversation"),
    "/undo": Command(_undo, "", "remove the last question and its answer"),
    "/retry": Command(_retry, "", "answer the last question again"),
    "/system": Command(_system, "[TEXT]", f"show or set the system prompt; {TRAINED}: the trained one"),
    "/set": Command(_set, "[NAME=VALUE …]", "show or change the sampling settings: /set temperature=0.7"),
    "/adapter": Command(_adapter, "[NAME]", f"list the adapters, or select one; {BASE}: none"),
    "/compare": Command(_compare, "[QUESTION]", "base and adapter side by side: for one question, or toggle"),
    "/save": Command(_save, "FILE", "save the conversation as .md, or as .json for training"),
    "/save!": Command(_save_over, "FILE", "the same, replacing an existing file"),
    "/stats": Command(_stats, "", "show tokens, speed and context use of the last answer"),
    "/exit": Command(_exit, "", "leave"),
    "/quit": Command(_exit, "", ""),
}
