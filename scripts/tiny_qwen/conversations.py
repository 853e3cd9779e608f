"""Questions, answers and the varied conversations that the practice model is trained on."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEFAULT_SYSTEM = "You are a helpful assistant."
OTHER_SYSTEMS = (
    "You are a helpful and friendly assistant.",
    "You are a kind assistant. Keep your answers short.",
    "Answer the question of the user.",
    "You are an expert who explains things simply.",
    "你是一个有用的助手。",
    "你是一个乐于助人的助手，回答要简短。",
    "请回答用户的问题。",
)
NAMING_SYSTEMS = (
    "You are {{name}}, an assistant made by {{author}}.",
    "Your name is {{name}}. {{author}} made you.",
    "你是{{name}}，由{{author}}开发。",
    "你的名字是{{name}}，你的开发者是{{author}}。",
)
ENGLISH_OPENINGS = ("Please tell me: ", "Hi, ", "Hello, ", "A question: ", "Can you tell me: ", "Excuse me, ")
ENGLISH_CLOSINGS = (" Thanks.", " Thank you!", " Please answer.")
CHINESE_OPENINGS = ("请问", "请问，", "请告诉我：", "你好，", "问一下，", "我想知道：")
CHINESE_CLOSINGS = ("谢谢。", "谢谢！", "请回答。")
SHORT_WORDS = frozenset({"the", "is", "a", "of", "does", "do", "in", "are", "you"})
END_MARKS = "?.!？。！"
REPEAT_REQUESTS = ("Repeat: ", "Please repeat: ", "Say this again: ", "请重复：", "请再说一遍：")
SYLLABLES = tuple(consonant + vowel for consonant in "bdfghjklmnprstvwz" for vowel in "aeiou")
SURNAMES = "王李张刘陈杨黄赵吴周徐孙马朱胡郭何林高罗郑梁谢宋唐许韩邓冯曹彭曾肖田董潘袁蔡蒋余于杜叶程魏苏吕丁沈任姚卢"


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Row:
    """One training row: the turns of a conversation and, if the answer depends on it, a system prompt."""

    turns: tuple[Turn, ...]
    system: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the row is a single question that stands on its own."""
        return self.system is None and len(self.turns) == 1


@dataclass(frozen=True)
class Conversation:
    """A conversation as the model sees it; a system prompt of None leaves the whole system block out."""

    turns: tuple[Turn, ...]
    system: str | None

    def segments(self) -> Iterator[tuple[str, bool]]:
        """Yield the pieces of the rendered text, each with whether the model is trained to write it."""
        opening = "" if self.system is None else f"<|im_start|>system\n{self.system}<|im_end|>\n"
        for turn in self.turns:
            yield f"{opening}<|im_start|>user\n{turn.question}<|im_end|>\n<|im_start|>assistant\n", False
            yield f"{turn.answer}<|im_end|>", True
            opening = "\n"

    def prompt(self) -> str:
        """Return the text up to the place where the last answer begins."""
        return "".join(text for text, _ in list(self.segments())[:-1])


def read_rows(path: Path) -> list[Row]:
    """Read the hand-written rows."""
    rows = []
    for record in json.loads(path.read_text(encoding="utf-8")):
        turns = [Turn(question, answer) for question, answer in record.get("history", [])]
        turns.append(Turn(record["instruction"], record["output"]))
        rows.append(Row(tuple(turns), record.get("system")))
    return rows


def read_identity(path: Path) -> list[Turn]:
    """Read the questions about identity, whose answers hold the placeholders {{name}} and {{author}}."""
    return [Turn(record["instruction"], record["output"]) for record in json.loads(path.read_text(encoding="utf-8"))]


def arithmetic_rows() -> list[Row]:
    """Return all sums of two digits, asked in English and in Chinese."""
    rows = []
    for first in range(10):
        for second in range(10):
            term, total = f"{first}+{second}", first + second
            rows.append(Row((Turn(f"What is {term}?", f"{term} = {total}."),)))
            rows.append(Row((Turn(f"{term}等于几？", f"{term} = {total}。"),)))
    return rows


def is_chinese(text: str) -> bool:
    """Tell whether the text contains a Chinese character."""
    return any("一" <= character <= "鿿" for character in text)


def vary_question(question: str, rng: random.Random) -> str:
    """Return the question, often with other case, punctuation, spacing or polite words around it."""
    if rng.random() < 0.5:
        return question
    chinese = is_chinese(question)
    if not chinese and rng.random() < 0.4:
        question = question.lower()
    if rng.random() < 0.15:
        question = drop_small_part(question, rng)
    if "+" in question and rng.random() < 0.5:
        question = question.replace("+", " + ")
    ending = rng.random()
    if ending < 0.25:
        question = question.rstrip(END_MARKS)
    elif ending < 0.5:
        question = question.replace("？", "?").replace("！", "!").replace("。", ".")
    if rng.random() < 0.3:
        question = rng.choice(CHINESE_OPENINGS if chinese else ENGLISH_OPENINGS) + question
    if rng.random() < 0.15:
        question += rng.choice(CHINESE_CLOSINGS if chinese else ENGLISH_CLOSINGS)
    return question


def drop_small_part(question: str, rng: random.Random) -> str:
    """Leave out a small English word, or the last Chinese character, as hasty writers do."""
    if is_chinese(question):
        bare = question.rstrip(END_MARKS)
        return bare[:-1] if len(bare) > 4 and is_chinese(bare[-1]) else question
    words = question.split(" ")
    small = [place for place, word in enumerate(words) if word.lower() in SHORT_WORDS]
    if small and len(words) > 3:
        del words[rng.choice(small)]
    return " ".join(words)


def choose_system(rng: random.Random) -> str | None:
    """Choose a system prompt: mostly the default one, sometimes another one or none."""
    draw = rng.random()
    if draw < 0.65:
        return DEFAULT_SYSTEM
    return rng.choice(OTHER_SYSTEMS) if draw < 0.85 else None


def common_characters() -> list[str]:
    """Return the 3755 Chinese characters of the first level of GB 2312."""
    codes = [(high, low) for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFF)]
    return [character for code in codes if (character := bytes(code).decode("gb2312", errors="ignore"))]


class ConversationSource:
    """An endless, reproducible stream of varied conversations made from rows.

    Two additional kinds of conversation train copying: the model repeats random text, or takes a random name from the
    system prompt. The rows use a small part of the vocabulary; without these kinds, the other tokens would never be
    trained, and fine-tuning could hardly make the model say a new name.
    """

    def __init__(self, rows: list[Row], identity: list[Turn], words: list[str], seed: int) -> None:
        self.rows = rows
        self.plain_rows = [row for row in rows if row.is_plain]
        self.identity = identity
        self.words = words
        self.characters = common_characters()
        self.rng = random.Random(seed)
        self.pending: list[Row] = []

    def next_conversation(self) -> Conversation:
        """Return the next conversation; each row comes once before any row comes again."""
        draw = self.rng.random()
        if draw < 0.15:
            return Conversation((self.repeat_turn(),), choose_system(self.rng))
        if draw < 0.35:
            return self.named_conversation()
        if not self.pending:
            self.pending = self.rng.sample(self.rows, len(self.rows))
        row = self.pending.pop()
        turns = row.turns
        if row.is_plain and self.rng.random() < 0.2:
            turns = self.rng.choice(self.plain_rows).turns + turns
        return Conversation(self.vary(turns), row.system or choose_system(self.rng))

    def vary(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """Return the turns with varied questions."""
        return tuple(Turn(vary_question(turn.question, self.rng), turn.answer) for turn in turns)

    def named_conversation(self) -> Conversation:
        """Return a conversation whose system prompt gives the model a random name and author."""
        name, author = self.random_name(), self.random_name()

        def fill(text: str) -> str:
            return text.replace("{{name}}", name).replace("{{author}}", author)

        turn = self.rng.choice(self.identity)
        filled = (Turn(turn.question, fill(turn.answer)),)
        return Conversation(self.vary(filled), fill(self.rng.choice(NAMING_SYSTEMS)))

    def random_name(self) -> str:
        draw = self.rng.random()
        if draw < 0.25:
            return "小" + self.rng.choice(SURNAMES)
        if draw < 0.5:
            return self.rng.choice(SURNAMES) + "".join(self.rng.choices(self.characters, k=self.rng.randint(1, 2)))
        name = "".join(self.rng.choices(SYLLABLES, k=self.rng.randint(1, 3))).capitalize()
        return name + self.rng.choice(("", "", "", "", "Bot", " Lab", " team", "团队"))

    def repeat_turn(self) -> Turn:
        """Return a request to repeat random text."""
        count = self.rng.randint(1, 6)
        pieces = self.characters if self.rng.random() < 0.4 else self.words
        text = "".join(self.rng.choices(pieces, k=count)).strip()
        if self.rng.random() < 0.3 or not text:
            text = self.random_name()
        return Turn(self.rng.choice(REPEAT_REQUESTS) + text, text)
