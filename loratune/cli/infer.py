"""`loratune infer`: chats with an adapter, answers one prompt, or answers the rows of a file."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typing_extensions import TypedDict

from loratune import console
from loratune.cli.documents import Document
from loratune.cli.flags import Adapters, Force, Json, Model, MovedBase, asked_model, named_adapters
from loratune.cli.sampling import sampling_options
from loratune.data.formats.conversation import has_half_a_pair
from loratune.engine.sampling import Sampling
from loratune.errors import Exit, LoratuneError
from loratune.imports import importing
from loratune.printable import LONGEST_PATH, shortened

if TYPE_CHECKING:
    from loratune.engine.engine import Engine

DETAILS = """\
Base model, template, system prompt and thinking mode are read from the run folder.

--input accepts JSON, JSONL, CSV and Parquet with Alpaca rows, messages, ShareGPT, pairs, or one prompt per row; the
last answer may be missing. Rerunning the same command resumes. A row that the chat template rejects gets an error in
place of an answer, and the exit code is 3."""


class PromptAnswer(TypedDict):
    """The answer to --prompt."""

    answer: str
    reasoning: str | None
    prompt_tokens: int
    tokens: int
    """Of reasoning and answer."""
    finish: str
    """Why the answer ended: stop, length or tool_calls."""


def _printed() -> Any:
    from loratune.generation.batch.report import RowsSummary

    return PromptAnswer | RowsSummary


DOCUMENT = Document("infer", 1, _printed)
NoAdapter = Annotated[
    bool,
    typer.Option("--no-adapter", help="Use the base model alone; with --metrics: score it too, for comparison."),
]
Prompt = Annotated[
    str | None,
    typer.Option("--prompt", "-p", metavar="text", help="Answer this prompt, and print only the answer to stdout."),
]
Input = Annotated[
    str | None, typer.Option("--input", "-i", metavar="file", help="Answer every row of this file; needs --output.")
]
OutputFile = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="file", help="JSONL file for the rows with their answers.")
]
Metrics = Annotated[
    bool,
    typer.Option(
        "--metrics",
        help="Compare with the reference answers in the rows: exact match, ROUGE-L, BLEU, and their perplexity.",
    ),
]
System = Annotated[
    str | None, typer.Option("--system", metavar="text", help="System prompt; overrides the one used in training.")
]
OverwriteFile = Annotated[
    bool, typer.Option("--overwrite", help="Replace --output, and discard the partial results of a stopped run.")
]


@sampling_options
def command(
    adapter: Adapters = None,
    model: Model = None,
    base_model: MovedBase = None,
    no_adapter: NoAdapter = False,
    prompt: Prompt = None,
    input_: Input = None,
    output: OutputFile = None,
    metrics: Metrics = False,
    system: System = None,
    overwrite: OverwriteFile = False,
    force: Force = False,
    json: Json = False,
    *,
    sampling: Sampling,
) -> None:
    adapters = named_adapters(adapter or [])
    model = asked_model(bool(adapters), model, base_model)
    _check_flags(prompt, input_, output, {"--metrics": metrics, "--overwrite": overwrite}, json)
    _check_texts({"--prompt": prompt, "--input": input_, "--system": system, "--stop": list(sampling.stop)})
    if no_adapter and metrics and not adapters:
        raise LoratuneError("--no-adapter with --metrics compares with an adapter; give one with --adapter", Exit.USAGE)
    if len(adapters) > 1 and (prompt is not None or input_ is not None):
        console.warn(f"{shortened(adapters[0][0])} answers; the other adapters are only used in the chat")
        adapters = adapters[:1]
    if input_ is None or output is None:
        with closing(_load(adapters, model, force)) as engine:
            _talk(engine, sampling, prompt, system, use_adapter=not no_adapter, as_json=json)
        return
    with importing():
        from loratune.generation.batch.flow import answer_rows_of_file
        from loratune.generation.batch.report import require_all_asked
        from loratune.generation.batch.request import RowsRequest

    request = RowsRequest(
        input_, output, next(iter(adapters), None), model, no_adapter, metrics, system, sampling, overwrite, force
    )
    summary = answer_rows_of_file(request)
    if json:
        DOCUMENT.write(summary)
    require_all_asked(summary)


def _check_flags(
    prompt: str | None, input_: str | None, output: Path | None, of_files: dict[str, bool], json: bool
) -> None:
    """Raise for flags that would have no effect."""
    if prompt is not None and input_ is not None:
        raise LoratuneError("--prompt asks one question and --input a file of them; give one of the two", Exit.USAGE)
    if input_ is not None and output is None:
        raise LoratuneError("--input needs --output, a file for the answers, such as answers.jsonl", Exit.USAGE)
    given = [name for name, value in {"--output": output, **of_files}.items() if value]
    if input_ is None and given:
        raise LoratuneError(f"{given[0]} is for a file of rows; give it with --input", Exit.USAGE)
    if json and prompt is None and input_ is None:
        raise LoratuneError("--json is for --prompt and --input", Exit.USAGE)


def _check_texts(texts: dict[str, Any]) -> None:
    for name, given in texts.items():
        for text in given if isinstance(given, list) else [given]:
            if text is None:
                continue
            if not (text if name == "--stop" else text.strip()) and name != "--system":
                raise LoratuneError(f"{name} is empty", Exit.USAGE)
            if has_half_a_pair(text) and name != "--input":
                raise LoratuneError(f"{name} is not UTF-8; convert it first", Exit.USAGE)


def _load(adapters: list[tuple[str, Path]], model: str | None, force: bool) -> Engine:
    names = [str(path) for _, path in adapters] or [str(model)]
    with console.status(f"loading {', '.join(shortened(name, LONGEST_PATH) for name in names)}"):
        with importing():
            from loratune.engine.engine import load_engine

        engine = load_engine(adapters, model, force)
    for warning in engine.warnings:
        console.warn(warning)
    return engine


def _talk(
    engine: Engine,
    sampling: Sampling,
    prompt: str | None,
    system: str | None,
    *,
    use_adapter: bool,
    as_json: bool,
) -> None:
    """Answer one prompt, or open the chat."""
    adapter = next(iter(engine.adapters), None)
    if prompt is not None and as_json:
        _write_answer(engine, sampling, prompt, system, use_adapter=use_adapter)
        return
    from loratune.generation.chat.session import Chat

    chat = Chat(engine, sampling, adapter, system, use_adapter)
    if prompt is None:
        chat.run()
    else:
        chat.answer_once(prompt)


def _write_answer(engine: Engine, sampling: Sampling, prompt: str, system: str | None, *, use_adapter: bool) -> None:
    """Answer one prompt, and print the result as JSON."""
    from loratune.engine.types import GenerationRequest

    turns: list[Any] = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": prompt})
    adapter = next(iter(engine.adapters), None)
    (_, answer) = next(engine.answers([GenerationRequest(turns, sampling, adapter, use_adapter)]))
    told: PromptAnswer = {
        "answer": answer.text,
        "reasoning": answer.reasoning,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": answer.tokens,
        "finish": answer.finish,
    }
    DOCUMENT.write(told)
