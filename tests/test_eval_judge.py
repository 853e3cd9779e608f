"""The judge of `loratune eval`, behind an HTTP server whose replies a test writes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from loratune.errors import Exit, LoratuneError
from loratune.evaluation import judge, judge_api
from loratune.evaluation.judge import choice_in, preference
from loratune.evaluation.result import read_evaluation

Reply = Callable[[str], Any]
"""From a prompt to the text of a reply, to a status, or to a choice of the API."""
TOKENS_OF_REASONING = 300


class Reasoning:
    """A reply that reasons first, as a server cuts it and tells it."""

    def __init__(self, answer: str, form: str) -> None:
        thought = "A, I think at first. "
        self.form, self.thought = form, thought * (TOKENS_OF_REASONING // len(thought.split()))
        self.answer = answer

    def choice(self, limit: int) -> dict[str, Any]:
        words = self.thought.split(" ")
        is_cut = len(words) > limit
        thought, answer = " ".join(words[:limit]), "" if is_cut else self.answer
        if self.form == "field":
            message: dict[str, Any] = {"content": answer or None, "reasoning_content": thought}
        else:  # templates that end in the opening tag leave it out
            message = {"content": f"{self.form}{thought}" + ("" if is_cut else f"</think>\n\n{answer}")}
        return {"message": message, "finish_reason": "length" if is_cut else "stop"}


class Api:
    """A server of OpenAI's API."""

    def __init__(self) -> None:
        self.reply: Reply = lambda _: "TIE"
        self.refusal: Callable[[dict[str, Any]], str] = lambda _: ""
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                api.asked.append({"path": self.path, **body})
                api.keys.append(self.headers.get("Authorization"))
                refusal = api.refusal(body)
                said = 400 if refusal else api.reply(body["messages"][0]["content"])
                if isinstance(said, Reasoning):
                    said = said.choice(body["max_tokens"])
                choice = {"message": {"content": said}} if isinstance(said, str) else said
                text = refusal or ("busy" if isinstance(said, int) else json.dumps({"choices": [choice]}))
                self.send_response(said if isinstance(said, int) else 200)
                self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    for name in judge_api.KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(judge_api, "PAUSE_SECONDS", 0.0)
    served = Api()
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture
def evaluate(cli: Callable[..., Result], short_run: Path, tmp_path: Path, api: Api) -> Callable[..., Result]:
    """Evaluate eight questions without expected answers by the judge."""
    rows = [{"instruction": f"Where does river {n} end?"} for n in range(8)]
    (tmp_path / "tests.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    flags = ("--tests", tmp_path / "tests.jsonl", "--output", tmp_path / "out", "--max-new-tokens", 4, "--no-general")

    def run(*more: Any) -> Result:
        return cli("eval", "--adapter", short_run, *flags, "--judge", api.url, "--judge-model", "wise", *more)

    return run


def answers(prompt: str) -> tuple[str, str]:
    """The two answers in a prompt, in its order."""
    first, second = (prompt.partition(f"<answer_{name}>\n")[2].partition(f"\n</answer_{name}>")[0] for name in "ab")
    return first, second


def test_a_judge_that_prefers_one_model_decides(evaluate: Callable[..., Result], api: Api, tmp_path: Path) -> None:
    # A judge that sorts the answers' texts has no preference for a place.
    api.reply = lambda prompt: "A" if min(answers(prompt)) == answers(prompt)[0] else "B"
    done = evaluate()
    found = read_evaluation(tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text("utf-8").splitlines()]
    liked = [row["answer"] < row["base"]["answer"] for row in rows if row["answer"] != row["base"]["answer"]]
    assert found.decided_by == "judge"
    assert (found.measures["judge"].better, found.measures["judge"].worse) == (sum(liked), len(liked) - sum(liked))
    assert found.judge
    assert (found.judge.judged, found.judge.undecided, found.judge.not_judged) == (8, 0, 0)
    assert len(api.asked) == 2 * len(liked)
    assert {(one["path"], one["model"], one["temperature"]) for one in api.asked} == {
        ("/v1/chat/completions", "wise", 0)
    }
    assert done.exit_code in (0, 7)


def test_a_judge_that_prefers_a_place_decides_nothing(
    evaluate: Callable[..., Result], api: Api, tmp_path: Path
) -> None:
    api.reply = lambda _: "A"
    assert evaluate().exit_code == 0
    found = read_evaluation(tmp_path / "out")
    assert found.measures["judge"].equal == 8
    assert found.judge
    assert found.judge.undecided == len(api.asked) / 2 > 0


def test_the_key_is_the_environment_s_and_goes_nowhere_else(
    evaluate: Callable[..., Result], api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.setenv("LORATUNE_JUDGE_API_KEY", "secret")
    api.reply = lambda _: 302
    done = evaluate()
    assert set(api.keys) == {"Bearer secret"}
    assert {one["path"] for one in api.asked} == {"/v1/chat/completions"}
    assert "secret" not in done.stderr


def test_a_key_from_a_file_is_sent_without_its_line_break_and_a_strange_one_is_not_told(
    evaluate: Callable[..., Result], api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret\nword")
    api.reply = lambda _: "TIE"
    done = evaluate()
    assert done.exit_code == 3
    assert "the key in OPENAI_API_KEY has characters" in done.stderr
    assert "secret" not in done.stderr
    assert api.asked == []
    monkeypatch.setenv("OPENAI_API_KEY", " secret\n")
    assert evaluate().exit_code == 0
    assert set(api.keys) == {"Bearer secret"}
    assert not [path for path in (tmp_path / "out").iterdir() if b"secret" in path.read_bytes()]


@pytest.mark.parametrize("url", ["http://[::1/v1", "http://host:port/v1", "http:///v1", "ftp://host/v1"])
def test_what_is_not_the_url_of_a_judge_is_refused(url: str) -> None:
    with pytest.raises(LoratuneError, match="give the base URL") as caught:
        judge.open_judge(url, "wise")
    assert caught.value.exit_code == Exit.USAGE


def test_what_the_judge_does_not_answer_is_told_and_nothing_is_lost(
    evaluate: Callable[..., Result], api: Api, tmp_path: Path
) -> None:
    api.reply = lambda prompt: "both are fine" if "river 3" in prompt else "tie, I think"
    done = evaluate()
    assert done.exit_code == 0, done.stderr
    assert "tests.jsonl:7: the judge's reply names neither A nor B nor TIE" in " ".join(done.stderr.split())
    api.asked.clear()
    api.reply = lambda _: "TIE"
    assert evaluate().exit_code == 0
    assert all("river 3" in one["messages"][0]["content"] for one in api.asked)
    found = read_evaluation(tmp_path / "out")
    assert found.judge
    assert found.judge.judged == 8


@pytest.mark.parametrize("form", ["field", "<think>\n", ""])
def test_a_judge_that_reasons_first_is_given_the_tokens_for_it(
    evaluate: Callable[..., Result], api: Api, tmp_path: Path, form: str
) -> None:
    api.reply = lambda prompt: Reasoning("B" if min(answers(prompt)) == answers(prompt)[1] else "A is better", form)
    evaluate()
    found = read_evaluation(tmp_path / "out")
    assert found.judge
    assert (found.judge.judged, found.judge.undecided, found.judge.not_judged) == (8, 0, 0)
    limits = [one["max_tokens"] for one in api.asked]
    assert limits[::2] == [judge.ANSWER_TOKENS] * (len(limits) // 2)
    assert all(limit > TOKENS_OF_REASONING for limit in limits[1::2])


def test_a_judge_that_never_stops_reasoning_has_said_nothing(
    evaluate: Callable[..., Result], api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "REASONING_TOKENS", TOKENS_OF_REASONING // 2)
    api.reply = lambda prompt: Reasoning("A", "") if "river 3" in prompt else "TIE"
    done = evaluate()
    assert "tests.jsonl:7: the judge does not come to an answer within 150 tokens" in done.stderr


def test_a_judge_that_is_down_is_asked_about_few_rows_and_the_answers_are_kept(
    evaluate: Callable[..., Result], api: Api, tmp_path: Path
) -> None:
    api.reply = lambda _: 503
    done = evaluate()
    assert done.exit_code == 3
    assert "the judge could not be asked about any row" in done.stderr
    assert "HTTP 503" in done.stderr
    assert len(api.asked) <= judge_api.TRIES * judge.FAILURES
    assert (tmp_path / "out" / "results.jsonl").is_file()


def as_openai(name: str) -> str:
    message = (
        f"Unsupported parameter: '{name}' is not supported. Use 'max_completion_tokens' and leave 'temperature' out."
    )
    return json.dumps({"error": {"message": message, "param": name, "code": "unsupported_parameter"}})


def as_pydantic(name: str) -> str:
    return json.dumps({"detail": [{"type": "extra_forbidden", "loc": ["body", name], "msg": "not permitted"}]})


@pytest.mark.parametrize("told", [as_openai, as_pydantic, "unsupported: {}".format])
def test_what_a_judge_refuses_is_left_out_for_the_rest_of_the_run(
    evaluate: Callable[..., Result], api: Api, tmp_path: Path, told: Callable[[str], str]
) -> None:
    api.refusal = lambda body: next((told(name) for name in ("max_tokens", "temperature") if name in body), "")
    done = evaluate()
    found = read_evaluation(tmp_path / "out")
    assert found.judge
    assert (found.judge.judged, found.judge.not_judged) == (8, 0)
    refused, asked = api.asked[:2], api.asked[2:]
    assert [body.keys() & {"max_tokens", "temperature"} for body in refused] == [
        {"max_tokens", "temperature"}, {"temperature"},
    ]  # fmt: skip
    assert asked
    assert {body["max_completion_tokens"] for body in asked} == {judge.ANSWER_TOKENS}
    assert not any(body.keys() & {"max_tokens", "temperature"} for body in asked)
    assert "the judge does not take temperature 0" in done.stderr


def test_a_judge_that_takes_no_limit_at_all_is_told_by_its_last_words(
    evaluate: Callable[..., Result], api: Api
) -> None:
    names = ("max_tokens", "max_completion_tokens")
    api.refusal = lambda body: next((as_openai(name) for name in names if name in body), "")
    done = evaluate()
    assert done.exit_code == 3
    assert "HTTP 400" in done.stderr
    assert "Unsupported parameter: 'max_completion_tokens'" in done.stderr
    assert [next(name for name in names if name in body) for body in api.asked] == [*names] * (len(api.asked) // 2)
    assert "temperature 0" not in done.stderr


def test_what_a_judge_does_not_name_stays(evaluate: Callable[..., Result], api: Api) -> None:
    api.refusal = lambda body: "the context is too long" if "river 3" in body["messages"][0]["content"] else ""
    done = evaluate()
    assert "tests.jsonl:7: HTTP 400: the context is too long" in done.stderr
    assert all({"max_tokens", "temperature"} <= body.keys() for body in api.asked)


def test_a_judge_that_refuses_to_be_cut_while_it_reasons_is_given_more_tokens(
    evaluate: Callable[..., Result], api: Api, tmp_path: Path
) -> None:
    told = "Could not finish the message because max_tokens was reached."
    api.refusal = lambda body: told if judge.ANSWER_TOKENS in body.values() else ""
    evaluate()
    found = read_evaluation(tmp_path / "out")
    assert found.judge
    assert found.judge.judged == 8
    assert api.asked[-1]["max_tokens"] == judge.REASONING_TOKENS


def test_a_reply_is_what_it_begins_with_or_the_only_choice_in_it() -> None:
    assert [choice_in(reply) for reply in ("A", "**B**", "B is a better answer than A", "I take B.", "A tie.")] == [
        "first", "second", "second", "second", "tie",
    ]  # fmt: skip
    for reply in ("a good question", "Between A and B, the latter", "", "BAD"):
        with pytest.raises(ValueError, match="names"):
            choice_in(reply)


def test_a_preference_counts_if_it_is_the_same_in_both_orders() -> None:
    assert preference("first", "second") == 1
    assert preference("second", "first") == 0
    assert {preference(one, one) for one in ("first", "second", "tie")} == {0.5}
    assert preference("first", "tie") == 0.5
