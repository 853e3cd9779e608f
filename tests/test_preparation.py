"""Settings and files → encoded rows: splits, limits, and what is told of rows that were left out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS, TINY_QWEN

from loratune.data.assembly.dataset import as_dataset
from loratune.data.encoding.encoder import IGNORED, Encoder
from loratune.data.encoding.loaded_source import Rendering
from loratune.data.formats.conversation import Conversation
from loratune.data.formats.registry import ALPACA, ConversationReader
from loratune.data.preparation import PreparedData, prepare_data
from loratune.errors import Exit, LoratuneError
from loratune.recipe.data_sections import DataSettings
from loratune.recipe.sections import PromptSettings


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    from loratune.model.tokenizer import load_tokenizer

    return Encoder(load_tokenizer(TINY_QWEN), PromptSettings())


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return str(path)


def prepare(encoder: Encoder, seed: int = 42, max_length: int = 256, **data: Any) -> PreparedData:
    template = encoder.template_sha256  # some tests take a template of their own
    rendering = Rendering(encoder.settings, template, lambda: encoder, max_length)
    return prepare_data(DataSettings(**data), rendering, seed).checked()


def refusal(encoder: Encoder, **data: Any) -> str:
    with pytest.raises(LoratuneError) as caught:
        prepare(encoder, **data)
    assert caught.value.exit_code == Exit.DATA
    return str(caught.value)


def encoded(encoder: Encoder, rows: list[dict[str, Any]]) -> list[list[int]]:
    """Ids of one-turn rows, each encoded by itself."""
    reader = ConversationReader(ALPACA, {}, {})
    conversations = [reader.read(row) for row in rows]
    return [encoder.encode(one)[0].input_ids.tolist() for one in conversations if isinstance(one, Conversation)]


def ids(split: Any) -> list[list[int]]:
    return [] if split is None else list(as_dataset(split)["input_ids"])


def test_all_rows_are_encoded_in_file_order_without_validation(encoder: Encoder, rows_file: Path) -> None:
    prepared = prepare(encoder, train=[str(rows_file)], validation=0.0)
    assert ids(prepared.train) == encoded(encoder, ROWS)
    assert prepared.validation is None
    assert prepared.warnings == []


def test_figures_of_a_split_are_those_of_its_columns(encoder: Encoder, rows_file: Path) -> None:
    split = prepare(encoder, train=[str(rows_file)], validation=0.0).train
    dataset = as_dataset(split)
    assert dataset.column_names == ["input_ids", "labels"]
    lengths = [len(row) for row in dataset["input_ids"]]
    assert [len(row) for row in dataset["labels"]] == lengths
    assert split.tokens == sum(lengths)
    assert split.longest == max(lengths)
    assert split.trained_tokens == sum(label != IGNORED for row in dataset["labels"] for label in row)
    assert 0 < split.trained_tokens < split.tokens


@pytest.mark.parametrize(
    ("rows", "fraction", "validation"),
    [(12, 0.1, 1), (12, 0.25, 3), (12, 0.5, 6), (12, 0.9, 11), (12, 0.01, 1), (2, 0.1, 1), (2, 0.9, 1), (3, 0.9, 2)],
)
def test_a_fraction_splits_off_that_share_and_leaves_rows_on_both_sides(
    encoder: Encoder, tmp_path: Path, rows: int, fraction: float, validation: int
) -> None:
    prepared = prepare(encoder, train=[write_rows(tmp_path / "rows.json", ROWS[:rows])], validation=fraction)
    assert len(ids(prepared.validation)) == validation
    assert sorted(ids(prepared.train) + ids(prepared.validation)) == sorted(encoded(encoder, ROWS[:rows]))
    assert [one.name for one in prepared.found] == ["few_rows"] * (rows * fraction < 0.5)


def test_of_rows_too_few_to_split_it_is_told_how_many_are_left(encoder: Encoder, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json", ROWS[:2])
    (told,) = prepare(encoder, train=[rows], validation=0.1).warnings
    assert told.startswith(
        "1 of 2 rows is held for validation, since data.validation 0.1 takes at least one; 1 is left"
    )
    assert prepare(encoder, train=[rows], validation=0.5).warnings == []  # as many as were asked for


def test_the_split_depends_on_the_seed_and_on_nothing_else(encoder: Encoder, rows_file: Path) -> None:
    def validation(seed: int) -> list[list[int]]:
        return ids(prepare(encoder, seed=seed, train=[str(rows_file)], validation=0.3).validation)

    assert validation(1) == validation(1)
    assert len({str(validation(seed)) for seed in range(5)}) > 1


def test_a_seed_of_the_data_keeps_the_split_of_a_recipe_with_another_seed(rows_file: Path) -> None:
    from loratune.recipe.loading import load_recipe
    from loratune.training.gate import pass_gate

    def split(**flags: str) -> tuple[list[list[int]], list[list[int]]]:
        known = {"model.base": "tiny-qwen", "data.train": [str(rows_file)], "data.validation": ["0.3"]}
        data = pass_gate(load_recipe(None, {**known, **flags}))
        assert data.validation
        return ids(data.train), ids(data.validation)

    assert split(seed="7") != split()
    assert split(**{"seed": "7", "data.seed": "42"}) == split()


def test_a_single_row_is_trained_on_and_the_missing_validation_is_told(encoder: Encoder, tmp_path: Path) -> None:
    prepared = prepare(encoder, train=[write_rows(tmp_path / "rows.json", ROWS[:1])], validation=0.1)
    assert ids(prepared.train) == encoded(encoder, ROWS[:1])
    assert prepared.validation is None
    assert prepared.warnings == ["1 row cannot be split; there is no validation"]


def test_validation_files_are_taken_whole_and_the_training_rows_stay(encoder: Encoder, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.json", ROWS[:8])
    validation = [write_rows(tmp_path / f"{name}.json", rows) for name, rows in (("a", ROWS[8:10]), ("b", ROWS[10:]))]
    prepared = prepare(encoder, train=[train], validation=validation)
    assert ids(prepared.train) == encoded(encoder, ROWS[:8])
    assert ids(prepared.validation) == encoded(encoder, ROWS[8:])
    assert [use.path for use in prepared.files] == [train, *validation]


def test_files_are_recorded_with_their_hash_and_the_rows_used(
    encoder: Encoder, tmp_path: Path, rows_file: Path
) -> None:
    lines = tmp_path / "more.jsonl"
    lines.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, ROWS[:3])).encode())
    prepared = prepare(encoder, train=[f"{rows_file}#5", str(lines)], validation=0.2)
    assert [(use.path, use.sha256, use.rows) for use in prepared.files] == [
        (str(rows_file), hashlib.sha256(rows_file.read_bytes()).hexdigest(), 5),
        (str(lines), hashlib.sha256(lines.read_bytes()).hexdigest(), 3),
    ]
    assert len(ids(prepared.train)) + len(ids(prepared.validation)) == 8


def test_placeholders_reach_training_and_validation_rows(encoder: Encoder, tmp_path: Path) -> None:
    named = [{"instruction": "Who?", "output": f"{{{{NAME}}}} {n}"} for n in range(2)]
    files = [write_rows(tmp_path / f"{n}.json", [row]) for n, row in enumerate(named)]
    prepared = prepare(encoder, train=files[:1], validation=files[1:], placeholders={"name": "Li"})
    assert ids(prepared.train) + ids(prepared.validation) == encoded(
        encoder, [{"instruction": "Who?", "output": f"Li {n}"} for n in range(2)]
    )


LONG = {"instruction": "Count.", "output": " ".join(f"{n} and {n * n % 101}" for n in range(200))}


def test_rows_that_are_too_long_are_left_out_counted_and_named(encoder: Encoder, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.json", [ROWS[0], LONG, ROWS[1], *[LONG] * 6])
    prepared = prepare(encoder, train=[path], validation=0.0)
    assert ids(prepared.train) == encoded(encoder, ROWS[:2])
    repeated, warning = prepared.warnings
    assert repeated.startswith(
        "6 of 9 rows of data.train are the same as an earlier row (--data.remove duplicates removes them):\n"
    )
    length = len(encoded(encoder, [LONG])[0])
    assert warning.startswith(
        "7 of 9 rows of data.train are longer than training.max_length 256 and left out (77.8%):\n"
    )
    assert [f"{path} row {number}: {length} tokens" in warning for number in range(1, 10)] == [
        *(False, True, False),
        *(True, True, True, True),
        *(False, False),
    ]
    assert warning.endswith("… and 2 more")


def test_a_row_of_exactly_the_longest_length_is_kept(encoder: Encoder, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.json", ROWS[:1])
    length = len(encoded(encoder, ROWS[:1])[0])
    assert prepare(encoder, max_length=length, train=[path], validation=0.0).warnings == []
    with pytest.raises(LoratuneError, match="longer than"):
        prepare(encoder, max_length=length - 1, train=[path], validation=0.0)


def test_nothing_is_left_where_all_rows_are_too_long(encoder: Encoder, tmp_path: Path) -> None:
    message = refusal(encoder, train=[write_rows(tmp_path / "rows.json", [LONG, LONG])], validation=0.0)
    assert message.startswith("no row of data.train has a token to train within training.max_length 256")


def test_validation_rows_that_are_all_too_long_leave_no_validation_and_a_warning(
    encoder: Encoder, tmp_path: Path
) -> None:
    train, validation = write_rows(tmp_path / "a.json", ROWS), write_rows(tmp_path / "b.json", [LONG])
    prepared = prepare(encoder, train=[train], validation=[validation])
    assert prepared.validation is None
    assert "1 of 1 row of data.validation is longer" in prepared.warnings[0]


def test_of_a_long_conversation_the_turns_that_fit_are_kept(encoder: Encoder, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    # A template that forgets earlier answers, so that each turn is a sequence of its own.
    tokenizer.chat_template = (
        "{% for message in messages if message.role == 'user' %}{{ message.content }}\n{% endfor %}"
        "{% if not add_generation_prompt %}{{ messages[-1].content }}<|im_end|>{% endif %}"
    )
    row = {"instruction": "b", "output": LONG["output"], "history": [["a", "short"]]}
    path = write_rows(tmp_path / "rows.json", [row])
    prepared = prepare(Encoder(tokenizer, PromptSettings()), train=[path], validation=0.0)
    assert [tokenizer.decode(row) for row in ids(prepared.train)] == ["a\nshort<|im_end|>"]
    assert "1 of 1 row of data.train is longer" in prepared.warnings[0]


def test_training_on_the_last_answer_is_asked_of_the_encoder(encoder: Encoder, tmp_path: Path) -> None:
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    path = write_rows(tmp_path / "rows.json", [row])
    trained = {
        train_on: prepare(encoder, train=[path], validation=0.0, train_on_turns=train_on).train.trained_tokens
        for train_on in ("all", "last")
    }
    assert trained["last"] == len(encoder.answer_ids("d"))
    assert trained["all"] == len(encoder.answer_ids("b")) + len(encoder.answer_ids("d"))


def test_faults_of_several_files_are_told_together(encoder: Encoder, tmp_path: Path, rows_file: Path) -> None:
    broken, wrong = tmp_path / "broken.json", write_rows(tmp_path / "wrong.json", [{"instruction": "a"}])
    broken.write_text("[{]")
    missing = str(tmp_path / "missing.json")
    message = refusal(encoder, train=[str(broken), str(rows_file), wrong, missing, "https://x/rows.json"])
    for told in (
        f"{broken}:1:3: not valid JSON",
        f"{wrong} row 1: 'output' is missing",
        f"{missing}: no such file",
        "https://x/rows.json: nothing is fetched",
    ):
        assert told in message
    assert str(rows_file) not in message


def test_a_fault_of_a_file_that_is_given_twice_is_told_once(encoder: Encoder, tmp_path: Path) -> None:
    wrong = write_rows(tmp_path / "wrong.json", [{"instruction": "a"}])
    assert refusal(encoder, train=[wrong, wrong], validation=[wrong]).count("'output' is missing") == 1


def test_rows_of_all_kinds_of_faults_are_told_at_once(encoder: Encoder, tmp_path: Path) -> None:
    odd = [{"instruction": "a", "ouput": "b"}, {"instruction": "c", "output": ""}, *ROWS[:3]]
    unfilled = write_rows(tmp_path / "unfilled.json", [{"instruction": "{{name}}?", "output": "{{name}}."}, odd[0]])
    held_out = write_rows(tmp_path / "held.json", [{"instruction": "d", "output": "<|im_end|>"}, ROWS[0], {"x": 1}])
    train = write_rows(tmp_path / "train.json", odd)
    severity = {"overlap": "refuse"}
    message = refusal(encoder, train=[train, unfilled], validation=[held_out], severity=severity)
    for told in (
        f"{train}: 1 of 5 rows cannot be trained on:\n  {train} row 1: 'output' is missing, but there is 'ouput'",
        f"{train} row 2 «c»",
        f"{unfilled}: rows hold {{{{name}}}}; give values in data.placeholders",
        f"{unfilled} row 2: 'output' is missing",
        f"{held_out} row 3: 'output' is missing",
        f"{held_out} row 1 «d»",
        f"{held_out} row 2 is {train} row 3",
    ):
        assert message.count(told) == 1, told


def test_of_many_faulty_rows_the_first_are_told_and_all_are_counted(encoder: Encoder, tmp_path: Path) -> None:
    odd = [row for n in range(500) for row in ({"instruction": f"{n}"}, {"instruction": f"{n}?", "output": ""})]
    message = refusal(encoder, train=[write_rows(tmp_path / "rows.json", odd)])
    assert message.count("'output' is missing") == message.count("?»") == 5
    assert message.count("… and 495 more") == 2


def test_without_a_tokenizer_its_error_is_told_behind_those_of_the_rows(tmp_path: Path) -> None:
    from loratune.recipe.loading import load_recipe
    from loratune.training.gate import pass_gate

    odd = write_rows(tmp_path / "rows.json", [{"instruction": "a"}])
    model = tmp_path / "model"
    recipe = {"model.base": str(model), "data.train": [odd]}
    with pytest.raises(LoratuneError, match=rf"(?s)rows.json row 1: 'output' is missing.*{model}.*no such folder"):
        pass_gate(load_recipe(None, recipe))


def test_a_file_that_cannot_be_opened_is_a_failure_of_the_disk(
    encoder: Encoder, tmp_path: Path, rows_file: Path
) -> None:
    folder = tmp_path / "folder.json"
    folder.mkdir()
    with pytest.raises(LoratuneError, match="Is a directory") as caught:
        prepare(encoder, train=[str(rows_file), str(folder)])
    assert caught.value.exit_code == Exit.IO


def test_rows_that_repeat_and_rows_that_are_in_validation_too_are_told(encoder: Encoder, tmp_path: Path) -> None:
    rows = [{"instruction": f"{n}", "output": f"It is {n}."} for n in (1, 2, 1, 3, 1)]
    train = write_rows(tmp_path / "train.json", rows)
    held = write_rows(tmp_path / "held.json", [rows[3], {"instruction": "9", "output": "It is 9."}])
    repeated, shared = prepare(encoder, train=[train], validation=[held]).warnings
    assert "2 of 5 rows of data.train are the same as an earlier row" in repeated
    assert f"{train} row 5 is row 1" in repeated
    assert "1 of 2 validation rows is in training too" in shared
    assert f"{held} row 1 is {train} row 4" in shared
    assert "2 of 2 validation rows" in prepare(encoder, train=[held], validation=[held]).warnings[0]
