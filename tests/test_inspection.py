"""Odd texts and loops: what has to be found, and ordinary rows in many languages that must not be."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import TINY_QWEN
from typer.testing import Result

from loratune.data.checks.broken_off import breaks_off
from loratune.data.checks.inspection import FLAGS, Inspector, is_garbled, is_repetitive
from loratune.data.encoding.tokens import normal_form
from loratune.data.formats.conversation import Conversation
from loratune.recipe.findings import Finding

ROOT = Path(__file__).resolve().parent.parent
ADDED = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "  ", "[a-z]"]
SPECIAL = ADDED[:3]
SENTENCE = "Bücher über die Geschichte der Städte, señor: «l’été à Besançon»"

ORDINARY = [
    "“Don’t — it’s naïve,” said Zoë… 5 € or £4, ½ of 20 °C ± 1; § 3, ¶ 2, © 2024 ACME™ ®",
    SENTENCE,
    "»Übung macht den Meister«, sagte Jürgen. „Straße“ – und »Ähnliches«.",
    "Menüden “Klasör Aç”a dokunun, ”är jag” eller ”mamma”",
    "Příliš žluťoučký kůň úpěl ďábelské ódy. Zażółć gęślą jaźń. Árvíztűrő tükörfúrógép",
    "Tiếng Việt có nhiều dấu: Nguyễn Văn Ế, đường phố, ồ ạt",
    "Kæmi ný öxi hér, ykist þjófum nú bæði víl og ádrepa. Á É Ý Ú Í Ó Þ Æ Ð Ö",
    "áéýúíóþæðö ÁÉÝÚÍÓÞÆÐÖ",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. „Добре“ — каза тя №5",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. «Γειά σου», είπε.",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "ภาษาไทย ๑๒๓ และ हिन्दी में पाठ, தமிழ்",
    "日本語のテキストと、カタカナ・ひらがな・漢字「例えば」…横浜〜東京。(*´▽`*) m(_ _)m ヽ(´ー`)ノ",
    "모든 국민은 인간으로서의 존엄과 가치를 가진다. ㅋㅋㅋ",
    "联通和移动的套餐有什么区别？“中国联通”——价格：￥99／月；涓涓细流，锦绣前程。",
    "臺灣的繁體中文：鬱鬱蔥蔥、龍飛鳳舞、鑼鼓喧天，藝術與醫學。",
    "镆铘锒铛钅钆钇钋钊钌钍钏钐钔钗钕钚钛钜钣钤钫钪钭钬钯钰钲钴钶钷钸钹钺钼钽钿铄铈铉铊铋铌铍",
    "😀👍🏽 🇨🇳 👨‍👩‍👧 ❤️ ✔ ✘ ★☆ → ⇒ ▶ ① Ⅳ",
    "∀ε>0 ∃δ>0: |x−a|<δ ⇒ |f(x)−f(a)|<ε; ∑ᵢ xᵢ² ≤ ∞, √2 ≈ 1.41, ∫₀¹ x dx = ½, π ≠ 3, 3×4÷2, µm, Å",
    "┌────┬────┐\n│ 名 │ €5 │\n├────┼────┤\n│ a  │ ½  │\n└────┴────┘ ╔═╗ ║x║ ╚═╝ ░▒▓█",
    "├── src\n│   ├── main.py\n└── README.md",
    "ˈnaːt͡ʃə /ʃwɑː/ [ŋ] Ĉu vi ŝatas? oʻzbek Kā‘anapali l·l “‘quoted’” ¿Qué? ¡Olé!",
    "Fran\u0327ais de\u0301compose\u0301 \u00a0non\u202fbreaking\u200bspace\ufeff",
]


def conversation(*texts: str, roles: str = "ua", untrained: frozenset[int] = frozenset()) -> Conversation:
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    messages: Any = tuple({"role": names[role], "content": text} for role, text in zip(roles, texts, strict=True))
    return Conversation(messages, untrained=untrained)


def findings(said: Conversation, trained: list[int] | None = None, thinking: bool = False) -> list[str]:
    bits = Inspector(ADDED, SPECIAL, thinking).flags(said, trained or [])
    assert 0 <= bits < 2**31
    return [name for place, name in enumerate(FLAGS) if bits >> place & 1]


def test_flags_are_findings_and_have_an_order_that_files_rely_on() -> None:
    assert set(FLAGS) <= set(get_args(Finding))
    assert FLAGS == (
        "empty", "short", "garbled", "control_tokens", "control_tokens_in_answers", "repetitive", "thinking",
        "no_reasoning", "broken_off", "only_reasoning", "normalized", "open_reasoning",
    )  # fmt: skip


def test_an_ordinary_conversation_has_no_flags() -> None:
    assert findings(conversation("Be kind.", "How are you?", "Well, thanks.", roles="sua"), list(range(100))) == []


@pytest.mark.parametrize("name", ["identity", "company_faq"])
def test_shipped_rows_have_no_flags(name: str) -> None:
    for row in json.loads((ROOT / "data" / f"{name}.json").read_text(encoding="utf-8")):
        assert findings(conversation(row["instruction"], row["output"])) == []


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("", ["empty"]), (" \n\u3000", ["empty"]), ("3", ["short"]), (" 是\n", ["short"]), ("no", []), ("两个", [])],
)
def test_answers_without_text_or_of_one_character_are_found(answer: str, expected: list[str]) -> None:
    assert findings(conversation("How many?", answer)) == expected


def test_an_answer_that_is_not_trained_or_calls_a_tool_may_be_empty() -> None:
    assert findings(conversation("", "", "Go on", "Yes, gladly", roles="uaua", untrained=frozenset({1}))) == []
    call: Any = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now", "arguments": {}}}]}
    said = Conversation(({"role": "user", "content": "What time is it?"}, call))
    assert findings(said) == []


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_not_garbled(text: str) -> None:
    assert not is_garbled(text)
    assert not is_garbled("\n".join([text] * 50))


@pytest.mark.parametrize("text", ["caf\ufffd", "a\x93quote\x94", "锟斤拷锟斤拷", "值是烫烫烫烫", "屯屯屯"])
def test_lost_and_uninitialised_characters_are_garbled(text: str) -> None:
    assert is_garbled(text)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "macroman", "cp1250"])
@pytest.mark.parametrize("text", [SENTENCE, "Ordinary text with one café in it", "“Quotes” and it’s"])
def test_utf_8_read_as_an_encoding_of_latin_letters_is_garbled(text: str, encoding: str) -> None:
    assert is_garbled(text.encode().decode(encoding, "replace"))


CHINESE = ["请根据以下文本写一个摘要。", "人工智能（AI）是计算机科学的一个分支，旨在让机器具有智能。", "北京上海广州"]


@pytest.mark.parametrize("text", CHINESE)
@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("utf-8", "latin-1"), ("utf-8", "cp1252"), ("utf-8", "gbk"), ("utf-8", "gb18030"), ("utf-8", "big5"),
        ("gb18030", "latin-1"), ("gb18030", "cp1252"), ("gb18030", "utf-8"),
    ],
)  # fmt: skip
def test_chinese_read_in_the_wrong_encoding_is_garbled(text: str, written: str, read: str) -> None:
    assert not is_garbled(text)
    assert is_garbled(text.encode(written).decode(read, "replace"))
    assert is_garbled(f"Ordinary English around {text.encode(written).decode(read, 'replace')} it")


def test_utf_8_read_as_gbk_is_found_without_any_lost_character() -> None:
    mojibake = "北京上海广州".encode().decode("gbk")
    assert mojibake == "鍖椾含涓婃捣骞垮窞"
    assert is_garbled(mojibake)


def test_garbled_text_is_found_in_every_message() -> None:
    for place in range(3):
        texts = ["System", "Question", "Answer"]
        texts[place] = "cafÃ©"
        assert findings(conversation(*texts, roles="sua")) == ["garbled"]


@pytest.mark.parametrize("token", ["<|im_end|>", "<think>", "<tool_call>", "[a-z]"])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_added_tokens_are_found_in_what_is_no_answer(token: str, place: int) -> None:
    texts = ["Be kind.", "Call it.", "Calling…", "42", "It is 42."]
    texts[place] += f" {token}"
    assert findings(conversation(*texts, roles="suata")) == ["control_tokens"]


def test_only_special_tokens_are_found_in_answers() -> None:
    assert findings(conversation("Hi", "Bye<|im_end|>")) == ["control_tokens_in_answers"]
    assert findings(conversation("Hi", "<tool_call>{}")) == []
    assert findings(conversation("Hi  there", "a  b [a-z")) == []


def test_a_tokenizer_without_added_tokens_finds_none() -> None:
    assert Inspector([], [], False).flags(conversation("", "<|im_end|> text"), []) == 0


def test_reasoning_is_found_where_prompts_ask_for_none() -> None:
    said = conversation("Why?", "<think>\nBecause.\n</think>\n\nSo.")
    assert findings(said) == ["thinking"]
    assert findings(said, thinking=True) == []
    assert findings(conversation("Why?", "<think>\n\n</think>\n\nSo.")) == []
    assert findings(conversation("Why?", "<think>Never closed")) == ["thinking", "open_reasoning"]


PARAGRAPH = [(7 * n * n + 31 * n) % 5003 for n in range(160)]


@pytest.mark.parametrize("before", range(0, 160, 7))
@pytest.mark.parametrize("phrase", [[9001], [9001, 9002], [9001, 9002, 9003, 9001, 9004]])
def test_a_loop_is_found_wherever_it_begins(phrase: list[int], before: int) -> None:
    loop = phrase * (75 // len(phrase))
    assert is_repetitive(PARAGRAPH[:before] + loop)
    assert is_repetitive(PARAGRAPH[:before] + loop + PARAGRAPH[before:])


def test_a_long_phrase_is_a_loop_from_the_fourth_time_on() -> None:
    sentence = [9000 + n for n in range(40)]
    assert is_repetitive(PARAGRAPH[:64] + sentence * 4)
    assert not is_repetitive(PARAGRAPH[:64] + sentence * 3)


def test_what_is_shorter_than_64_ids_is_no_loop() -> None:
    assert not is_repetitive([1] * 63)
    assert is_repetitive([1] * 64)
    assert findings(conversation("Hi", "I am sorry."), [1, 2, 3, 4] * 30) == ["repetitive"]


def test_tables_code_and_lists_are_no_loops() -> None:
    bar, line, yes, no = 1, 2, 3, 4
    source = random.Random(0)
    table = [i for n in range(30) for i in (bar, 100 + n, bar, yes, bar, no, bar, yes, bar, line)]
    truth = [i for n in range(16) for i in (bar, n >> 3 & 1, bar, n >> 2 & 1, bar, n >> 1 & 1, bar, n & 1, line)]
    numbered = [i for n in range(40) for i in (200 + n, 5, 6, source.randrange(1000), line)]
    binary = [source.randrange(2) for _ in range(300)]
    code = [i for n in range(30) for i in (10, 11, 12, 300 + n, 13, 14, 15, 16, 300 + n, 17, line)]
    for ids in (table, truth, numbered, binary, code, list(range(500))):
        assert not is_repetitive(ids)


# --- answers that break off, reasoning alone, other normal forms ---

PROSE = "Tea is a drink. It is made of leaves. Hot water is poured over them. People like it"
BROKEN_OFF = [
    "It is a reminder of the importance of",
    "First comes the water,",
    "Take these (",
    "萨克斯、小号、",
    "这主要是因为",
    f"{PROSE} in the morning and at ni",
    "1. Water is needed for all of the plants that grow here.\n2. Light is needed by each of these plants too.\n"
    "3. Soil holds the roots of the plants and gives them what they nee",
    "Here it is:\n```python\nprint(1)",
    "Here it is:\n~~~\nprint(1)",
    "````md\n```\nx\n```\nmore",
    "The list goes on. [truncated]",
    "The list goes on (output truncated) ...",
    "还有很多。【截断】",
]
WHOLE = [
    "Paris",
    "The",
    "apples, pears, plums",
    "def add(a, b):\n    return a + b",
    "```python\nprint(1)\n```",
    "Here:\n~~~\na\n~~~\nand\n```\nb\n```",
    "````md\n```\nx\n```\n````",
    "A title\n\nRoses are red\nViolets are blue\nSugar is sweet\nAnd so are you",
    f"{PROSE}.",
    f"{PROSE}: why",
    "- first item of the list\n- second item of the list\n- third item of the list",
    "See https://example.org/a-page-about-tea",
    "The word [truncated] stands in the middle of this.",
    "Use `[truncated]` as a mark. It is known.",
    "Dear Sir, thank you for your kind letter of the third of May.\n\nSincerely,\nAda Lovelace",
    "今天天气很好。我们去公园吧",
    "它是一种植物。它需要水。它也需要光。谢谢",
]


@pytest.mark.parametrize("answer", BROKEN_OFF)
def test_an_answer_that_breaks_off_is_found(answer: str) -> None:
    assert breaks_off(answer)
    assert breaks_off(answer + " \n")
    assert findings(conversation("a", answer)) == ["broken_off"]
    assert findings(conversation("a", answer, "b", "c d", roles="uaua", untrained=frozenset({1}))) == []


@pytest.mark.parametrize("answer", WHOLE)
def test_a_whole_answer_does_not_break_off(answer: str) -> None:
    assert not breaks_off(answer)


@pytest.mark.parametrize("name", ["identity", "company_faq"])
def test_hardly_any_shipped_row_is_said_to_break_off(name: str) -> None:
    rows = json.loads((ROOT / "data" / f"{name}.json").read_text(encoding="utf-8"))
    answers = [row["output"] for row in rows]
    assert sum(map(breaks_off, answers)) <= len(answers) / 100


def test_reasoning_alone_is_found_but_not_before_an_answer_or_a_call() -> None:
    alone = "<think>\nTwo and two.\n</think>\n\n"
    assert findings(conversation("2+2?", alone), thinking=True) == ["only_reasoning"]
    assert findings(conversation("2+2?", alone + "4."), thinking=True) == []
    called = conversation("2+2?", alone)
    called.messages[1]["tool_calls"] = [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    assert findings(called, thinking=True) == []


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("NFC", "cafe\u0301", True), ("NFC", "caf\u00e9", False), ("NFC", "\ufb01", False), ("NFKC", "\ufb01", True),
        ("NFD", "caf\u00e9", True), (None, "cafe\u0301", False),
    ],
)  # fmt: skip
def test_texts_in_another_normal_form_than_the_tokenizer_s_are_found(form: Any, text: str, expected: bool) -> None:
    for said in (conversation(text, "an answer"), conversation("a question", text)):
        bits = Inspector(ADDED, SPECIAL, False, form=form).flags(said, [])
        assert bool(bits >> FLAGS.index("normalized") & 1) is expected


@pytest.mark.parametrize("form", ["NFC", "NFKC", "NFD", "NFKD", None])
def test_the_normal_form_of_a_tokenizer_is_found_by_asking_it(form: Any) -> None:
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    assert normal_form(tokenizer) == "NFC"
    tokenizer.backend_tokenizer.normalizer = getattr(normalizers, form)() if form else normalizers.Sequence([])
    assert normal_form(tokenizer) == form


def test_rows_in_another_normal_form_are_told_once_with_their_number(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    rows = [{"instruction": f"Question {n}", "output": "Cafe\u0301." if n % 2 else "Caf\u00e9."} for n in range(6)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    flags = ("--model.base", "tiny-qwen", "--data.validation", "0", "--data.train", tmp_path / "rows.json")
    done = cli("data", "check", *flags, "--json")
    assert done.exit_code == 0, done.stderr
    assert {one["name"]: one["count"] for one in json.loads(done.stdout)["findings"]} == {"normalized": 3}
    assert "3 of 6 rows of data.train hold characters that the tokenizer rewrites" in done.stderr
