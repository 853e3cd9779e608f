"""`loratune infer`: chat with an adapter, or get one answer."""

from __future__ import annotations

from typing import Annotated

import typer

from loratune import console
from loratune.cli.flags import Adapter, Force
from loratune.errors import Exit, LoratuneError

DETAILS = """\
The run folder knows the base model, the template, the system prompt and the thinking mode of its training; nothing of
it has to be said again."""


def command(
    adapter: Adapter = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="model", help="A model without adapter; with --adapter: where its base lies now."
        ),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Leave the adapter off, to compare.")] = False,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="text", help="Print the answer to this, and nothing else, to stdout."),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="text", help="System prompt, in place of the trained one.")
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", "-t", metavar="number", min=0, max=5, help="0 takes the likeliest token every time."
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p", metavar="number", min=0.01, max=1, help="Draw from the tokens that make up this probability."
        ),
    ] = 1.0,
    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", metavar="integer", min=1, max=1_048_576, help="Longest answer, in tokens."),
    ] = 512,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="integer", min=0, max=2**32 - 1, help="Makes sampling repeatable.")
    ] = None,
    force: Force = False,
) -> None:
    """Load the model once, then answer the prompt or open the chat."""
    if adapter is None and model is None:
        raise LoratuneError("give a run folder with --adapter, or a model with --model", Exit.USAGE)
    if prompt is not None and not prompt.strip():
        raise LoratuneError("--prompt is empty", Exit.USAGE)
    warnings: list[str] = []
    with console.status(f"loading {adapter or model}"):
        from loratune.generation.chat import Chat
        from loratune.generation.engine import Sampling, load_engine

        engine = load_engine(adapter, model, use_adapter=not base, warnings=warnings, force=force)
    for warning in warnings:
        console.warn(warning)
    sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)
    chat = Chat(engine, sampling, system)
    if prompt is None:
        chat.run()
    else:
        chat.answer_once(prompt)
