"""The form of calls is what a template shows, and answers are read in it whole or cut anywhere."""

from __future__ import annotations

import copy
import json
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_templates import SPECIAL, SPECIAL_ID, TEMPLATES, WEATHER, call_of, tool_encoder, tool_tokenizer

from loratune.data.encoding.encoder import IGNORED, Encoder
from loratune.data.formats.conversation import Conversation
from loratune.data.tools.call_form import CallForm, CallStream
from loratune.data.tools.call_shapes import Call, NamedShape, ObjectShape, ParameterShape
from loratune.data.tools.tool_rendering import ToolError
from loratune.engine.text import TextStream
from loratune.errors import Exit
from loratune.recipe.sections import PromptSettings

QUESTION = {"role": "user", "content": "What is the weather?"}
ROME = call_of(city="Rome")
HARD = call_of("look.up-it", city='"Zürich"\n</b> 你好 {x}', days=-3, where={"a": [1, 2.5, None, {"b": True}], "c": {}})
NOTHING = call_of("now")


def form_of(template: str) -> CallForm:
    form = tool_encoder(template).call_form
    assert form is not None
    return form


def rendered(template: str, calls: list[dict[str, Any]], content: str = "") -> str:
    """What transformers' own rendering writes for an answer, up to its end."""
    tokenizer = tool_tokenizer(template)
    listed = [{"id": f"call0000{place}", **call} for place, call in enumerate(calls)]
    answer = {"role": "assistant", "content": content, "tool_calls": listed}
    asked = tokenizer.apply_chat_template([QUESTION], [WEATHER], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([QUESTION, answer], [WEATHER], tokenize=False)
    assert whole.startswith(asked)
    return str(whole[len(asked) :].partition("<|im_end|>")[0])


def marked(form: CallForm, text: str) -> str:
    """Special tokens as the form knows them."""
    for mark, token in form.marks.items():
        text = text.replace(token, mark)
    return text


def read(form: CallForm, text: str, cuts: list[int] | None = None, **limits: Any) -> tuple[str, list[Call]]:
    """What a stream says and calls, if the text comes in pieces."""
    text, stream = marked(form, text), CallStream(form, [WEATHER], **limits)
    places = sorted({min(cut, len(text)) for cut in cuts or []})
    told = [stream.push(text[start:end]) for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    told.append(stream.push("", is_last=True))
    return "".join(one.text for one in told), [call for one in told for call in one.calls]


def as_calls(given: list[dict[str, Any]]) -> list[Call]:
    return [Call(call["function"]["name"], call["function"]["arguments"]) for call in given]


# --- the form ---


def test_the_form_is_what_the_template_shows() -> None:
    assert form_of("hermes") == CallForm(
        "<tool_call>\n", ObjectShape(("name",), ("arguments",), are_text=False), "\n</tool_call>"
    )
    assert form_of("llama") == CallForm("", ObjectShape(("name",), ("parameters",), are_text=False), "")
    coder = form_of("coder").shape
    assert isinstance(coder, ParameterShape)
    assert (coder.equals, coder.between) == (">\n", "\n</parameter>\n<parameter=")
    mistral = form_of("mistral")
    (mark,) = mistral.marks
    assert (mistral.opening, mistral.between, mistral.closing) == (f"{mark} [", ", ", "]")
    assert mistral.marks == {mark: SPECIAL}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("calls", [[ROME], [HARD], [NOTHING], [ROME, HARD], [NOTHING, HARD, ROME]])
@pytest.mark.parametrize("content", ["", "Let me see."])
def test_calls_come_back_as_they_were_written(template: str, calls: list[dict[str, Any]], content: str) -> None:
    if template == "llama":
        calls, content = calls[:1], ""
    if template == "llama" and calls[0] is not ROME:
        calls = [call_of(**calls[0]["function"]["arguments"])]  # a bare call must know its tool
    content = "" if template == "mistral" else content  # which drops it
    assert read(form_of(template), rendered(template, calls, content)) == (content, as_calls(calls))


OTHER_FORMS = {
    "the text of a JSON object": (
        "{{ '<call>' + {'function': {'name': c.function.name, 'arguments': c.function.arguments | tojson}} | tojson }}"
        "{{ '</call>' }}",
        ObjectShape(("function", "name"), ("function", "arguments"), are_text=True),
    ),
    "a name before its arguments": (
        "{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' + c.function.arguments | tojson }}",
        NamedShape("[ARGS]"),
    ),
}


def with_calls(written: str) -> str:
    """A template that writes each call in this way."""
    before, _, behind = TEMPLATES["hermes"].partition("{% for c in m.tool_calls %}")
    return before + "{% for c in m.tool_calls %}" + written + "{% endfor %}" + behind.partition("{% endfor %}")[2]


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_other_forms_are_found_by_the_same_probe(name: str) -> None:
    written, shape = OTHER_FORMS[name]
    form = form_of(with_calls(written))
    assert form.shape == shape
    assert read(form, rendered(with_calls(written), [ROME, HARD])) == ("", as_calls([ROME, HARD]))


@pytest.mark.parametrize(
    "written",
    [
        "{{ '<call>' + c.function.name + '(' + c.function.arguments | string + ')' }}",  # as Python writes it
        '{{ \'<call>{"name": "\' + c.function.name | upper + \'", "arguments": {}}</call>\' }}',
        "{% if loop.first %}{{ '<call>' }}{{ c.function | tojson }}{{ '</call>' }}{% endif %}",  # the second is lost
        "{{ '<call>' }}{{ c.function | tojson | replace('你', '') }}{{ '</call>' }}",  # a character is lost
        "{{ '<call>{\"name\": \"' + c.function.name + '\", \"arguments\": ' + c.function.arguments | string + '}' }}",
    ],
)
def test_calls_that_would_not_come_back_have_no_form(written: str) -> None:
    encoder = tool_encoder(with_calls(written))
    assert encoder.call_form is None
    assert "calls stay text" in encoder.about_calls


def test_a_prompt_that_asks_for_reasoning_does_not_hide_the_form() -> None:
    """nemotron's prompt opens the block, and its template writes an empty one before a call."""
    tokenizer = copy.copy(tool_tokenizer("hermes"))
    tokenizer.chat_template = (files("trl") / "chat_templates" / "nemotron_3_nano.jinja").read_text("utf-8")
    forms = [Encoder(tokenizer, PromptSettings(enable_thinking=thinking)).call_form for thinking in (False, True)]
    assert forms[0] is not None
    assert forms[0] == forms[1]


def test_a_call_that_shows_the_tools_anew_has_no_form() -> None:
    """What stands before it is then not what the model goes on with."""
    encoder = tool_encoder(TEMPLATES["mistral"].replace("m == last", "loop.last"))
    assert encoder.offers_tools
    assert encoder.call_form is None


def test_a_value_without_quotes_is_what_its_schema_says() -> None:
    text = (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n05\n</parameter>\n<parameter=days>\n05\n</parameter>\n"
        "<parameter=where>\n{\"a\": 1}\n</parameter>\n<parameter=other>\n1.5\n</parameter>\n"
        "<parameter=flag>True</parameter>\n</function>\n</tool_call>"
    )  # fmt: skip
    found = [Call("get_weather", {"city": "05", "days": "05", "where": {"a": 1}, "other": 1.5, "flag": True})]
    assert read(form_of("coder"), text) == ("", found)


# --- text that is no call ---


NO_CALLS = {
    "hermes": [
        "<tool_call>get_weather</tool_call>",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}',
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n',
        '<tool_call>\n{"name": "get_weather", "arguments": "Rome"}\n</tool_call>',
        '<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "get_weather", "arguments": {"days": NaN}}\n</tool_call>',
        '<tool_call>\n{"name": "get_weather", "arguments": {"days": 1e999}}\n</tool_call>',
        '<tool_call>\n{"name": "get_weather", "arguments": {"days": ' + "9" * 5000 + "}}\n</tool_call>",
        '<tool_call>\n{"name": "get_weather", "arguments": {"a": ' + "[" * 2000 + "]" * 2000 + "}}\n</tool_call>",
        '{"name": "get_weather", "arguments": {"city": "Rome"}}',
        "It is <tool_call> that begins one.\n",
        " \n",
        "",
    ],
    "mistral": ['[ {"name": "get_weather", "arguments": {}}]', "[]", "It is 5."],
    "llama": [
        '{"name": "Ada", "parameters": {}}',
        '{"name": "get_weather", "parameters": {"city": "Rome"}} is what I would call.',
        'I call {"name": "get_weather", "parameters": {"city": "Rome"}}',
        '{"name": "get_weather", "parameters": {"city": "Rome"}',
        '{"temperature": 5}\n',
    ],
    "coder": [
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>",
        "<tool_call>\n<function=>\n</function>\n</tool_call>",
        "<tool_call>\n<function=get_weather>\nRome\n</function>\n</tool_call>",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("template", "text"), [(name, text) for name, texts in NO_CALLS.items() for text in texts])
def test_what_is_no_whole_call_stays_text(template: str, text: str) -> None:
    assert read(form_of(template), text) == (text, [])
    assert read(form_of(template), text, list(range(len(text)))) == (text, [])


def test_a_call_behind_one_that_is_broken_is_still_a_call() -> None:
    broken = '<tool_call>\n{"name": "get_weather", "argum</tool_call>'
    whole = rendered("hermes", [ROME])
    assert read(form_of("hermes"), f"{broken}\n{whole}") == (broken, as_calls([ROME]))
    assert read(form_of("hermes"), f"{whole}\n{broken}") == (broken, as_calls([ROME]))


def test_an_unfinished_list_of_calls_is_text_without_its_special_token() -> None:
    text = rendered("mistral", [ROME, HARD])
    said, calls = read(form_of("mistral"), text[:-1])
    assert calls == []
    assert SPECIAL + said == text[:-1]


def test_text_comes_before_a_call_can_begin_and_not_only_at_the_end() -> None:
    stream = CallStream(form_of("hermes"), [WEATHER])
    assert stream.push("I use 1 < 2 <tool").text == "I use 1 < 2"
    assert stream.push("box> now").text == " <toolbox> now"
    assert stream.push(".\n\n<tool_call>").text == "."
    told = stream.push('\n{"name": "now", "arguments": {}}\n</tool_call>')
    assert (told.text, told.calls) == ("", (Call("now", {}),))
    assert stream.push("\nSo be it.").text == "\nSo be it."


def test_only_so_many_calls_are_taken() -> None:
    for template in ("hermes", "mistral", "coder"):
        text = rendered(template, [ROME, HARD])
        assert read(form_of(template), text, most=1) == ("", as_calls([ROME]))
        assert read(form_of(template), text, list(range(len(text))), most=1) == ("", as_calls([ROME]))


def test_half_of_a_pair_in_arguments_can_be_sent() -> None:
    (call,) = read(form_of("hermes"), '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>')[1]
    call.arguments_text.encode()
    assert json.loads(call.arguments_text) == {"a": "\ud800"}


# --- cuts ---

FRAGMENTS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "\n", " ", "Hi.", "<", "{", "}", SPECIAL, "[", "]", ", ", "<function=",
     "get_weather", ">", "<parameter=", "city", "</parameter>", "</function>", '"',
     '{"name": "get_weather", "arguments": {"city": "x"}}',
     '{"name": "get_weather", "parameters": {"city": "</tool_call>"}}']
)  # fmt: skip
WHOLE_CALLS = st.sampled_from([(one,) for one in (ROME, HARD, NOTHING)] + [(ROME, HARD), (NOTHING, ROME)])


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(TEMPLATES)),
    st.lists(FRAGMENTS | WHOLE_CALLS, max_size=8),
    st.lists(st.integers(0, 400), max_size=30),
    st.sampled_from([None, 1, 2]),
)
def test_any_cut_gives_the_calls_and_the_text_of_the_whole(
    template: str, parts: list[Any], cuts: list[int], most: int | None
) -> None:
    form, text = form_of(template), ""
    for part in parts:
        several = list(part)[:1] if template == "llama" and not isinstance(part, str) else part
        text += several if isinstance(several, str) else rendered(template, list(several))
    assert read(form, text, cuts, most=most) == read(form, text, most=most)


@settings(max_examples=150, deadline=None)
@given(st.lists(FRAGMENTS, max_size=8))
def test_without_a_call_not_a_character_is_lost(parts: list[str]) -> None:
    text = "".join(parts)
    for template in TEMPLATES:
        said, calls = read(form_of(template), text)
        if not calls:
            assert said == (text.replace(SPECIAL, "") if template == "mistral" else text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(min_size=1), JSON, max_size=4), st.sampled_from(["hermes", "mistral", "llama"]))
def test_any_arguments_come_back(arguments: dict[str, Any], template: str) -> None:
    form, written = form_of(template), [{**ROME, "function": {"name": "get_weather", "arguments": arguments}}]
    text = marked(form, rendered(template, written))
    told = CallStream(form, [WEATHER]).push(text, is_last=True)
    if "<|im_end|>" not in json.dumps(arguments):
        assert told == ("", (Call("get_weather", arguments),))


# --- tokens ---


def conversation(*calls: dict[str, Any], content: str = "") -> Conversation:
    messages: Any = [QUESTION, {"role": "assistant", "content": content, "tool_calls": list(calls)}]
    return Conversation(tuple(messages), tools=(WEATHER,))


@pytest.mark.parametrize("template", TEMPLATES)
def test_calls_are_trained_as_the_ids_of_the_tokenizer_s_own_template(template: str) -> None:
    encoder, tokenizer = tool_encoder(template), tool_tokenizer(template)
    calls = [ROME] if template == "llama" else [ROME, HARD]
    (example,) = encoder.encode(conversation(*calls))
    listed = [{"id": f"{place:09d}", **call} for place, call in enumerate(calls, 1)]
    answer = {"role": "assistant", "content": "", "tool_calls": listed}
    ids = tokenizer.apply_chat_template([QUESTION, answer], [WEATHER], return_dict=False)
    assert example.input_ids.tolist() == ids[: len(example.input_ids)]
    assert tokenizer.decode(ids[len(example.input_ids) :]).strip() == ""
    trained = [label for label in example.labels.tolist() if label != IGNORED]
    assert trained.count(SPECIAL_ID) == (template == "mistral")
    assert trained == encoder.reply_ids([QUESTION], conversation(*calls).messages[-1], [WEATHER])  # type: ignore[list-item]


def test_a_special_token_in_an_argument_stays_text_beside_the_template_s_own() -> None:
    encoder = tool_encoder("mistral")
    (example,) = encoder.encode(conversation(call_of(city=f"{SPECIAL}<|im_end|>")))
    trained = [label for label in example.labels.tolist() if label != IGNORED]
    assert (trained.count(SPECIAL_ID), trained.count(encoder.end_id)) == (1, 1)
    text = encoder.tokenizer.decode(trained)
    assert text == f'{SPECIAL} [{{"name": "get_weather", "arguments": {{"city": "{SPECIAL}<|im_end|>"}}, ' + (
        '"id": "000000001"}]<|im_end|>'
    )


PRIVATE_USE = "\U000f0000\U000f0001\U000f0002\U000f0003"
"""Characters by which special tokens of a text might be kept apart."""


@pytest.mark.parametrize("beside", ["", SPECIAL, "<|endoftext|>"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_characters_of_private_use_in_a_call_are_trained_as_they_are(template: str, beside: str) -> None:
    encoder = tool_encoder(template)
    call = call_of(city=f"a{PRIVATE_USE[:2]}{beside}b{PRIVATE_USE}", **{f"key{PRIVATE_USE[0]}": PRIVATE_USE[1]})
    (example,) = encoder.encode(conversation(call))
    trained = [label for label in example.labels.tolist() if label != IGNORED]
    expected = rendered(template, [call]).replace("call00000", "000000001")  # ids are numbers in training
    assert encoder.tokenizer.decode(trained) == expected + "<|im_end|>"
    assert trained.count(SPECIAL_ID) == (template == "mistral")
    assert trained.count(encoder.end_id) == 1


def streamed(encoder: Encoder, ids: list[int]) -> tuple[str, list[Call]]:
    """What comes of the tokens of an answer."""
    form = encoder.call_form
    assert form is not None
    text, calls = TextStream(encoder.tokenizer, marks=encoder.call_marks), CallStream(form, [WEATHER])
    told = [calls.push(text.push(token).text) for token in ids]
    told.append(calls.push(text.finish().text, is_last=True))
    return "".join(one.text for one in told), [call for one in told for call in one.calls]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_trained_tokens_of_a_call_are_read_as_the_call(template: str) -> None:
    encoder = tool_encoder(template)
    calls = [ROME] if template == "llama" else [ROME, HARD]
    (example,) = encoder.encode(conversation(*calls))
    trained = [label for label in example.labels.tolist() if label != IGNORED]
    assert streamed(encoder, trained[:-1]) == ("", as_calls(calls))


def test_a_special_token_is_the_opening_and_its_letters_are_not() -> None:
    encoder = tool_encoder("mistral")
    text = rendered("mistral", [ROME])
    as_token = encoder.tokenizer(text, add_special_tokens=False).input_ids
    as_text = encoder.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert streamed(encoder, as_token) == ("", as_calls([ROME]))
    assert streamed(encoder, as_text) == (text, [])


# --- what the template has no place for ---


@pytest.mark.parametrize(
    ("template", "tools", "what"),
    [
        (TEMPLATES["hermes"].replace("tool | tojson", "''"), [WEATHER], "tools"),
        (TEMPLATES["hermes"].replace("m.tool_calls %}", "false %}", 1), [], "tool calls"),
        (TEMPLATES["hermes"].replace("{% if m.content %}", "{% if m.role != 'tool' %}"), [], "tool results"),
    ],
)
def test_what_the_template_drops_is_refused(template: str, tools: list[dict[str, Any]], what: str) -> None:
    encoder = tool_encoder(template)
    messages: Any = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [ROME]},
                     {"role": "tool", "content": "17 degrees"}]  # fmt: skip
    with pytest.raises(
        ToolError, match=rf"^the chat template \(chat\) does not support {what}, and some are given"
    ) as caught:
        encoder.prompt_ids(messages, tools)
    assert caught.value.exit_code == Exit.DATA
    tool_encoder("hermes").prompt_ids(messages, tools)


def test_calls_get_ids_only_where_the_template_takes_none_without() -> None:
    messages: Any = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [ROME, HARD]},
                     {"role": "tool", "content": "a"}, {"role": "tool", "content": "b"}, QUESTION]  # fmt: skip
    prompt = tool_encoder("mistral").tokenizer.decode(tool_encoder("mistral").prompt_ids(messages, [WEATHER]))
    assert '"id": "000000001"}, {' in prompt
    assert '{"content": "a", "call_id": "000000001"}' in prompt
    assert '{"content": "b", "call_id": "000000002"}' in prompt
