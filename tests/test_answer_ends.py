"""How templates end answers: the token that is trained is the one that renderings show, or the user is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_chat_template import CHATML, encoder_of, learnt, model_folder, row, shipped, tokenizer_of
from typer.testing import Result

from loratune.data.encoding.encoder import Encoder
from loratune.data.template.answer_ends import MARK
from loratune.errors import Exit, LoratuneError
from loratune.recipe.sections import PromptSettings

CLI = Callable[..., Result]
NO_TOKEN = "{% for m in messages %}{{ '\\n' + m.role + ': ' + m.content + END }}{% endfor %}{{ '' }}"
PROMPT = "{% if add_generation_prompt %}{{ '\\nassistant: ' }}{% endif %}"


def ending(text: str) -> str:
    """A template without special tokens that ends every turn with a text."""
    return NO_TOKEN.replace("END", json.dumps(text)) + PROMPT


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("m.content|upper", "is not in what it makes of it"),
        ("m.content|title", "is not in what it makes of it"),
        ("m.content|replace('-', ' ')", "is not in what it makes of it"),
        ("m.content|reverse", "is not in what it makes of it"),
        ("''", "is not in what it makes of it"),
        ("m.content[:5]", "is not in what it makes of it"),
        ("m.content + ' (' + m.content + ')'", "is several times in what it makes of it"),
    ],
)
def test_a_template_that_does_not_write_an_answer_as_it_is_is_refused(change: str, words: str) -> None:
    written = f"(({change}) if m.role == 'assistant' else m.content)"
    with pytest.raises(LoratuneError, match="does not write an answer as it is") as caught:
        encoder_of(CHATML.replace("m.content", written))
    assert caught.value.exit_code == Exit.MODEL
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        "m.content|lower",
        "m.content|replace('  ', ' ')",
        "m.content.split()|join(' ')",
        "m.content|replace('&', '&amp;')",
        "m.content|replace('\\n\\n\\n', '\\n\\n')",
        "m.content|replace('\"', '')",
        "m.content|replace('*', '')",
        "m.content.encode('ascii', 'ignore').decode()",
    ],
)
def test_a_template_that_changes_a_text_in_other_ways_is_told(change: str) -> None:
    (remark,) = encoder_of(CHATML.replace("m.content", f"({change})")).remarks
    assert "changes the text of earlier answers" in remark


@pytest.mark.parametrize("instead", ["''", "'(an answer)'"])
def test_a_template_that_leaves_earlier_answers_out_is_told(instead: str) -> None:
    written = f"({instead} if m.role == 'assistant' and not loop.last else m.content)"
    (remark,) = encoder_of(CHATML.replace("m.content", written)).remarks
    assert "leaves the text of earlier answers out" in remark
    assert "changes" not in remark


@pytest.mark.parametrize("kept", ["m.content|trim", "m.content", "' ' + m.content + ' '"])
def test_blanks_around_a_text_are_no_matter(kept: str) -> None:
    encoder = encoder_of(CHATML.replace("m.content", f"({kept})"))
    assert not any("changes the text" in remark for remark in encoder.remarks)
    assert encoder.tokenizer.decode([encoder.end_id]) == "<|im_end|>"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("END\n", "ends an answer with 'END\\n', which is no end token: '<|im_end|>' is trained as the end of every"),
        ("\n###", "ends an answer with '\\n###', which is no end token"),
        ("", "sets no end token after an answer: '<|im_end|>' is trained as the end of every answer, and generation"),
        ("\n", "sets no end token after an answer"),
    ],
)
def test_a_template_without_an_end_token_is_told_with_what_generation_stops_on(text: str, words: str) -> None:
    encoder = encoder_of(ending(text))
    assert [words in remark for remark in encoder.remarks] == [True]
    assert learnt(encoder, row("a", "one")) == "one<|im_end|>"
    assert encoder.end_id == encoder.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("behind", "end", "words"),
    [
        ("'<|im_end|>\\n'", "<|im_end|>", ""),
        ("'<|endoftext|>'", "<|endoftext|>", ""),
        ("' <|endoftext|>\\n'", "<|endoftext|>", ""),
        ("'<|endoftext|><|im_end|>'", "<|endoftext|>", ""),
        ("'END<|endoftext|>'", "<|endoftext|>", "writes 'END' between an answer and '<|endoftext|>'"),
        # Only where the conversation goes on, as some templates do.
        ("'' if loop.last and m.role == 'assistant' else '<|endoftext|>'", "<|endoftext|>", ""),
        # The last answer of training has another end than earlier ones, as with gpt-oss.
        ("'<|endoftext|>' if loop.last and m.role == 'assistant' else '<|im_end|>'", "<|endoftext|>", ""),
        # What begins the next turn ends no answer.
        ("''", "<|im_end|>", "sets no end token after an answer"),
    ],
)
def test_the_end_token_is_what_stands_behind_an_answer(behind: str, end: str, words: str) -> None:
    encoder = encoder_of(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{{ " + behind + " }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    assert learnt(encoder, row("a", "one")) == f"one{end}"
    assert [words in remark for remark in encoder.remarks] == [True] * bool(words)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_5_think", "lfm2", "nemotron_3_nano"])
def test_templates_of_the_field_whose_tokens_are_known_need_no_word(name: str) -> None:
    encoder = encoder_of(shipped(name))
    assert encoder.tokenizer.decode([encoder.end_id]) == "<|im_end|>"
    assert [remark for remark in encoder.remarks if "end" in remark or "changes" in remark] == []


@pytest.mark.parametrize("name", ["plain", "alpaca"])
def test_own_templates_need_no_word(name: str) -> None:
    assert Encoder(tokenizer_of(CHATML), PromptSettings(template=name)).remarks == []


def test_a_template_that_drops_texts_because_it_wants_parts_is_refused() -> None:
    with pytest.raises(LoratuneError, match=f"{MARK!r} is not in what it makes of it"):
        encoder_of(shipped("smolvlm"))


def test_check_and_sft_tell_of_a_missing_end_and_refuse_a_changed_text(
    cli: CLI, tmp_path: Path, rows_file: Path, random_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    flags: dict[str, Any] = {"--data.train": rows_file, "--training.max_steps": 1, "--output": tmp_path / "run"}
    given = [part for pair in flags.items() for part in pair]
    told = "ends an answer with 'END\\n', which is no end token: '<|im_end|>' is trained as the end of every answer"
    base = model_folder(tmp_path / "ends", ending("END\n"), random_qwen)
    for command in (["data", "check"], ["sft"]):
        done = cli(*command, "--model.base", base, *given)
        assert done.exit_code == Exit.OK, done.stderr
        assert "warning" in done.stderr
        assert told in " ".join(done.stderr.split())
    base = model_folder(tmp_path / "upper", CHATML.replace("m.content", "m.content|upper"), random_qwen)
    for command in (["data", "check"], ["sft", "--overwrite"]):
        done = cli(*command, "--model.base", base, *given)
        assert done.exit_code == Exit.MODEL, done.stderr
        assert "does not write an answer as it is" in done.stderr
