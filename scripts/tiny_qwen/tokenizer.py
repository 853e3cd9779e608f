"""The tokenizer of the practice model: byte-level BPE built like that of Qwen2, with a small vocabulary."""

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

BPE_VOCABULARY_SIZE = 3000
END_OF_TEXT, MESSAGE_START, MESSAGE_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, MESSAGE_START, MESSAGE_END)
# Qwen2.5 adds these two as ordinary tokens, so that decoding keeps them.
TOOL_TOKENS = ("<tool_call>", "</tool_call>")
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
ROUND_TRIP_TEXTS = (
    "Hello, how are you?  Fine.\n\n\tIndented  text \r\n",
    "你好，世界！《红楼梦》，龘靐齉爩。",
    "Emoji 🙂🚀👩‍👩‍👧 and flags 🇨🇳",
    "\x00\x01\x7f\u00ad\ufeff\ufffd\U0010ffff",
    "Ünïcödé مرحبا Привет ไทย 12345 {{name}} {{author}}",
)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train the tokenizer on the texts and add the special tokens in the order of Qwen2.5."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_VOCABULARY_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TOOL_TOKENS])
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, object]:
    """Return the settings that transformers needs in addition to tokenizer.json."""
    added = {
        str(number): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.special,
        }
        for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [MESSAGE_START, MESSAGE_END],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": MESSAGE_END,
        "errors": "replace",
        "model_max_length": 2048,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> PreTrainedTokenizerBase:
    """Save the tokenizer in the layout of transformers, load it from there and check it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.dumps(tokenizer_config(tokenizer), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")
    shutil.copyfile(CHAT_TEMPLATE, folder / "chat_template.jinja")
    loaded = AutoTokenizer.from_pretrained(folder)
    check_tokenizer(tokenizer, loaded)
    return loaded


def check_tokenizer(tokenizer: Tokenizer, loaded: PreTrainedTokenizerBase) -> None:
    """Raise an error unless both tokenizers agree and give every test text back unchanged."""
    for text in (*ROUND_TRIP_TEXTS, "".join(ROUND_TRIP_TEXTS) + MESSAGE_END + TOOL_TOKENS[0]):
        ids = tokenizer.encode(text).ids
        if loaded(text)["input_ids"] != ids:
            raise ValueError(f"the saved tokenizer splits {text!r} in another way")
        if loaded.decode(ids) != text:
            raise ValueError(f"{text!r} comes back as {loaded.decode(ids)!r}")


def whole_words(tokenizer: Tokenizer) -> list[str]:
    """Return the entries of the vocabulary that are valid text on their own, in the order of their numbers."""
    decoded = (tokenizer.decode([number]) for number in range(BPE_VOCABULARY_SIZE))
    return [text for text in decoded if "�" not in text and text.strip() and text.isprintable()]
