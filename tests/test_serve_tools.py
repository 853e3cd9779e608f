"""Tools in `loratune serve`, as OpenAI's own client meets them, and in the rows of `loratune infer --input`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from serving import API_KEY, FakeEngine, FakeHandle, chat, events, served
from tool_templates import SPECIAL, TEMPLATES, WEATHER, call_of, tool_base, tool_encoder
from typer.testing import CliRunner, Result

from loratune.cli.app import app
from loratune.data.encoding.encoder import Encoder
from loratune.engine.request_handle import make_handle
from loratune.engine.sequence import RunningSequence
from loratune.engine.types import GREEDY, Delta, GenerationRequest
from loratune.errors import Exit

ASKED: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]
ROME = '{"name": "get_weather", "arguments": {"city": "Rome", "where": {"in": ["Zürich", null]}}}'
ROME_CALL = ("get_weather", {"city": "Rome", "where": {"in": ["Zürich", None]}})
ANSWERS = {
    "hermes": f"<tool_call>\n{ROME}\n</tool_call>",
    "coder": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n"
        '<parameter=where>\n{"in": ["Zürich", null]}\n</parameter>\n</function>\n</tool_call>'
    ),
    "mistral": f"{SPECIAL} [{ROME}]",
    "llama": ROME.replace("arguments", "parameters"),
}
TWICE = {
    "hermes": f"{ANSWERS['hermes']}\n{ANSWERS['hermes']}",
    "coder": f"{ANSWERS['coder']}\n{ANSWERS['coder']}",
    "mistral": f"{SPECIAL} [{ROME}, {ROME}]",
}


@dataclass
class ScriptedEngine(FakeEngine):
    """Says one answer, token by token, to whatever the template renders."""

    template: str = "hermes"
    answer: str = ""
    prompts: tuple[str, ...] = ()

    @property
    def encoder(self) -> Encoder:
        return tool_encoder(self.template)

    def submit(self, question: GenerationRequest, deliver: Callable[[Delta], None]) -> FakeHandle:
        assert not isinstance(question.messages, str)
        prompt = self.encoder.prompt_ids(question.messages, question.tools)
        self.prompts = (*self.prompts, self.encoder.tokenizer.decode(prompt))
        self.questions.append(question)
        handle = make_handle(question, RunningSequence(prompt, GREEDY, frozenset()), self.encoder, deliver)
        ids = self.encoder.tokenizer(self.answer, add_special_tokens=False).input_ids

        def say() -> None:
            piece = Delta()
            for token in ids:
                handle.running.tokens.append(token)
                piece = handle.push(token)
                if handle.is_stopped:
                    break
                deliver(piece)
                piece = Delta()
            deliver(handle.finish(piece, "stop", None))

        threading.Thread(target=say, daemon=True).start()
        return FakeHandle(len(prompt))


@pytest.fixture
def asked() -> Iterator[Callable[..., tuple[OpenAI, ScriptedEngine]]]:
    """A client of a server that says an answer to prompts of a template."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(template: str, answer: str = "") -> tuple[OpenAI, ScriptedEngine]:
            engine = ScriptedEngine(template=template, answer=answer)
            running = stack.enter_context(served(engine))
            url = f"{running.url}/v1"
            return stack.enter_context(OpenAI(base_url=url, api_key=API_KEY, max_retries=0)), engine

        yield start


Asked = Callable[..., tuple[OpenAI, ScriptedEngine]]


def called(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def streamed(client: OpenAI, **fields: Any) -> tuple[str, list[tuple[str, Any]], list[str | None]]:
    """Content, calls put together as clients do it, and how the events say that the answer ended."""
    content, calls, finish = "", dict[int, list[str]](), list[str | None]()
    for chunk in client.chat.completions.create(model="base", messages=ASKED, stream=True, **fields):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        finish.append(choice.finish_reason)
        for part in choice.delta.tool_calls or []:
            if part.index not in calls:
                assert (part.type, part.function.name) == ("function", part.function.name)
                assert part.id
                calls[part.index] = [part.function.name, ""]
            calls[part.index][1] += part.function.arguments or ""
    assert list(calls) == list(range(len(calls)))
    return content, [(name, json.loads(arguments)) for name, arguments in calls.values()], finish


# --- calls ---


@pytest.mark.parametrize("template", TEMPLATES)
def test_calls_come_in_openai_s_form_whole_and_in_a_stream(asked: Asked, template: str) -> None:
    client, engine = asked(template, ANSWERS[template])
    answer = client.chat.completions.create(model="base", messages=ASKED, tools=[WEATHER])
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert called(choice.message) == [ROME_CALL]
    assert choice.message.tool_calls[0].type == "function"
    content, calls, finish = streamed(client, tools=[WEATHER])
    assert (content, calls) == ("", [ROME_CALL])
    assert finish == [None] * (len(finish) - 1) + ["tool_calls"]
    assert json.dumps(WEATHER, ensure_ascii=False) in engine.prompts[0]  # keys in the request's order


@pytest.mark.parametrize("template", TWICE)
def test_several_calls_come_unless_one_at_a_time_is_wanted(asked: Asked, template: str) -> None:
    client, _ = asked(template, TWICE[template])
    assert streamed(client, tools=[WEATHER])[:2] == ("", [ROME_CALL, ROME_CALL])
    whole = client.chat.completions.create(model="base", messages=ASKED, tools=[WEATHER], parallel_tool_calls=True)
    assert called(whole.choices[0].message) == [ROME_CALL, ROME_CALL]
    ids = [call.id for call in whole.choices[0].message.tool_calls]
    assert len(set(ids)) == 2
    assert all(len(id_) == 9 and id_.isalnum() for id_ in ids)  # Mistral's templates take no others
    one = client.chat.completions.create(model="base", messages=ASKED, tools=[WEATHER], parallel_tool_calls=False)
    assert called(one.choices[0].message) == [ROME_CALL]
    assert one.choices[0].finish_reason == "tool_calls"
    assert streamed(client, tools=[WEATHER], parallel_tool_calls=False)[1] == [ROME_CALL]


@pytest.mark.parametrize("template", ["hermes", "coder", "mistral"])
def test_text_before_a_call_is_content(asked: Asked, template: str) -> None:
    client, _ = asked(template, f"Let me see.\n{ANSWERS[template]}")
    message = client.chat.completions.create(model="base", messages=ASKED, tools=[WEATHER]).choices[0].message
    assert (message.content, called(message)) == ("Let me see.", [ROME_CALL])
    assert streamed(client, tools=[WEATHER])[:2] == ("Let me see.", [ROME_CALL])


def test_reasoning_stays_apart_and_calls_in_it_are_none(asked: Asked) -> None:
    client, _ = asked("hermes", f"<think>\nI could {ANSWERS['hermes']}\n</think>\n\n{ANSWERS['hermes']}")
    message = client.chat.completions.create(model="base", messages=ASKED, tools=[WEATHER]).choices[0].message
    assert called(message) == [ROME_CALL]
    assert message.content is None
    assert message.reasoning_content == f"I could {ANSWERS['hermes']}\n"


@pytest.mark.parametrize(
    ("template", "answer", "content"),
    [
        ("hermes", "It is sunny.", "It is sunny."),
        ("hermes", "<tool_call>get_weather</tool_call>", "<tool_call>get_weather</tool_call>"),
        ("hermes", ANSWERS["hermes"][:-5], ANSWERS["hermes"][:-5]),
        ("mistral", ANSWERS["mistral"][:-1], ANSWERS["mistral"][len(SPECIAL) : -1]),
        ("llama", '{"name": "Ada", "parameters": {}}', '{"name": "Ada", "parameters": {}}'),
    ],
)
def test_what_is_no_call_stays_text(asked: Asked, template: str, answer: str, content: str) -> None:
    client, _ = asked(template, answer)
    choice = client.chat.completions.create(model="base", messages=ASKED, tools=[WEATHER]).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (content, None, "stop")
    assert streamed(client, tools=[WEATHER])[:2] == (content, [])


def test_an_unknown_name_is_told_as_the_model_has_written_it(asked: Asked) -> None:
    client, _ = asked("hermes", '<tool_call>{"name": "get_wether", "arguments": {}}</tool_call>')
    message = client.chat.completions.create(model="base", messages=ASKED, tools=[WEATHER]).choices[0].message
    assert called(message) == [("get_wether", {})]


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": [WEATHER], "tool_choice": "none"}])
def test_without_tools_nothing_is_called_and_none_are_offered(asked: Asked, fields: dict[str, Any]) -> None:
    client, engine = asked("hermes", ANSWERS["hermes"])
    choice = client.chat.completions.create(model="base", messages=ASKED, **fields).choices[0]
    assert (choice.message.content, choice.finish_reason) == (ANSWERS["hermes"], "stop")
    assert "get_weather" not in engine.prompts[0]


def test_calls_are_counted_as_a_way_to_end() -> None:
    engine = ScriptedEngine(template="hermes", answer=ANSWERS["hermes"])
    with served(engine) as running:
        running.request(body=chat(tools=[WEATHER]))
        running.request(body=chat(tools=[WEATHER], stream=True))
        assert 'loratune_answers_total{finish="tool_calls",model="base"} 2.0' in running.request("/metrics")[2]


# --- what has been said before ---

CALLED = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}


def test_results_go_to_the_template_in_the_order_of_their_calls(asked: Asked) -> None:
    client, engine = asked("hermes", "17 in Rome.")
    oslo = {**CALLED, "id": "b", "function": {**CALLED["function"], "arguments": '{"city": "Oslo"}'}}
    history: list[Any] = [
        *ASKED,
        {"role": "assistant", "tool_calls": [CALLED, oslo]},
        {"role": "tool", "tool_call_id": "b", "content": "3 degrees"},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "17 degrees"}]},
    ]
    answer = client.chat.completions.create(model="base", messages=history, tools=[WEATHER])
    assert answer.choices[0].message.content == "17 in Rome."
    as_rows = [
        *ASKED,
        {"role": "assistant", "content": "", "tool_calls": [call_of(city="Rome"), call_of(city="Oslo")]},
        {"role": "tool", "content": "17 degrees"},
        {"role": "tool", "content": "3 degrees"},
    ]
    expected = engine.encoder.tokenizer.apply_chat_template(
        as_rows, [WEATHER], tokenize=False, add_generation_prompt=True
    )
    assert engine.prompts[0] == expected


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_that_calls_can_be_sent_back_as_it_came(asked: Asked, template: str) -> None:
    client, engine = asked(template, ANSWERS[template])
    first = client.chat.completions.create(model="base", messages=ASKED, tools=[WEATHER]).choices[0].message
    for said in (first, first.model_dump(), first.model_dump(exclude_none=True)):
        result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "17 degrees"}
        client.chat.completions.create(model="base", messages=[*ASKED, said, result], tools=[WEATHER])  # type: ignore[list-item]
        assert "17 degrees" in engine.prompts[-1]
        assert '["Zürich", null]' in engine.prompts[-1]


def test_what_the_model_thought_before_it_called_is_given_to_the_template(asked: Asked) -> None:
    client, engine = asked("hermes", "So it is.")
    calling = {"role": "assistant", "content": None, "reasoning_content": "I must look.", "tool_calls": [CALLED]}
    result = {"role": "tool", "tool_call_id": "a", "content": "17"}
    client.chat.completions.create(model="base", messages=[*ASKED, calling, result], tools=[WEATHER])
    assert "<think>\nI must look.\n</think>" in engine.prompts[0]


def test_what_the_model_thought_in_earlier_answers_is_given_to_the_template(asked: Asked) -> None:
    client, engine = asked("hermes", "So it is.")
    earlier = {"role": "assistant", "content": "Rain.", "reasoning_content": "I must look.\n"}
    client.chat.completions.create(model="base", messages=[*ASKED, earlier, *ASKED])
    assert "<think>\nI must look.\n</think>\n\nRain." in engine.prompts[0]


# --- what is refused ---

BROKEN = CALLED | {"function": {"name": "f", "arguments": "[1"}}


TOO_DEEP = CALLED | {"function": {"name": "f", "arguments": '{"x": ' + "[" * 940 + "]" * 940 + "}"}}


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def offered(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tool_choice": "required", "tools": [WEATHER]}, "tool_choice", "cannot be forced"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}, "tools": [WEATHER]},
            "tool_choice",
            "cannot be forced",
        ),
        ({"tool_choice": "sometimes", "tools": [WEATHER]}, "tool_choice", ""),
        ({"tools": [offered(strict=True)]}, "tools.0.function.strict", "validate"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", ""),
        ({"tools": [offered(name="")]}, "tools.0.function.name", ""),
        ({"tools": [offered(parameters=[])]}, "tools.0.function.parameters", ""),
        ({"tools": [offered(now=1)]}, "tools.0.function.now", ""),
        ({"tools": [WEATHER] * 129}, "tools", ""),
        ({"tools": [offered(parameters={"<|im_end|>": 1})]}, "tools", "control token"),
        ({"tools": [offered(parameters={"x": nested(800)})]}, "tools", "nested more than 100 levels deep"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [TOO_DEEP]}, *ASKED]},
            "messages.0",
            "nested more than 100 levels deep",
        ),
        ({"functions": [{"name": "f"}]}, "functions", "not supported"),
        ({"messages": [{"role": "assistant", "tool_calls": [BROKEN]}, *ASKED]}, "messages.0", "the JSON text of one"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}, *ASKED]},
         "messages.0.tool_calls.0.function", ""),
        ({"messages": [{"role": "assistant"}, *ASKED]}, "messages.0.content", ""),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", ""),
        ({"messages": [*ASKED, {"role": "tool", "content": "17"}]}, "messages.1.tool_call_id", ""),
        ({"messages": [*ASKED, {"role": "assistant", "tool_calls": [CALLED]}]}, "messages", "the last one must be"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(
    asked: Asked, fields: dict[str, Any], param: str, words: str
) -> None:
    client, engine = asked("hermes", "yes")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="base", **{"messages": ASKED, **fields})
    assert (refused.value.param, param in refused.value.message or param == "tools") == (param, True)
    assert words in refused.value.message
    assert engine.questions == []


@pytest.mark.parametrize(
    "schema", [None, 3, [], {"type": 3}, {"type": [{"a": 1}, []]}, {"type": {"a": 1}}, {"anyOf": [3]}]
)
@pytest.mark.parametrize("template", TEMPLATES)
def test_an_odd_schema_of_an_argument_does_not_hinder_the_answer(asked: Asked, template: str, schema: Any) -> None:
    client, _ = asked(template, ANSWERS[template])
    odd: Any = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": schema}}}
    done = client.chat.completions.create(model="base", messages=ASKED, tools=[{"type": "function", "function": odd}])
    assert called(done.choices[0].message) == [ROME_CALL]


def test_tools_that_the_template_drops_are_refused_by_name(asked: Asked) -> None:
    client, _ = asked(TEMPLATES["hermes"].replace("tool | tojson", "''"), "yes")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="base", messages=ASKED, tools=[WEATHER])
    assert refused.value.param == "tools"
    assert "does not support tools" in refused.value.message


def test_the_shape_of_a_stream_is_openai_s() -> None:
    engine = ScriptedEngine(template="hermes", answer=f"So: {ANSWERS['hermes']}")
    with served(engine) as running:
        *parts, done = events(running.request(body=chat(tools=[WEATHER], stream=True))[2])
    assert done == "[DONE]"
    choices = [part["choices"][0] for part in parts]
    heads = [choice["delta"]["tool_calls"][0] for choice in choices if "tool_calls" in choice["delta"]]
    assert [set(head) for head in heads] == [{"index", "id", "type", "function"}, {"index", "function"}]
    assert heads[0]["function"] == {"name": "get_weather", "arguments": ""}
    assert [choice["delta"] for choice in choices if choice["finish_reason"]] == [{}]


def test_the_description_knows_tools_and_calls() -> None:
    with served(FakeEngine()) as running:
        schemas = json.loads(running.request("/openapi.json")[2])["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"]["tools"]["anyOf"][0]["items"] == {"$ref": "#/components/schemas/Tool"}
    assert "tool_calls" in schemas["ChatChoice"]["properties"]["finish_reason"]["enum"]
    assert {"SaidMessage", "CallingMessage", "ResultMessage"} <= set(schemas)


# --- a model that has learnt to call ---

CITIES = {"Rome": "17"}


def rows_of_calls() -> list[dict[str, Any]]:
    """For each city a call, and a row that goes on with the result."""
    rows = []
    for city, degrees in CITIES.items():
        call = {"id": "x", **call_of(city=city)}
        turns = [
            {"role": "user", "content": f"Weather in {city}?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "x", "content": f"{degrees} degrees"},
            {"role": "assistant", "content": f"{degrees} in {city}."},
        ]
        rows.append({"messages": turns, "tools": [WEATHER]})
    return rows


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in ("hermes", "mistral")])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    base, rows = tool_base(folder / "base", request.param), folder / "rows.json"
    rows.write_text(json.dumps(rows_of_calls()))
    flags: dict[str, Any] = {"model.base": base, "model.dtype": "float32", "data.train": rows, "data.validation": 0}
    flags |= {"training.max_steps": 60, "training.batch_size": 1, "training.learning_rate": 1e-2, "lora.rank": 16}
    flags |= {"evaluation.questions_share": 0, "output": folder / "run"}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    done = CliRunner().invoke(app, ["sft", *words])
    assert done.exit_code == 0, done.stderr
    return folder


def test_what_sft_has_trained_serve_tells_as_calls(trained: Path) -> None:
    from loratune.engine.engine import load_engine

    engine = load_engine([("run", trained / "run")], None)
    with served(engine) as running, OpenAI(base_url=f"{running.url}/v1", api_key=API_KEY, max_retries=0) as client:
        for city, degrees in CITIES.items():
            messages: list[Any] = [{"role": "user", "content": f"Weather in {city}?"}]
            first = client.chat.completions.create(model="run", messages=messages, tools=[WEATHER]).choices[0]
            assert (first.finish_reason, first.message.content) == ("tool_calls", None)
            assert called(first.message) == [("get_weather", {"city": city})]
            id_ = first.message.tool_calls[0].id
            messages += [first.message, {"role": "tool", "tool_call_id": id_, "content": f"{degrees} degrees"}]
            second = client.chat.completions.create(model="run", messages=messages, tools=[WEATHER]).choices[0]
            assert (second.finish_reason, second.message.content) == ("stop", f"{degrees} in {city}.")
    engine.close()


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_with_tools_are_answered_with_calls_and_scored(
    cli: Callable[..., Result], trained: Path, tmp_path: Path
) -> None:
    rows = [
        {"messages": row["messages"][:length], "tools": json.dumps(row["tools"]) if length == 2 else row["tools"]}
        for row in rows_of_calls()
        for length in (1, 2, 4)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    files = ["--input", tmp_path / "rows.json", "--output", tmp_path / "a.jsonl"]
    command = ["infer", "--adapter", trained / "run", *files]
    done = cli(*command, "--metrics")
    assert done.exit_code == 0, done.stderr
    for number, line in enumerate(lines_of(tmp_path / "a.jsonl")):
        city = list(CITIES)[number // 3]
        if number % 3 == 2:
            assert (line["answer"], line["finish"]) == (f"{CITIES[city]} in {city}.", "stop")
            assert "tool_calls" not in line
        else:
            assert line["tool_calls"] == [call_of(city=city)]
            assert (line["answer"], line["finish"]) == ("", "tool_calls")
        if number % 3:
            assert line["metrics"]["exact_match"] == 1
            assert line["metrics"]["perplexity"] < 1.5
    report = json.loads((tmp_path / "a.jsonl.report.json").read_text())
    assert report["metrics"]["answers"]["rows"] == 2
    again = cli(*command, "--metrics", "--no-adapter")
    assert again.exit_code == 0, again.stderr
    assert "base" in lines_of(tmp_path / "a.jsonl")[0]
    assert lines_of(tmp_path / "a.jsonl")[0]["tool_calls"] == [call_of(city="Rome")]


def test_rows_whose_tools_the_template_drops_are_refused_before_the_model_is_loaded(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratune.engine.engine.load_engine", None)
    rows = [{"messages": ASKED}, {"messages": ASKED, "tools": [WEATHER]}, rows_of_calls()[0] | {"tools": None}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    done = cli("infer", "--model", "tiny-qwen", "--input", tmp_path / "rows.json", "--output", tmp_path / "a.jsonl")
    assert done.exit_code == Exit.DATA, done.stderr
    told = " ".join(done.stderr.split())
    assert "2 rows cannot be asked" in told
    assert "row 2: the chat template (chat) does not support tools" in told
    assert "row 3: the chat template (chat) does not support tool calls" in told
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_calls_that_stay_text_are_told_where_tools_can_be_offered() -> None:
    python = TEMPLATES["hermes"].replace("c.function.arguments | tojson", "c.function.arguments | string")
    assert "calls stay text" in tool_encoder(python).about_calls
    assert tool_encoder("hermes").about_calls == ""
    assert tool_encoder(TEMPLATES["hermes"].replace("tool | tojson", "''")).about_calls == ""
