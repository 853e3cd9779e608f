"""An engine's model as lm-evaluation-harness asks one. Imports the harness, which the extra `eval` installs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from pydantic import ValidationError

from loratune import console
from loratune.data.formats.conversation import Message
from loratune.engine.engine import Engine
from loratune.engine.sampling import SEEDS, Sampling
from loratune.engine.types import GenerationRequest
from loratune.errors import Exit, LoratuneError, counted
from loratune.evaluation.tasks.result import Generated
from loratune.progress import counted_progress

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of a task's limit of new tokens; the first that is given counts."""
SAMPLED = ("top_p", "top_k", "min_p", "repetition_penalty")
BEAMS = ("num_beams", 1)
"""One beam is what the engine does in any case."""


@dataclass(frozen=True)
class Conversation:
    """A prompt of a task that the chat template renders."""

    messages: tuple[Message, ...]
    begun: str
    """Beginning of the answer, which the task gives."""


class HarnessModel(TemplateLM):
    """A model of an engine: prompts, thinking and ends of answers are those of the adapter's training.

    The harness passes prompts as texts. A conversation is passed as its JSON and looked up again, so that the encoder
    renders it as it does for training and chat: a task's text never becomes a control token.

    Args:
        engine: the loaded model.
        adapter: name of the adapter; None for a model without any.
        use_adapter: False for the base, with the adapter's prompt settings.
        sampling: settings of answers that a task leaves open.
    """

    def __init__(self, engine: Engine, adapter: str | None, use_adapter: bool, sampling: Sampling) -> None:
        super().__init__()
        self._engine, self._adapter, self._use_adapter, self._sampling = engine, adapter, use_adapter, sampling
        self._encoder = engine.voices[adapter].encoder
        self.tokenizer: Any = self._encoder.tokenizer
        self._asked: dict[str, Conversation] = {}
        self.generated: dict[str, Generated] = {}
        """Task → what became of the answers that were generated for it."""

    @property
    def eot_token_id(self) -> int:
        """The end of a text, which precedes texts without a context."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """Identifies the template."""
        return self._encoder.template_sha256 or ""

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return nothing: the encoder knows the template."""
        return None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Note a conversation, and return the text by which the harness passes it on.

        Args:
            chat_history: messages with role and content.
            add_generation_prompt: False if the last message is the beginning of the answer.
        """
        messages: tuple[Any, ...] = tuple({"role": one["role"], "content": one["content"]} for one in chat_history)
        asked, begun = (messages, "") if add_generation_prompt else (messages[:-1], messages[-1]["content"])
        text = json.dumps({"messages": asked, "answer begins": begun}, ensure_ascii=False)
        self._asked[text] = Conversation(asked, begun)
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text without a template; nothing in it becomes a control token."""
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer(string, split_special_tokens=True, **given).input_ids
        return ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return for each context and continuation the log-likelihood in nats, and whether it is decoded greedily."""
        pairs = [self._pair(*request.args) for request in requests]
        room = self._engine.context_tokens + 1  # the last token is only predicted
        if longer := sum(len(context) + len(following) > room for context, following in pairs):
            console.warn(f"of {counted(longer, 'context')} only the end was read: the model's context is too short")
        return self._each(pairs, "continuations scored", lambda pair: self._score(*pair))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text in nats; texts longer than the context are read in windows."""
        return self._each(requests, "texts scored", lambda request: self._score_text(*request.args))

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        return [self._score(context, continuation) for _, context, continuation in requests]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the answers, without their reasoning, up to a task's stop strings.

        Raises:
            LoratuneError: a task gives the beginning of the answers, or settings that the engine does not have.
        """
        questions = [self._question(request, number) for number, request in enumerate(requests)]
        fitting = [
            number
            for number, question in enumerate(questions)
            if self._engine.prompt_tokens(question) < self._engine.context_tokens
        ]
        texts, lengths = [""] * len(requests), dict.fromkeys(fitting, False)
        with counted_progress("answers", len(fitting)) as show:
            answers = self._engine.answers(questions[number] for number in fitting)
            for count, (place, answer) in enumerate(answers, start=1):
                texts[fitting[place]], lengths[fitting[place]] = answer.text, answer.finish == "length"
                show(count, "")
        for number, request in enumerate(requests):
            before = self.generated.get(request.task_name, Generated())
            self.generated[request.task_name] = before.plus(lengths.get(number))
        return texts

    def _each(self, given: Sequence[Any], what: str, measure: Callable[[Any], Any]) -> list[Any]:
        found = []
        with counted_progress(what, len(given)) as show:
            for count, one in enumerate(given, start=1):
                found.append(measure(one))
                show(count, "")
        return found

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of a context and of what follows it."""
        asked = self._asked.get(context)
        if asked is not None:
            prompt = self._engine.prompt_ids(self._request(asked.messages))
            answer = self._encoder.answer_ids(asked.begun + continuation)[:-1]  # without the end token
            begun = self._encoder.answer_ids(asked.begun)[:-1] if asked.begun else []
            return prompt + answer[: len(begun)], answer[len(begun) :]
        if context:
            context_ids, following = self._encode_pair(context, continuation)
            return context_ids, following
        following = self.tok_encode(continuation, add_special_tokens=False)
        if following[:1] == [self.prefix_token_id]:
            return following[:1], following[1:]
        return [self.prefix_token_id], following

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Score a continuation; of a context that is too long, the beginning is left out, as the harness does."""
        if not continuation:
            return 0.0, True
        room = self._engine.context_tokens + 1 - len(continuation)  # the last token is only predicted
        if room < 1:
            raise LoratuneError(
                f"a continuation has {len(continuation):,} tokens, and the model's context has "
                f"{self._engine.context_tokens:,}",
                Exit.DATA,
            )
        return self._engine.likelihood(self._request(()), context[-room:], continuation)

    def _score_text(self, text: str) -> float:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._engine.context_tokens,
            context_len=1,
        )
        return sum(self._score(*make_disjoint_window(window))[0] for window in windows)

    def _request(self, messages: Sequence[Message] | str, sampling: Sampling | None = None) -> GenerationRequest:
        return GenerationRequest(messages, sampling or self._sampling, self._adapter, self._use_adapter)

    def _question(self, request: Any, number: int) -> GenerationRequest:
        context, settings = request.args
        asked = self._asked.get(context)
        if asked is not None and asked.begun:
            raise LoratuneError(
                f"{request.task_name}: the task begins the answers itself (gen_prefix), which the engine cannot "
                "continue; ask it without the chat template (--tasks-plain)",
                Exit.USAGE,
            )
        sampling = sampling_of(settings, self._sampling, request.task_name)
        seeded = sampling.but(seed=None if sampling.seed is None else (sampling.seed + number) % SEEDS)
        return self._request(asked.messages if asked is not None else context, seeded)


def sampling_of(settings: dict[str, Any], given: Sampling, task: str) -> Sampling:
    """Return the sampling of a task's `generation_kwargs`; what it leaves open is taken from `given`.

    Raises:
        LoratuneError: it asks for what the engine does not have, such as beams, or for values out of range.
    """
    asked = dict(settings)
    stop = asked.pop("until", None) or given.stop
    limits = [value for name in LIMITS if (value := asked.pop(name, None)) is not None]
    is_sampled, temperature = asked.pop("do_sample", None), asked.pop("temperature", None)
    if temperature is None:
        temperature = 1.0 if is_sampled else given.temperature
    values: dict[str, Any] = {
        "temperature": 0.0 if is_sampled is False else float(temperature),
        "stop": (stop,) if isinstance(stop, str) else tuple(stop),
        "max_new_tokens": int(limits[0]) if limits else given.max_new_tokens,
        "seed": given.seed,
    }
    chosen = {name: value for name in SAMPLED if (value := asked.pop(name, None)) is not None}
    defaults = {name: getattr(given, name) for name in SAMPLED}
    if unknown := sorted(
        name for name, value in asked.items() if value not in (None, False) and (name, value) != BEAMS
    ):
        raise LoratuneError(
            f"{task}: its generation_kwargs ask for {', '.join(unknown)}, which the engine does not have", Exit.USAGE
        )
    try:
        return Sampling(**defaults | chosen | values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise LoratuneError(f"{task}: its generation_kwargs are not possible: {problems}", Exit.USAGE) from error
