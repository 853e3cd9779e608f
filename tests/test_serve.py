"""`loratune serve` as its clients meet it: OpenAI's own client, the answers of plain transformers, the command."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from conftest import TINY_QWEN
from openai import OpenAI
from peft import PeftModel
from processes import COMMAND_LINE, Program, comes_true
from serving import API_KEY, FakeEngine, Served, chat, events, served
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import Result

from loratune.engine.engine import load_engine
from loratune.engine.types import Delta
from loratune.errors import Exit

QUESTION = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def tiny() -> Iterator[Served]:
    """The practice model behind a server."""
    engine = load_engine([], "tiny-qwen")
    with served(engine) as running:
        yield running
    engine.close()


@pytest.fixture
def client(tiny: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{tiny.url}/v1", api_key=API_KEY, max_retries=0) as opened:
        yield opened


def generated(prompt: Any, tokens: int = 40, model: Any = None) -> tuple[str, int]:
    """What plain transformers says to token ids, and how many tokens that is."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    model = model or AutoModelForCausalLM.from_pretrained(TINY_QWEN)
    output = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
    new = output[0, len(prompt) :]
    return str(tokenizer.decode(new, skip_special_tokens=True)), len(new)


def prompt_of(messages: list[dict[str, str]]) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


# --- answers ---


def test_a_chat_s_answer_and_its_counts_are_those_of_plain_transformers(client: OpenAI) -> None:
    prompt = prompt_of(QUESTION)
    text, tokens = generated(prompt)
    answer = client.chat.completions.create(model="tiny-qwen", messages=QUESTION)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), tokens)
    assert answer.usage.total_tokens == len(prompt) + tokens
    assert answer._request_id == answer.id


def test_a_stream_is_the_answer_in_pieces_with_the_counts_at_the_end(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny-qwen", messages=QUESTION)
    chunks = list(
        client.chat.completions.create(
            model="tiny-qwen", messages=QUESTION, stream=True, stream_options={"include_usage": True}
        )
    )
    *said, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == whole.choices[0].message.content
    assert said[0].choices[0].delta.role == "assistant"
    assert len(said) > 5
    assert [chunk.choices[0].finish_reason for chunk in said] == [None] * (len(said) - 1) + ["stop"]
    assert last.choices == []
    assert last.usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_counts_of_a_stream_come_only_when_asked_for(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="tiny-qwen", messages=QUESTION, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_a_text_is_continued_without_template(client: OpenAI) -> None:
    prompt = AutoTokenizer.from_pretrained(TINY_QWEN)("Who are").input_ids
    text, _ = generated(prompt, tokens=8)
    answer = client.completions.create(model="tiny-qwen", prompt="Who are", max_tokens=8)
    assert answer.choices[0].text == text
    assert answer.usage.prompt_tokens == len(prompt)
    parts = client.completions.create(model="tiny-qwen", prompt=["Who are"], max_tokens=8, stream=True)
    assert "".join(part.choices[0].text for part in parts) == text


def test_settings_reach_the_generation(client: OpenAI) -> None:
    def ask(**settings: Any) -> Any:
        return client.chat.completions.create(model="tiny-qwen", messages=QUESTION, **settings).choices[0]

    usual = ask()
    assert ask(max_tokens=3).finish_reason == "length"
    assert usual.message.content.startswith(ask(max_tokens=3).message.content)
    assert ask(max_completion_tokens=3).message.content == ask(max_tokens=3).message.content
    stopped = ask(stop=["practice"])
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == usual.message.content.partition("practice")[0]
    assert ask(stop="practice").message.content == stopped.message.content
    hot = {"temperature": 4.0, "max_tokens": 12}
    assert ask(seed=7, **hot).message.content == ask(seed=7, **hot).message.content
    assert len({ask(seed=seed, **hot).message.content for seed in range(4)}) > 1
    only_likeliest = ask(seed=1, temperature=4.0, extra_body={"top_k": 1})
    assert only_likeliest.message.content == usual.message.content
    assert ask(temperature=1e-300).message.content == usual.message.content
    again = ask(extra_body={"repetition_penalty": 10.0}, max_tokens=12)
    assert again.message.content != usual.message.content


def test_system_developer_and_parts_are_understood(client: OpenAI) -> None:
    def ask(*messages: dict[str, Any]) -> str:
        answer = client.chat.completions.create(model="tiny-qwen", messages=list(messages), max_tokens=12)
        return f"{answer.choices[0].message.content} {answer.usage.prompt_tokens}"

    user = {"role": "user", "content": "Who are you?"}
    plain = ask({"role": "system", "content": "Your name is Zed."}, user)
    assert ask({"role": "developer", "content": "Your name is Zed."}, user) == plain
    parts = [{"type": "text", "text": "Who are "}, {"type": "text", "text": "you?"}]
    assert ask({"role": "system", "content": "Your name is Zed."}, {"role": "user", "content": parts}) == plain
    assert ask(user) != plain


def test_an_answer_can_be_sent_back_as_it_came(client: OpenAI) -> None:
    first = client.chat.completions.create(model="tiny-qwen", messages=QUESTION).choices[0].message
    for said in (first, first.model_dump()):
        messages = [*QUESTION, said, {"role": "user", "content": "What is 2+3?"}]
        text, _ = generated(prompt_of([*QUESTION, {"role": "assistant", "content": first.content}, messages[-1]]))
        assert client.chat.completions.create(model="tiny-qwen", messages=messages).choices[0].message.content == text


def test_each_model_answers_by_its_name_though_they_are_asked_in_turn(short_run: Path, random_qwen: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_qwen, dtype=torch.float32)
    expected = {"random": generated(prompt_of(QUESTION), 12, model)[0]}
    model = PeftModel.from_pretrained(model, short_run / "adapter")
    expected["first"] = generated(prompt_of(QUESTION), 12, model)[0]
    for name, module in model.named_modules():
        if name.endswith("lora_B.default"):
            module.weight.data *= -30
    model.save_pretrained(short_run.parent / "other")
    expected["second"] = generated(prompt_of(QUESTION), 12, model)[0]
    assert len(set(expected.values())) > 1

    engine = load_engine([("first", short_run), ("second", short_run.parent / "other")], str(random_qwen))
    names = {"random": engine.base_name, "first": "first", "second": "second"}
    with served(engine) as running, OpenAI(base_url=f"{running.url}/v1", api_key=API_KEY, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [engine.base_name, "first", "second"]
        assert client.models.retrieve("first").parent == engine.base_name
        for called in ["first", "second", "random", "second", "first"]:
            answer = client.chat.completions.create(model=names[called], messages=QUESTION, max_tokens=12)
            assert answer.choices[0].message.content == expected[called], called
    engine.close()


def test_reasoning_goes_out_beside_the_answer() -> None:
    words = [
        Delta(reasoning="Is it? ", tokens=1),
        Delta(reasoning="Yes.", tokens=2),
        Delta("yes", tokens=4, finish="stop"),
    ]
    with served(FakeEngine(words)) as running:
        whole = json.loads(running.request(body=chat())[2])["choices"][0]["message"]
        assert whole == {"role": "assistant", "content": "yes", "reasoning_content": "Is it? Yes."}
        deltas = [one["choices"][0]["delta"] for one in events(running.request(body=chat(stream=True))[2])[:-1]]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Is it? Yes."
        assert "".join(delta.get("content", "") for delta in deltas) == "yes"


# --- errors, as OpenAI's client raises them ---


def test_errors_are_those_of_openai_s_client(client: OpenAI, tiny: Served) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-9", messages=QUESTION)
    assert unknown.value.code == "model_not_found"
    assert "tiny-qwen" in unknown.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")
    with pytest.raises(openai.BadRequestError) as too_long:
        client.chat.completions.create(model="tiny-qwen", messages=[{"role": "user", "content": "long " * 5000}])
    assert too_long.value.code == "context_length_exceeded"
    stranger = OpenAI(base_url=f"{tiny.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"n": 2}, "n"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -0.5}, "frequency_penalty"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"extra_body": {"typical_p": 0.5}}, "typical_p"),
        ({"extra_body": {"a_field_of_next_year": 0}}, "a_field_of_next_year"),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}, "chat_template_kwargs"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"temperature": -0.1}, "temperature"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"store": True}, "store"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny-qwen", messages=QUESTION, **fields)
    assert refused.value.param == param
    assert param in refused.value.message


@pytest.mark.parametrize("extra", [{"name": "Adam"}, {"name": None}, {"tool_call_id": None, "next_year": ""}])
def test_messages_may_carry_names_and_fields_that_ask_for_nothing(client: OpenAI, extra: dict[str, Any]) -> None:
    (message,) = QUESTION
    plain = client.chat.completions.create(model="tiny-qwen", messages=QUESTION)
    named = client.chat.completions.create(model="tiny-qwen", messages=[{**message, **extra}])  # type: ignore[list-item]
    assert named.choices[0].message.content == plain.choices[0].message.content


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "logprobs": False},
        {"user": "somebody", "metadata": {"from": "a test"}, "store": False},
        {"parallel_tool_calls": True, "functions": [], "function_call": "none", "top_logprobs": 0},
        {"service_tier": "auto", "modalities": ["text"], "prompt_cache_key": "x", "safety_identifier": "y"},
        {"audio": None, "prediction": None, "reasoning_effort": None, "verbosity": None},
        {"extra_body": {"chat_template_kwargs": {}, "guided_json": "", "a_field_of_next_year": False, "other": []}},
        {"temperature": None, "top_p": None, "max_tokens": None, "stop": None, "seed": None, "stream": None},
    ],
)
def test_fields_that_ask_for_nothing_special_are_taken(client: OpenAI, fields: dict[str, Any]) -> None:
    answer = client.chat.completions.create(model="tiny-qwen", messages=QUESTION, **fields)
    assert "tiny-qwen" in answer.choices[0].message.content


# --- the description ---


def test_the_description_needs_the_token_and_there_are_no_other_pages(tiny: Served) -> None:
    assert tiny.request("/openapi.json", Authorization="")[0] == 401
    described = json.loads(tiny.request("/openapi.json")[2])
    assert set(described["paths"]) == {
        "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{name}", "/health", "/metrics"
    }  # fmt: skip
    for path in ("/docs", "/redoc", "/admin", "/v1"):
        assert tiny.request(path)[0] == 404
        assert tiny.request(path, Authorization="")[0] == 401


def test_metrics_count_what_happened(short_run: Path) -> None:
    with served(FakeEngine()) as running:
        running.request(body=chat())
        running.request(body=chat(stream=True))
        running.request(body=chat(n=5))
        text = running.request("/metrics")[2]
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert lines['loratune_requests_total{path="/v1/chat/completions",status="200"}'] == "2.0"
        assert lines['loratune_requests_total{path="/v1/chat/completions",status="400"}'] == "1.0"
        assert lines['loratune_answers_total{finish="stop",model="base"}'] == "2.0"
        assert lines['loratune_tokens_total{kind="prompt",model="base"}'] == "6.0"
        assert lines['loratune_tokens_total{kind="answer",model="base"}'] == "4.0"
        assert lines["loratune_running"] == "0.0"


HOOKS = """
import schemathesis

@schemathesis.hook
def before_call(context, case, kwargs):
    # What a schema cannot say: the last message is the user's, all fit into the model's context, and its template has
    # no place for tools.
    messages = case.body.get("messages") if isinstance(case.body, dict) else None
    if isinstance(messages, list) and 0 < len(messages) <= 1024:
        said = [one for one in messages[:8] if not isinstance(one, dict) or not is_of_tools(one)]
        case.body = {**case.body, "messages": [*said, {"role": "user", "content": "?"}]}
        if has_tools(case.body.get("tools")):
            case.body["tools"] = None

def is_of_tools(message):
    return message.get("role") == "tool" and "tool_call_id" in message or bool(message.get("tool_calls"))

def has_tools(tools):
    return isinstance(tools, list) and 0 < len(tools) <= 128
"""


def findings(running: Served, folder: Path, examples: int) -> str:
    """What schemathesis has to say about the server; empty if nothing."""
    (folder / "hooks.py").write_text(HOOKS)
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{running.url}/openapi.json", "--no-color"]
    command += ["-H", f"Authorization: Bearer {API_KEY}", "--max-examples", str(examples), "--seed", "1"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "SCHEMATHESIS_HOOKS": "hooks"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert "API Operations" in done.stdout, done.stdout + done.stderr
    return done.stdout if done.returncode else ""


@pytest.mark.slow
def test_the_description_and_the_server_agree(tiny: Served, tmp_path: Path) -> None:
    with served(tiny.engine, new_tokens=8) as running:
        found = findings(running, tmp_path, 40)
        assert not found, found
        for path in ("/v1/chat/completions", "/v1/completions"):
            answered = rf'loratune_requests_total{{path="{path}",status="200"}} (\S+)'
            (count,) = re.findall(answered, running.request("/metrics")[2])
            assert float(count) > 20  # not only refused


# --- the command ---


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_command_says_where_the_page_is_and_a_line_that_works(
    start: Callable[..., Program], free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LORATUNE_API_KEY", "LORATUNE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    server = start("serve", "--model", "tiny-qwen", "--port", free_port)
    assert comes_true(lambda: "}]}'\n" in server.stderr or server.has_ended()), server.stderr
    (page,) = re.findall(rf"page: (http://127.0.0.1:{free_port}/)#api_key=(\S+)", server.stderr)
    (curl,) = re.findall(r"try:\n(  curl .*?}'\n)", server.stderr, re.DOTALL)
    assert page[1] in curl
    assert max(map(len, server.stderr.splitlines())) <= 80
    answer = subprocess.run(["sh", "-c", curl], capture_output=True, text=True, check=True).stdout
    assert "tiny-qwen" in json.loads(answer)["choices"][0]["message"]["content"]
    server.send(signal.SIGTERM)
    assert server.exit_code() == 143


@pytest.mark.parametrize("command", [("serve", "--model", "tiny-qwen"), ("runs", "serve", ".")])
def test_an_interrupt_ends_a_server_that_a_script_has_put_in_the_background(
    start: Callable[..., Program], command: tuple[str, ...]
) -> None:
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"  # as a shell without job control does
    server = start(*command, "--port", 0, code=f"{ignored}\n{COMMAND_LINE}")
    assert comes_true(lambda: "page: " in server.stderr or server.has_ended()), server.stderr
    server.send(signal.SIGINT)
    assert comes_true(server.has_ended, 20), "the signal was ignored"
    assert server.exit_code() == 130


def test_a_taken_port_is_told_before_the_model_is_loaded(cli: Callable[..., Result]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = cli("serve", "--model", "there-is-none", "--port", taken.getsockname()[1])
    assert result.exit_code == Exit.IO
    assert "in use" in result.stderr


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "--adapter"),
        (("--model", "m", "--host", "0.0.0.0", "--no-api-key", "--port", "0"), "--no-api-key"),
        (("--model", "m", "--host", "no.such.name.invalid"), "no such address"),
        (("--model", "m", "--api-key", "a", "--no-api-key"), "exclude"),
        (("--model", "m", "--api-key", ""), "--api-key"),
        (("--model", "m", "--api-key", "two words"), "--api-key"),
        (("--model", "m", "--api-key", "schlüssel"), "--api-key"),
        (("--model", "m", "--allow-origin", "*"), "--allow-origin"),
        (("--model", "m", "--allow-origin", "http://a.b/page"), "--allow-origin"),
        (("--model", "m", "--port", "70000"), "--port"),
        (("--model", "m", "--slots", "0"), "--slots"),
        (("--adapter", "a=x", "--adapter", "a=y"), "a"),
    ],
)
def test_wrong_flags_are_one_message(cli: Callable[..., Result], flags: tuple[str, ...], told: str) -> None:
    result = cli("serve", *flags)
    assert result.exit_code == Exit.USAGE
    assert told in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_the_api_key_comes_from_the_flag_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from loratune.cli.serving import given_key

    for name in ("LORATUNE_API_KEY", "LORATUNE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert given_key(None, False) is None
    monkeypatch.setenv("LORATUNE_API_KEY", "from-there")
    assert given_key(None, False) == "from-there"
    assert given_key("given", False) == "given"


def test_the_variable_of_earlier_versions_still_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from loratune.cli.serving import given_key

    monkeypatch.delenv("LORATUNE_API_KEY", raising=False)
    monkeypatch.setenv("LORATUNE_TOKEN", "from-before")
    assert given_key(None, False) == "from-before"
    assert capsys.readouterr().err == "LORATUNE_TOKEN is now LORATUNE_API_KEY (the old name still works)\n"
    monkeypatch.setenv("LORATUNE_API_KEY", "from-now")
    assert given_key(None, False) == "from-now"
    assert capsys.readouterr().err == ""


def test_an_api_key_of_the_user_s_own_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    from loratune.cli.serve import _tell
    from loratune.cli.serving import served_address

    with served_address("127.0.0.1", 0, "my-own", False, None) as opened:
        _tell(opened, FakeEngine())
        assert opened.key == "my-own"
        assert "my-own" not in capsys.readouterr().err
        assert opened.values()["api_key"] is None
    with served_address("127.0.0.1", 0, None, False, None) as opened:
        _tell(opened, FakeEngine())
        assert opened.key
        assert capsys.readouterr().err.count(opened.key) == 2
        assert opened.values()["api_key"] == opened.key


def test_base_and_adapter_of_one_name_are_refused(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(base_name="same", adapters=["same"])
    monkeypatch.setattr("loratune.engine.engine.load_engine", lambda *_: engine)
    result = cli("serve", "--model", "same", "--port", "0")
    assert result.exit_code == Exit.USAGE
    assert "name=folder" in " ".join(result.stderr.split())


def test_without_its_packages_the_command_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from loratune.cli.app import main\n"
        "sys.argv = ['loratune', 'serve', '--model', 'tiny-qwen']\n"
        "main()"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == Exit.USAGE
    assert 'pip install "loratune[serve]"' in " ".join(result.stderr.split())
