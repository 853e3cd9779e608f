"""The chat page in a browser, in front of the real server and an engine whose answers the test writes."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import Scripted, ask, chromium, opened, pieces, text_of, wait_until
from serving import API_KEY, Served, served

from loratune.data.formats.conversation import Conversation
from loratune.data.formats.registry import ConversationReader, detect_format
from loratune.engine.engine import load_engine
from loratune.engine.types import Delta
from loratune.errors import Exit, LoratuneError
from loratune.generation.server.page_files import CHAT_PAGE

PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
ATTACK = """\
<script>window.harmed = 1</script>

<img src=x onerror="window.harmed = 1"> [click](javascript:window.harmed=1) [or](data:text/html,x)

| <b onclick="window.harmed=1">b</b> |
|---|
| <svg onload="window.harmed = 1"> |
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    with served(Scripted()) as running:
        yield running


@pytest.fixture
def engine(shared: Served) -> Iterator[Scripted]:
    """The server's engine as it was at first."""
    fresh = Scripted()
    vars(shared.engine).update(vars(fresh))
    yield shared.engine
    for handle in shared.engine.handles:
        handle.cancel()


@pytest.fixture
def page(browser: Any, shared: Served, engine: Scripted) -> Iterator[Any]:
    with opened(browser, shared) as opened_page:
        yield opened_page


def release(engine: Scripted, count: int) -> None:
    assert engine.go
    engine.go.release(count)


def saying(text: str, **details: Any) -> Any:
    return lambda _: pieces(text, **details)


def widest(page: Any) -> int:
    """How much wider than the window anything makes the page."""
    return int(
        page.evaluate(
            """() => Math.max(...["html", "body", "#scroller", "#settings"].map((name) => {
              const box = document.querySelector(name);
              return box.scrollWidth - box.clientWidth;
            }))"""
        )
    )


# --- answers ---


def test_an_answer_appears_as_it_is_written_and_ends_with_its_figures(page: Any, engine: Scripted) -> None:
    engine.say, engine.go = saying("Rice, *wheat* and `rye`.", size=6), threading.Semaphore(0)
    ask(page, "Which grains?", wait=False)
    page.wait_for_selector(".waiting", state="visible")
    release(engine, 1)
    page.wait_for_selector("text=Rice,")
    assert text_of(page, ".answer-text") == ["Rice,"]
    assert page.locator(".answer").get_attribute("aria-busy") == "true"
    release(engine, 99)
    page.wait_for_selector("body:not(.is-running)")
    assert text_of(page, ".answer-text") == ["Rice, wheat and rye."]
    assert text_of(page, ".answer-text em") == ["wheat"]
    assert text_of(page, ".answer-text code") == ["rye"]
    assert re.search(r"first token after \d+\.\d\d s", text_of(page, ".figures")[0])
    assert "5 tokens" in text_of(page, ".figures")[0]
    assert page.locator(".answer").get_attribute("aria-busy") == "false"
    assert "Rice, *wheat*" in page.locator("#status").text_content()


def test_reasoning_is_apart_and_can_be_unfolded(page: Any, engine: Scripted) -> None:
    engine.say = saying("Four.", reasoning="Two and two.")
    ask(page, "2 + 2?")
    assert text_of(page, ".answer-text") == ["Four."]
    assert not page.locator(".reasoning-text").is_visible()
    page.click(".reasoning summary")
    assert text_of(page, ".reasoning-text") == ["Two and two."]
    ask(page, "And now?")
    earlier = "<think>\nTwo and two.\n</think>\n\nFour."  # as in rows; the template keeps or drops it
    assert [message["content"] for message in engine.questions[-1].messages] == ["2 + 2?", earlier, "And now?"]


def test_the_practice_model_answers(browser: Any) -> None:
    model = load_engine([], "tiny-qwen")
    try:
        with served(model) as running, opened(browser, running) as page:
            ask(page, "Who are you?")
            (answer,) = text_of(page, ".answer-text")
            assert "assistant" in answer.lower() or "qwen" in answer.lower()
            assert page.locator("#compare").is_disabled()
    finally:
        model.close()


def test_what_a_model_writes_cannot_act(page: Any, engine: Scripted) -> None:
    engine.say = saying(ATTACK, reasoning=ATTACK, size=3)
    ask(page, ATTACK)
    page.wait_for_timeout(200)
    assert page.evaluate("window.harmed") is None
    assert page.locator(".turn :is(script, img, b, a)").count() == 0
    assert page.locator(".turn svg[onload], .turn [onclick], .turn [onerror]").count() == 0
    assert "<script>window.harmed = 1</script>" in text_of(page, ".answer-text")[0]
    assert "[click](javascript:window.harmed=1)" in text_of(page, ".answer-text")[0]


def test_links_lead_outside_without_telling_where_from(page: Any, engine: Scripted) -> None:
    engine.say = saying("See [this](https://example.com/x).")
    ask(page, "Where?")
    link = page.locator(".answer-text a")
    assert [link.get_attribute(name) for name in ("href", "target", "rel")] == [
        "https://example.com/x", "_blank", "noopener noreferrer",
    ]  # fmt: skip


def test_the_page_follows_an_answer_only_for_a_reader_at_its_end(page: Any, engine: Scripted) -> None:
    engine.say, engine.go = saying("line\n\n" * 300, size=60), threading.Semaphore(0)
    ask(page, "Much?", wait=False)
    release(engine, 15)
    to_end = (
        "() => { const s = document.querySelector('#scroller'); return s.scrollHeight - s.scrollTop - s.clientHeight }"
    )
    wait_until(page, "document.querySelectorAll('.answer-text p').length > 100")
    page.wait_for_timeout(100)
    assert page.evaluate(to_end) < 2
    page.mouse.move(600, 300)
    page.mouse.wheel(0, -400)
    page.wait_for_selector("#to-latest", state="visible")
    top = page.evaluate("document.querySelector('#scroller').scrollTop")
    release(engine, 99)
    page.wait_for_selector("body:not(.is-running)")
    assert page.evaluate("document.querySelector('#scroller').scrollTop") == top
    page.click("#to-latest")
    assert page.evaluate(to_end) < 2


# --- stop, again, edit ---


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_ends_the_answer_at_the_server_and_keeps_its_text(page: Any, engine: Scripted, how: str) -> None:
    engine.say, engine.go = saying("one two three", size=4), threading.Semaphore(0)
    ask(page, "Count", wait=False)
    release(engine, 1)
    page.wait_for_selector("text=one")
    if how == "button":
        page.click("#send")
    else:
        page.keyboard.press("Escape")
    page.wait_for_selector("body:not(.is-running)")
    assert engine.handles[0].cancelled.wait(20)
    assert text_of(page, ".answer-text") == ["one"]
    assert "stopped" in text_of(page, ".figures")[0]
    assert page.locator(".problem:visible").count() == 0


def test_the_last_question_is_answered_again_and_edited(page: Any, engine: Scripted) -> None:
    ask(page, "first")
    ask(page, "second")
    assert page.locator("[data-do=edit]:visible").count() == 1
    engine.say = saying("another")
    page.click(".turn.is-last [data-do=again]:visible")
    page.wait_for_selector("text=another")
    page.wait_for_selector("body:not(.is-running)")
    assert engine.questions[-1].messages == engine.questions[-2].messages

    page.click("[data-do=edit]:visible")
    assert page.input_value("#message") == "second"
    page.keyboard.press("Escape")
    assert page.input_value("#message") == ""
    page.focus("#message")
    page.keyboard.press("ArrowUp")
    page.fill("#message", "third")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=third")
    page.wait_for_selector("body:not(.is-running)")
    assert text_of(page, ".question-text") == ["first", "third"]
    assert [message["content"] for message in engine.questions[-1].messages] == ["first", "You said: first", "third"]


# --- side by side ---


def test_two_models_answer_side_by_side_and_each_goes_on_with_its_own_answers(page: Any, engine: Scripted) -> None:
    engine.say = lambda question: pieces(f"I am {question.adapter}.")
    page.wait_for_selector("#compare:enabled")
    page.click("#compare")
    page.select_option("#model-a", "wren")
    ask(page, "Who?")
    assert text_of(page, ".answer-model") == ["wren", "Qwen/base"]
    assert text_of(page, ".answer-text") == ["I am wren.", "I am None."]
    boxes = [page.locator(".answer").nth(place).bounding_box() for place in (0, 1)]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert abs(boxes[0]["y"] - boxes[1]["y"]) < 1

    ask(page, "Sure?")
    histories = {each.adapter: [message["content"] for message in each.messages] for each in engine.questions[2:]}
    assert histories == {"wren": ["Who?", "I am wren.", "Sure?"], None: ["Who?", "I am None.", "Sure?"]}
    page.click(".turn.is-last .answer >> nth=1 >> [data-do=again]:visible")
    page.wait_for_selector("body:not(.is-running)")
    assert [each.adapter for each in engine.questions[4:]] == [None]


# --- keys ---


def test_everything_can_be_done_from_the_keyboard(page: Any, engine: Scripted) -> None:
    page.wait_for_selector("#compare:enabled")
    assert page.evaluate("document.activeElement.id") == "message"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=You said: one")
    page.wait_for_selector("body:not(.is-running)")
    assert engine.questions[0].messages[-1]["content"] == "one\ntwo"
    page.keyboard.press("Alt+r")
    wait_until(page, "document.querySelector('.answer-text').innerText.includes('two')")
    page.wait_for_selector("body:not(.is-running)")
    assert len(engine.questions) == 2
    page.keyboard.press("Alt+c")
    assert page.locator("#model-b").is_visible()
    page.keyboard.press("Alt+s")
    assert page.evaluate("document.activeElement.name") == "system"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "open-settings"
    page.keyboard.press("Alt+h")
    assert page.locator("#help-dialog").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Alt+n")
    assert page.locator(".turn").count() == 0
    assert page.evaluate("document.activeElement.id") == "message"


def test_tab_reaches_every_control_and_shows_where_it_is(page: Any) -> None:
    ask(page, "one")
    page.evaluate("document.activeElement.blur()")
    wanted = page.evaluate(
        """[...document.querySelectorAll("button, select, textarea, a")].filter((each) =>
          each.checkVisibility({visibilityProperty: true}) && !each.disabled).length"""
    )
    seen, unmarked = set(), []
    for _ in range(3 * wanted):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
              const each = document.activeElement;
              const shown = each.id === "message" ? each.parentElement : each;
              const style = getComputedStyle(shown);
              return [each === document.body ? "" : each.id || each.dataset.do || each.className, style.outlineStyle];
            }"""
        )
        seen.add(name)
        if name and outline == "none":
            unmarked.append(name)
    buttons = {
        "model-a",
        "new-chat",
        "compare",
        "open-settings",
        "open-menu",
        "message",
        "edit",
        "copy-question",
        "again",
    }
    assert buttons | {"copy", "source", "skip"} <= seen
    assert unmarked == []


def test_enter_belongs_to_an_input_method_while_it_composes(page: Any, engine: Scripted) -> None:
    page.wait_for_selector("#model-a option", state="attached")
    page.fill("#message", "nihao")
    for details in ("isComposing: true", "keyCode: 229"):
        page.evaluate(
            "document.querySelector('#message').dispatchEvent("
            f"new KeyboardEvent('keydown', {{key: 'Enter', bubbles: true, cancelable: true, {details}}}))"
        )
    assert page.locator(".turn").count() == 0
    assert engine.questions == []


def test_every_control_has_a_name(page: Any) -> None:
    ask(page, "one")
    page.click("#open-settings")
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, input, select, textarea, dialog, aside, section")].filter((each) =>
          !each.getAttribute("aria-label") && !each.getAttribute("aria-labelledby")
          && !each.textContent.trim() && !each.labels?.length).map((each) => each.outerHTML)"""
    )
    assert nameless == []


# --- settings ---


def test_settings_reach_the_model(page: Any, engine: Scripted) -> None:
    page.click("#open-settings")
    page.fill("[name=system]", "Be brief.")
    page.fill("[name=temperature]", "0.7")
    for name, value in {
        "top_p": "0.9",
        "top_k": "20",
        "min_p": "0.05",
        "repetition_penalty": "1.1",
        "seed": "7",
    }.items():
        page.fill(f"[name={name}]", value)
    page.fill("[name=max_tokens]", "33")
    page.fill("[name=stop]", "END\nSTOP")
    ask(page, "Hello")
    question = engine.questions[0]
    assert question.messages[0] == {"role": "system", "content": "Be brief."}
    sampling = question.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.7, 0.9, 20, 0.05)
    assert (sampling.repetition_penalty, sampling.seed, sampling.max_new_tokens) == (1.1, 7, 33)
    assert sampling.stop == ("END", "STOP")

    page.click("#settings-form [type=reset]")
    ask(page, "Hello")
    assert engine.questions[1].sampling.stop == ()
    assert engine.questions[1].sampling.seed is None
    assert [message["role"] for message in engine.questions[1].messages] == ["user", "assistant", "user"]


def test_a_setting_that_cannot_be_keeps_the_question(page: Any, engine: Scripted) -> None:
    page.click("#open-settings")
    page.fill("[name=top_p]", "7")
    page.click("#close-settings")
    ask(page, "Hello", wait=False)
    page.wait_for_selector("#settings", state="visible")
    assert page.evaluate("document.activeElement.name") == "top_p"
    assert engine.questions == []
    assert page.input_value("#message") == "Hello"


# --- API key, failures ---


def test_the_api_key_leaves_the_address_and_is_asked_for_when_it_is_wrong(browser: Any, shared: Served) -> None:
    with opened(browser, shared, "/#api_key=wrong", expected="401") as page:
        page.wait_for_selector("#key-dialog", state="visible")
        assert page.url == f"{shared.url}/"
        assert page.locator("#key-wrong").is_visible()
        for given in ("wrong again", "wrong-again", API_KEY):
            page.fill("[name=key]", given)
            page.keyboard.press("Enter")
        page.wait_for_selector("#model-a option", state="attached")
        assert page.url == f"{shared.url}/"
        assert API_KEY not in page.evaluate("JSON.stringify(localStorage)")
        assert page.evaluate("document.cookie") == ""
        page.reload()
        ask(page, "still there?")
        assert text_of(page, ".answer-text") == ["You said: still there?"]


def test_without_an_api_key_the_page_says_so_and_can_try_again(browser: Any, shared: Served) -> None:
    with opened(browser, shared, "/", expected="401") as page:
        page.wait_for_selector("#key-dialog", state="visible")
        assert not page.locator("#key-wrong").is_visible()
        page.keyboard.press("Escape")
        page.wait_for_selector("text=The server needs its API key.")
        page.click("#load-again")
        page.fill("[name=key]", API_KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#model-a option", state="attached")
        assert not page.locator("#load-problem").is_visible()


def test_an_error_in_the_middle_keeps_the_text_and_offers_another_try(page: Any, engine: Scripted) -> None:
    failure = Delta(finish="error", error=LoratuneError("out of memory during generation", Exit.IO))
    engine.say, engine.go = lambda _: [Delta("Half of", tokens=1), failure], threading.Semaphore(0)
    ask(page, "What?", wait=False)
    release(engine, 1)
    page.wait_for_selector("text=Half of")
    release(engine, 1)
    page.wait_for_selector("body:not(.is-running)")
    assert text_of(page, ".answer-text") == ["Half of"]
    assert "out of memory" in text_of(page, ".problem-text")[0]
    engine.say, engine.go = saying("The whole."), None
    page.click(".problem [data-do=again]")
    page.wait_for_selector("text=The whole.")
    assert page.locator(".problem:visible").count() == 0


def test_a_question_that_is_refused_shows_the_server_s_reason(browser: Any, shared: Served, engine: Scripted) -> None:
    with opened(browser, shared, expected="400") as page:
        page.click("#open-settings")
        page.fill("[name=stop]", "x" * 300)
        ask(page, "What?")
        assert "stop" in text_of(page, ".problem-text")[0]


def test_a_server_that_is_full_or_gone_is_told(browser: Any) -> None:
    engine = Scripted(go=threading.Semaphore(0))
    with served(engine, slots=1, waiting=0) as running, opened(browser, running, expected="Failed to load") as page:
        page.wait_for_selector("#compare:enabled")
        page.click("#compare")
        ask(page, "Both?", wait=False)
        page.wait_for_selector("text=queue is full")
        release(engine, 99)
        page.wait_for_selector("body:not(.is-running)")
        assert sorted(text_of(page, ".answer-text")) == ["", "You said: Both?"]
        page.context.set_offline(True)
        ask(page, "Anyone?")
        assert set(text_of(page, ".turn.is-last .problem-text")) == {
            "The server cannot be reached. Is it still running?"
        }


# --- what stays, what leaves ---


def test_the_conversation_outlives_a_reload_but_not_a_new_chat_or_another_tab(page: Any, shared: Served) -> None:
    ask(page, "remember *me*")
    page.reload()
    assert text_of(page, ".question-text") == ["remember *me*"]
    assert text_of(page, ".answer-text") == ["You said: remember me"]
    other = page.context.new_page()
    other.goto(shared.url)
    assert other.locator(".turn").count() == 0
    other.close()
    page.click("#new-chat")
    assert page.locator(".turn").count() == 0
    page.reload()
    page.wait_for_selector("#empty", state="visible")
    assert page.locator(".turn").count() == 0


def test_the_conversation_is_exported_for_people_and_as_rows_to_train_on(page: Any, tmp_path: Path) -> None:
    page.wait_for_selector("#compare:enabled")
    page.click("#compare")
    ask(page, "Äpfel?")
    saved = {}
    for kind in ("markdown", "json"):
        page.click("#open-menu")
        with page.expect_download() as download:
            page.click(f"[data-export={kind}]")
        download.value.save_as(tmp_path / kind)
        saved[kind] = (tmp_path / kind).read_text(encoding="utf-8")
    assert "Äpfel?" in saved["markdown"]
    assert saved["markdown"].count("You said: Äpfel?") == 2
    rows = json.loads(saved["json"])
    reader = ConversationReader(detect_format(rows, {}), {}, {})
    for row, model in zip(rows, ["robin", "Qwen/base"], strict=True):
        conversation = reader.read(row)
        assert isinstance(conversation, Conversation)
        assert [turn["content"] for turn in conversation.messages] == ["Äpfel?", "You said: Äpfel?"]
        assert row["answers"][0]["model"] == model


def test_answers_questions_and_code_are_copied_as_they_were_written(
    page: Any, shared: Served, engine: Scripted
) -> None:
    engine.say = saying("Do *this*:\n\n```sh\nls -l\n```\n")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=shared.url)
    ask(page, "How?")
    copied = []
    for selector in ("[data-do=copy]", "[data-do=copy-question]", ".copy-code"):
        page.click(selector)
        page.wait_for_selector("#note.is-shown")
        copied.append(page.evaluate("navigator.clipboard.readText()"))
    assert copied == ["Do *this*:\n\n```sh\nls -l\n```\n", "How?", "ls -l"]
    page.click("[data-do=source]")
    assert text_of(page, ".answer-source") == ["Do *this*:\n\n```sh\nls -l\n```"]
    assert not page.locator(".answer-text").is_visible()


# --- looks ---


def test_nothing_is_wider_than_a_phone(browser: Any, shared: Served, engine: Scripted) -> None:
    engine.say = saying(
        "x" * 300 + "\n\n```\n" + "y" * 300 + "\n```\n\n| " + " | ".join("abcdefghij") + " |\n" + "|---" * 10 + "|\n"
        "\nhttps://example.com/" + "z" * 200 + "\n\n> - `" + "c" * 200 + "`\n"
    )
    engine.base_name = "Organisation/A-Very-Long-Name-Of-A-Base-Model-That-Goes-On-7B-Instruct"
    with served(engine) as running, opened(browser, running, **PHONE) as page:
        page.wait_for_selector("#compare:enabled")
        assert widest(page) <= 0
        page.click("#compare")
        ask(page, "w" * 300)
        assert widest(page) <= 0
        boxes = [page.locator(".answer").nth(place).bounding_box() for place in (0, 1)]
        assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
        page.click("#open-settings")
        assert widest(page) <= 0
        assert page.evaluate("document.querySelector('#chat').inert")
        page.click("#close-settings")
        page.click("#open-menu")
        box = page.locator("#menu").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360


def test_chinese_replaces_every_text_and_stays(page: Any, engine: Scripted) -> None:
    """What still reads the same after switching may only be names and keys."""
    texts = """() => [...document.querySelectorAll("body *")].flatMap((each) => [
      ...[...each.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data.trim()),
      each.getAttribute("aria-label"), each.getAttribute("title"), each.getAttribute("placeholder"),
      ...(each.content ? [...each.content.querySelectorAll("*")].map((inner) => inner.title) : []),
    ]).filter((text) => text && /[A-Za-z]{3}/.test(text))"""
    engine.say = saying("*1*", reasoning="2", finish="length")
    ask(page, "3")
    english = set(page.evaluate(texts))
    page.click("#open-menu")
    page.click("text=中文")
    chinese = set(page.evaluate(texts))
    names = {"loratune", "robin", "wren", "Qwen/base", "English", "Enter", "Shift", "Esc", "Alt"}
    assert {text for text in english & chinese if text not in names} == set()
    assert len(english) > 50
    assert page.evaluate("[document.documentElement.lang, document.title]") == ["zh-CN", "loratune 对话"]
    page.reload()
    assert page.get_attribute("#message", "placeholder") == "输入消息"


def test_both_languages_have_the_same_texts_and_the_page_uses_no_other(page: Any) -> None:
    english, chinese = page.evaluate(
        "async () => { const {TEXTS} = await import('/page/texts.js'); return [TEXTS.en, TEXTS.zh]; }"
    )
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        assert re.findall(r"\{\w+\}", text) == re.findall(r"\{\w+\}", chinese[key]), key
    sources = "\n".join(path.read_text(encoding="utf-8") for path in CHAT_PAGE.iterdir() if path.name != "texts.js")
    used = set(re.findall(r'data-(?:text|label|hint)="(\w+)"', sources)) | set(re.findall(r'\bt\("(\w+)"', sources))
    assert used <= english.keys()
    sources += (CHAT_PAGE / "texts.js").read_text(encoding="utf-8").partition("let language")[2]
    assert {key for key in english if f'"{key}"' not in sources} == set()


def test_a_chinese_browser_gets_chinese_at_once(browser: Any, shared: Served) -> None:
    with opened(browser, shared, locale="zh-TW") as page:
        assert text_of(page, "#empty h2") == ["向你的模型提问"]


CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([...color]) => {
    const [r, g, b] = color.slice(0, 3).map((value) => value / 255)
      .map((value) => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (each) => {
    for (; each; each = each.parentElement) {
      const color = rgba(getComputedStyle(each).backgroundColor);
      if (color[3] === 255) return color;
    }
    return rgba(getComputedStyle(document.body).backgroundColor);
  };
  const low = [];
  for (const each of document.querySelectorAll("body *")) {
    const hasText = [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!hasText || !each.checkVisibility() || each.closest("[disabled], #note")) continue;
    const [a, b] = [luminance(rgba(getComputedStyle(each).color)), luminance(behind(each))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push([each.className || each.localName, each.textContent.slice(0, 20), ratio]);
  }
  return low;
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_enough_in_both_themes(browser: Any, shared: Served, engine: Scripted, theme: str) -> None:
    sample = "# Head\n\nText `code` [link](https://example.com/)\n\n> quote\n\n```py\ncode\n```\n\n|a|\n|-|\n|b|\n"
    engine.say = saying(sample, reasoning="why", finish="length")
    with opened(browser, shared, color_scheme=theme) as page:
        assert page.evaluate(CONTRASTS) == []
        ask(page, "one")
        page.click(".reasoning summary")
        engine.say = lambda _: [Delta(finish="error", error=LoratuneError("broken", Exit.IO))]
        ask(page, "two")
        page.click("#open-settings")
        assert page.evaluate(CONTRASTS) == []


def test_the_theme_can_be_chosen_and_stays(page: Any) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.click("#open-menu")
    page.click("#menu >> text=Dark")
    dark = page.evaluate(background)
    assert dark != light
    page.reload()
    assert page.evaluate(background) == dark


# --- files ---


def test_the_page_s_files_take_nothing_from_elsewhere_and_never_make_elements_of_texts() -> None:
    for path in CHAT_PAGE.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path
        )
        assert not re.search(r"""(?:src|href|url\(|from|import)\s*[=(]?\s*["']?(?:https?:)?//""", text), path
        assert text.count("\n") <= 300 or path.suffix == ".css", path
        assert max(map(len, text.splitlines())) <= 120 or path.suffix == ".html", path
    page = (CHAT_PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
