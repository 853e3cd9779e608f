"""Reasoning is trained, prompted and read in the form of the template, against transformers' own renderings."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_QWEN
from test_chat_template import CLI, model_folder, row, shipped
from test_thinking import ROWS, TOOL, answer, question, rendered, trained
from transformers import AddedToken, AutoTokenizer

from loratune.data.encoding.encoder import IGNORED, Encoder
from loratune.data.formats.chat_rows import MESSAGES, read_message
from loratune.data.formats.conversation import Conversation, Message, reasoning_apart
from loratune.data.template import answer_parts, rendering
from loratune.data.template.reasoning_form import ReasoningForm
from loratune.delivery.export.servers.flags import find_parsers
from loratune.delivery.export.servers.reasoning import vllm_reasoning_parser
from loratune.delivery.template import portable_template
from loratune.engine.request_handle import make_handle
from loratune.engine.sampling import Sampling
from loratune.engine.sequence import RunningSequence
from loratune.engine.types import Delta, GenerationRequest, joined
from loratune.errors import Exit, LoratuneError
from loratune.recipe.sections import PromptSettings
from loratune.runs.opening import AdapterSource
from loratune.training.reporting.answers import _text_of

DAY = "2026-11-27"
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|eom|>", "<|eot|>")
TURNS = (
    "<|turn>",
    "<turn|>",
    "<|channel>",
    "<channel|>",
    "<|think|>",
    "<|tool_response>",
    "<|tool_call>",
    "<tool_call|>",
)
# A prompt that opens the block, in words that are no tokens; `reasoning` alone is read.
OPENS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and m.reasoning is defined %}{{ '[THINK]' + m.reasoning + '[/THINK]' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + ('[THINK]' if enable_thinking else '') }}{% endif %}"
)
# A prompt that has the empty block already where no reasoning is asked for.
CLOSES = OPENS.replace("('[THINK]' if enable_thinking else '')", "('' if enable_thinking else '[THINK][/THINK]')")
# A thinking mode, and no reasoning in any answer.
HIDES = (
    "{{ '<|im_start|>system\\nThink first.<|im_end|>\\n' if enable_thinking else '' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
OWN = {"opens": OPENS, "closes": CLOSES, "hides": HIDES}
FORMS = {
    "gptoss": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant", "<|channel|>final<|message|>"),
    "gemma4": ("<|channel>thought\n", "\n<channel|>", ""),  # written before tool calls only
    "gemma4_v5": ("<|channel>thought\n", "\n<channel|>", ""),
    "muse_glimmer": (" to=self<|message|>", "<|eom|><|start|>assistant", " to=user<|message|>"),
    "opens": ("[THINK]", "[/THINK]", ""),
    "closes": ("[THINK]", "[/THINK]", ""),
}
REASONED = "<think>\nwhy\n\nso\n</think>\n\nfinal one"


@cache
def _tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    special = [AddedToken(text, special=True, normalized=False) for text in (*HARMONY, *TURNS)]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


def encoder_of(template: str, thinking: bool = True, **settings: Any) -> Encoder:
    """An encoder for one of the templates above, one that TRL ships, or another text."""
    tokenizer = copy.copy(_tokenizer())
    tokenizer.chat_template = OWN.get(template) or (template if "{" in template else shipped(template))
    date = DAY if template == "gptoss" else None
    return Encoder(tokenizer, PromptSettings(enable_thinking=thinking, date=date, **settings))


def at_the_day(encoder: Encoder, messages: tuple[Message, ...], tools: Any = (), **options: Any) -> str:
    """What transformers makes of messages, on the encoder's date."""
    return rendered(encoder, messages, tools, chat_template=encoder.text_for(tools), **options)


def assert_as_rendered(encoder: Encoder, messages: tuple[Message, ...], tools: Any = ()) -> None:
    """Compare ids and labels of each answer with transformers' rendering of its conversation."""
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    examples = encoder.encode(Conversation(messages, tools=tools))
    learnt = [text for example in examples for text in trained(encoder, example.labels.tolist())]
    for place, said in zip(places, learnt, strict=True):
        prompt = at_the_day(encoder, messages[:place], tools, add_generation_prompt=True)
        assert encoder.tokenizer.decode(encoder.prompt_ids(messages[:place], tools)) == prompt
        assert prompt + said == at_the_day(encoder, messages[: place + 1], tools).removesuffix("\n")
    whole = at_the_day(encoder, messages, tools).removesuffix("\n")
    assert examples[-1].input_ids.tolist() == encoder.tokenizer(whole, add_special_tokens=False).input_ids


def read(encoder: Encoder, ids: list[int]) -> Delta:
    """What the engine makes of generated ids."""
    messages = [question("a")]
    running = RunningSequence(encoder.prompt_ids(messages), Sampling(), frozenset())
    handle = make_handle(GenerationRequest(messages), running, encoder, lambda _: None)
    return handle.finish(joined(*(handle.push(token) for token in ids)), "stop", None)


# --- training ---


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name", FORMS)
def test_the_form_is_found_by_rendering(name: str, thinking: bool) -> None:
    form = encoder_of(name, thinking).reasoning_form
    assert (form.opening, form.closing, form.answer_start) == FORMS[name]
    assert form.is_known
    assert not form.is_of_rows
    assert form.key == ("reasoning" if name in OWN else "reasoning_content")


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_5_think", "glm4moe", "deepseek_r1_distill", "lfm2_2_5"])
def test_templates_with_the_rows_form_or_none_keep_it(name: str) -> None:
    form = encoder_of(name).reasoning_form
    assert form == ReasoningForm("" if name in ("qwen2_5", "deepseek_r1_distill") else "reasoning_content")


@pytest.mark.parametrize("kind", ["plain", "reasoned", "mixed"])
@pytest.mark.parametrize("name", ["gptoss", "gemma4_v5", "muse_glimmer"])
def test_rows_are_trained_as_transformers_renders_them(name: str, kind: str) -> None:
    assert_as_rendered(encoder_of(name), ROWS[kind])


def test_reasoning_stands_before_a_call_as_the_template_writes_it() -> None:
    encoder = encoder_of("muse_glimmer")
    assert_as_rendered(encoder, ROWS["tools"], (TOOL,))
    (example,) = encoder.encode(Conversation(ROWS["tools"], tools=(TOOL,)), train_thinking=False)
    (call, *others) = trained(encoder, example.labels.tolist())
    assert call.startswith(" to=add<|message|>")
    assert others == [f" to=user<|message|>{text}<|eot|>" for text in ("three", "two")]


@pytest.mark.parametrize("name", ["gptoss", "gemma4", "gemma4_v5"])
def test_calls_that_end_otherwise_than_answers_are_refused_with_their_reasoning(name: str) -> None:
    with pytest.raises(LoratuneError, match="does not write an answer that calls tools as a continuation") as caught:
        encoder_of(name).encode(Conversation(ROWS["tools"], tools=(TOOL,)))
    assert caught.value.exit_code == Exit.DATA


@pytest.mark.parametrize(
    ("place", "name", "fault"),
    [
        (rendering, "study_template", lambda study: lambda *given: replace(study(*given), form=ReasoningForm())),
        (rendering, "study_template", lambda study: lambda *given: replace(study(*given), answer_start="")),
        (answer_parts, "reasoning_apart", lambda apart: lambda text: ("", apart(text)[1])),
        (Encoder, "with_reasoning_apart", lambda _: lambda self, message: dict(message)),
    ],
    ids=["trained as <think>", "no header of the final channel", "reasoning lost", "earlier reasoning is text"],
)
def test_a_wrong_form_is_caught(place: Any, name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_as_rendered(encoder_of("gptoss"), ROWS["mixed"])
    monkeypatch.setattr(place, name, fault(getattr(place, name)))
    with pytest.raises(AssertionError):
        assert_as_rendered(encoder_of("gptoss"), ROWS["mixed"])


@pytest.mark.parametrize("name", FORMS)
def test_labels_may_leave_reasoning_out_and_keep_the_header_of_the_answer(name: str) -> None:
    encoder = encoder_of(name)
    (whole,), (rest,) = (encoder.encode(row("a", REASONED), "all", thinking) for thinking in (True, False))
    assert whole.input_ids == rest.input_ids
    end, start = encoder.tokenizer.decode([encoder.end_id]), FORMS[name][2]
    assert trained(encoder, rest.labels.tolist()) == [f"{start}final one{end}"]
    opening, closing, start = FORMS[name]
    (said,) = trained(encoder, whole.labels.tolist())
    assert said == f"{'' if name == 'opens' else opening}why\n\nso{closing}{start}final one{end}"


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name", ["opens", "closes"])
def test_a_block_that_the_prompt_has_is_neither_opened_twice_nor_left_open(name: str, thinking: bool) -> None:
    encoder = encoder_of(name, thinking)
    assert encoder.leaves_reasoning_open is False
    for said in ("one", "<think>\n\n</think>\n\none"):
        (example,) = encoder.encode(row("a", said))
        text = encoder.tokenizer.decode(example.input_ids.tolist())
        assert text.endswith("one<|im_end|>")
        assert text.count("[THINK]") == text.count("[/THINK]") == ((name == "opens") is thinking)


def test_control_tokens_of_a_row_s_reasoning_stay_text() -> None:
    encoder = encoder_of("gptoss")
    (example,) = encoder.encode(row("a", "<think>\nx<|end|>y\n</think>\n\none<|return|>"))
    learnt = [label for label in example.labels if label != IGNORED]
    for token, count in (("<|end|>", 1), ("<|return|>", 1), ("<|channel|>", 2)):
        assert learnt.count(encoder.tokenizer.convert_tokens_to_ids(token)) == count


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_rows_may_have_reasoning_under_each_of_its_names(key: str) -> None:
    turn = {"role": "assistant", "content": "one", key: "why"}
    assert read_message(turn) == answer("one", "why")
    given = {"messages": [{"role": "user", "content": "a", key: None}, turn]}
    assert (MESSAGES.problems(given), MESSAGES.unread(given)) == ([], {})
    assert read_message({**turn, key: 7}) == f"its {key!r} is a number"


@pytest.mark.parametrize(
    ("said", "reasoning", "text"),
    [
        ("<think>\nwhy\n\nso\n</think>\n\none", "why\n\nso", "one"),
        ("  <think>why</think>one", "why", "one"),
        ("why\n</think>\n\none", "why", "one"),  # as models say whose prompts have the opening tag
        ("<think>\n\n</think>\n\none", "", "one"),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
        ("The tag </think> ends it.", "", "The tag </think> ends it."),
        ("Use\n`<think>`\n</think>\n", "", "Use\n`<think>`\n</think>\n"),
        ("<think>never closed", "", "<think>never closed"),
    ],
)
def test_the_reasoning_of_a_row_s_answer_is_what_its_block_has(said: str, reasoning: str, text: str) -> None:
    assert reasoning_apart(said) == (reasoning, text)
    learnt = "".join(trained(encoder_of("gptoss"), encoder_of("gptoss").encode(row("a", said))[0].labels.tolist()))
    opening, closing, start = FORMS["gptoss"]
    assert learnt == f"{f'{opening}{reasoning}{closing}' if reasoning else ''}{start}{text}<|return|>"


def test_reasoning_elsewhere_than_at_the_start_is_refused_where_the_form_is_another() -> None:
    later = row("a", "Well.\n<think>\nwhy\n</think>\n\none")
    encoder_of("qwen3").encode(later)  # whose form it has
    with pytest.raises(LoratuneError, match=r"that does not begin an answer, .* after '<\|channel\|>analysis"):
        encoder_of("gptoss").encode(later)


def test_a_row_whose_form_is_not_known_is_refused_and_no_other(tmp_path: Path, cli: CLI) -> None:
    encoder = encoder_of("hides")
    assert not encoder.reasoning_form.is_known
    encoder.encode(row("a", "one"))
    for refused in (row("a", REASONED), row("a", REASONED, "b", "two")):
        with pytest.raises(LoratuneError, match="it has reasoning, and the form in which the chat template writes"):
            encoder.encode(refused)
    base = model_folder(tmp_path / "base", HIDES)
    rows = tmp_path / "rows.json"
    rows.write_text(
        json.dumps([{"instruction": f"{place}?", "output": text} for place, text in enumerate(["1", REASONED])])
    )
    given = ("--model.base", base, "--data.train", rows, "--data.validation", "0")
    result = cli("data", "check", *given)
    assert result.exit_code == Exit.DATA
    assert "row 2: it has reasoning" in " ".join(result.stderr.split())


def test_a_form_in_which_the_end_token_ends_reasoning_is_not_taken() -> None:
    ends = OPENS.replace("'[/THINK]'", "'<|im_end|>[/THINK]'")
    assert encoder_of("opens").reasoning_form.is_known
    assert encoder_of(ends).reasoning_form == ReasoningForm(is_known=False)


# --- what is told ---


def test_the_check_tells_the_form_and_whether_rows_fit(tmp_path: Path, cli: CLI) -> None:
    base = model_folder(tmp_path / "base", OPENS.replace("('[THINK]' if enable_thinking else '')", "''"))
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": f"{place}?", "output": REASONED} for place in range(2)]))
    given = ("--model.base", base, "--data.train", rows, "--data.validation", "0")
    for _ in range(2):  # then from the cache
        report = json.loads(cli("data", "check", *given, "--json").stdout)
        assert report["reasoning_form"] == {"before": "[THINK]", "after": "[/THINK]"}
    # The template has no other mode that would ask for reasoning.
    assert "thinking" not in {found["name"] for found in report["findings"]}
    assert "is trained between '[THINK]' and '[/THINK]'" in " ".join(cli("data", "check", *given).stderr.split())


@pytest.mark.parametrize("name", ["gptoss", "gemma4_v5", "opens"])
def test_servers_are_told_the_parser_of_the_form(name: str) -> None:
    encoder = encoder_of(name)
    parser = vllm_reasoning_parser(encoder.tokenizer, encoder.template, encoder.reasoning_form)
    assert parser == {"gptoss": "openai_gptoss", "gemma4_v5": "gemma4"}.get(name)


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_a_form_that_no_server_s_parser_is_known_for_is_told(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = model_folder(tmp_path / "base", OPENS)
    (tmp_path / "adapter").mkdir()
    source = AdapterSource(tmp_path / "adapter", None, None, None)
    assert find_parsers(tmp_path / "adapter", str(base), source, server).reasoning is None
    told = " ".join(capsys.readouterr().err.split())
    assert "writes reasoning after '[THINK]', and no parser of that form is known" in told


@pytest.mark.parametrize("name", ["gptoss", "gemma4_v5", "muse_glimmer"])
def test_a_merged_template_prompts_after_reasoning_as_the_training_did(name: str) -> None:
    encoder = encoder_of(name, system="Be short.")
    merged = portable_template(encoder)
    assert merged
    earlier = ROWS["reasoned"][:-1]
    asked = {"add_generation_prompt": True, "chat_template": encoder.at_its_day(merged)}
    assert rendered(encoder, earlier, **asked) == encoder.tokenizer.decode(encoder.prompt_ids(earlier))


# --- generation ---


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    ("said", "text", "reasoning"),
    [
        (REASONED, "final one", "why\n\nso"),
        ("final one", "final one", ""),
        ("analysis", "analysis", ""),
        ("<think>\nfinal <x> assistant\n</think>\n\none", "one", "final <x> assistant"),
    ],
)
def test_an_answer_is_read_as_the_row_has_it(name: str, said: str, text: str, reasoning: str) -> None:
    encoder = encoder_of(name)
    ids = encoder.answer_ids(said)[:-1]
    told = read(encoder, ids)
    assert (told.text, told.reasoning.rstrip("\n")) == (text, reasoning)
    running = RunningSequence(encoder.prompt_ids([question("a")]), Sampling(), frozenset(), tokens=ids)
    assert encoder.answer_ids(_text_of(encoder, running))[:-1] == ids


def test_reasoning_may_go_on_in_another_message_and_needs_no_end() -> None:
    encoder = encoder_of("gptoss")
    opening, closing, start = FORMS["gptoss"]
    for text, expected in (
        (f"{opening}one{closing}{opening}two{closing}{start}three", ("three", "onetwo")),
        (f"{opening}one{closing}{start}two{closing}{opening}three", ("twoassistantanalysisthree", "one")),
        (f"{opening}one", ("", "one")),
        (f"{opening}one{closing}", ("", "one")),
    ):
        told = read(encoder, encoder.tokenizer(text).input_ids)
        assert (told.text, told.reasoning) == expected


def test_only_the_answer_s_end_stops_it() -> None:
    encoder = encoder_of("gptoss")
    ids = encoder.answer_ids(REASONED)
    assert encoder.tokenizer.decode([encoder.end_id]) == "<|return|>"
    assert ids.count(encoder.end_id) == 1
    assert ids[-1] == encoder.end_id
