"""`loratune eval`: the figures beside plain PEFT, planted damage, leaks, what is kept, and what is written."""

from __future__ import annotations

import html
import json
import re
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from conftest import TINY_QWEN
from documents import require_one_document
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from loratune.cli.app import app
from loratune.errors import Exit
from loratune.evaluation.general import changes, is_refusal, language_of
from loratune.evaluation.page.plots import gains_plot
from loratune.evaluation.result import Evaluation, read_evaluation
from loratune.generation.general_texts import load_instructions, load_passages
from loratune.runs.state import evaluation_command

GENERAL_ROWS = json.loads((Path(__file__).resolve().parent.parent / "data" / "general.json").read_text("utf-8"))
KNOWN, OTHERS = GENERAL_ROWS[:16], GENERAL_ROWS[16:]
"""Rows that the practice model answers right, and others to train on."""
TRAINING = (
    *("--model.base", "tiny-qwen", "--model.dtype", "float32", "--data.validation", "0"),
    *("--training.learning_rate", "5e-3", "--evaluation.questions_share", "0"),
)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def trained(folder: Path, name: str, rows: list[dict[str, Any]], *flags: Any, steps: int = 12) -> Path:
    """A run of the practice model on some rows."""
    data = written(folder / f"{name}.json", rows)
    line = ["sft", *TRAINING, "--data.train", data, "--training.max_steps", steps, "--output", folder / name, *flags]
    done = CliRunner().invoke(app, [str(word) for word in line])
    assert done.exit_code == 0, done.stderr
    return folder / name


@pytest.fixture(scope="module")
def reversing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on rows whose answers are reversed."""
    rows = [{**row, "output": row["output"][::-1]} for row in OTHERS]
    return trained(tmp_path_factory.mktemp("reversing"), "run", rows)


@pytest.fixture(scope="module")
def evaluated(reversing: Path, few_texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The output of an evaluation of it, with everything, and how the command ended."""
    folder = tmp_path_factory.mktemp("evaluated")
    tests = written(folder / "tests.json", KNOWN)
    line = ["eval", "--adapter", reversing, "--tests", tests, "--output", folder / "out", "--junit", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loratune.generation.general_texts.ASSETS", few_texts)
        return folder / "out", CliRunner().invoke(app, [*map(str, line), "--max-new-tokens", "16"])


Evaluate = Callable[..., tuple[Evaluation, Result]]


@pytest.fixture
def evaluate(cli: Callable[..., Result], tmp_path: Path) -> Evaluate:
    """Evaluate a run on rows, without general text, and return what was written."""

    def run(adapter: Path, rows: list[dict[str, Any]], *flags: Any, code: int = 0) -> tuple[Evaluation, Result]:
        tests, output = written(tmp_path / "tests.json", rows), tmp_path / "out"
        line = ("--adapter", adapter, "--tests", tests, "--output", output, "--max-new-tokens", 16)
        done = cli("eval", *line, *(flags if "--general" in flags else ("--no-general", *flags)))
        assert done.exit_code == code, done.stderr
        return read_evaluation(output), done

    return run


def test_the_command_that_a_run_ends_with_is_accepted(
    cli: Callable[..., Result], short_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(short_run, tmp_path / "run"))
    command = evaluation_command(run)
    (placeholder,) = command.chosen
    given = {placeholder: str(written(tmp_path / "tests.json", [{"instruction": "a", "output": "b"}]))}
    done = cli(*(given.get(word, word) for word in command.words[1:]), "--no-general", "--max-new-tokens", 2)
    assert done.exit_code in (0, Exit.WORSE), done.stderr
    assert (tmp_path / "run-eval" / "eval.json").is_file()
    assert evaluation_command(run).words[-1] == str(tmp_path / "run-eval-2")


@pytest.mark.parametrize("missing", ["jieba", "rouge_score", "sacrebleu", ""])
def test_a_run_ends_with_what_its_evaluation_needs_installed(tmp_path: Path, missing: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if missing:
            patch.setitem(sys.modules, missing, None)
        told = str(evaluation_command(tmp_path / "run"))
    install = ', after pip install "loratune[eval]"' if missing else ""
    assert told.startswith(f"is it better{install}: loratune eval ")


def test_reversed_answers_are_worse_and_the_exit_code_says_so(evaluated: tuple[Path, Result], few_texts: Path) -> None:
    output, done = evaluated
    found = read_evaluation(output)
    assert done.exit_code == Exit.WORSE == 7, done.stderr
    require_one_document(done)
    assert json.loads(done.stdout) == {"schema": "loratune/eval/1"} | json.loads((output / "eval.json").read_text())
    assert {name: one.verdict for name, one in found.measures.items() if name in ("loss", "exact_match", "bleu")} == {
        "loss": "worse", "exact_match": "worse", "bleu": "worse",
    }  # fmt: skip
    assert (found.measures["exact_match"].baseline, found.measures["exact_match"].tuned) == (1, 0)
    assert found.sentence in " ".join(done.stderr.split())
    assert found.sentence == (
        "better on 0 of 16 rows, worse on 16; with 16 rows, only a difference on at least 6 of them can show"
    )
    assert str(output / "eval.html") in done.stderr
    assert "general texts: the loss in nats per token, the lower the better" in done.stderr
    passages = [one["language"] for one in json.loads((few_texts / "passages.json").read_text("utf-8"))]
    loss = found.general_text["en"].loss.baseline
    assert f"English, {passages.count('en')} passages {loss:.3f}" in " ".join(done.stderr.split())
    assert "worse: rows: the loss of the expected answers" in done.stderr
    assert not {"exact_match", "rouge_l", "bleu"} & found.fallen.keys()  # the verdict on the rows says so


def test_losses_and_divergences_are_those_of_plain_peft(
    reversing: Path, evaluated: tuple[Path, Result], few_texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel
    from torch.nn import functional
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr("loratune.generation.general_texts.ASSETS", few_texts)
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    base = AutoModelForCausalLM.from_pretrained(TINY_QWEN, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, reversing / "adapter")
    lines = [json.loads(line) for line in (evaluated[0] / "results.jsonl").read_text("utf-8").splitlines()[1:]]
    known = {(line["row"], line["kind"]): line for line in lines}

    def log_probabilities(ids: list[int]) -> tuple[Any, Any]:
        with torch.no_grad():
            tuned = model(torch.tensor([ids])).logits[0].double()
            with model.disable_adapter():
                plain = model(torch.tensor([ids])).logits[0].double()
        return functional.log_softmax(tuned, -1), functional.log_softmax(plain, -1)

    for number, row in enumerate(KNOWN[:3], start=1):
        turns = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        answer = tokenizer(row["output"] + tokenizer.eos_token).input_ids
        both = log_probabilities([*prompt, *answer])
        places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
        for kind, found in zip(("loss", "base loss"), both, strict=True):
            assert known[number, kind]["tokens"] == len(answer)
            # float32 rounds logits of up to 30 to 2e-6, and the model sums what it adds to them
            expected = -float(found[places, answer].sum())
            assert known[number, kind]["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-5 * len(answer))
    for passage in (load_passages()[0], load_passages()[-1]):
        ids = tokenizer(passage.text).input_ids
        tuned, plain = log_probabilities(ids)
        following = torch.tensor(ids[1:])[:, None]
        told = known[passage.number, "passage"]
        assert told["tokens"] == len(ids) - 1
        assert told["loss"] == pytest.approx(-float(tuned[:-1].gather(1, following).sum()), rel=1e-4)
        assert told["base_loss"] == pytest.approx(-float(plain[:-1].gather(1, following).sum()), rel=1e-4)
        assert told["kl"] == pytest.approx(float((plain.exp() * (plain - tuned))[:-1].sum()), rel=1e-3)


def test_a_text_is_read_in_parts_and_by_a_model_that_decodes_one_by_one(
    short_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratune.engine.engine import load_engine
    from loratune.engine.plain_decoder import PlainDecoder

    engine = load_engine([("own", short_run)], None)
    text = load_passages()[0].text
    whole = engine.divergence(text, "own")
    monkeypatch.setattr("loratune.engine.scheduler.PROMPT_PART", 7)
    parts = engine.divergence(text, "own")
    engine.decoder.close()
    engine.decoder = PlainDecoder(engine.model)
    for found in (parts, engine.divergence(text, "own")):
        assert vars(found) == pytest.approx(vars(whole), rel=1e-4)
    assert whole.tokens > 7
    engine.context_tokens = whole.tokens + 1
    assert engine.divergence(text, "own").tokens == whole.tokens
    engine.context_tokens = whole.tokens  # the beginning of a text is not compared
    assert engine.divergence(text, "own").tokens == 0
    assert whole.kl > 1e-3
    engine.close()


def test_every_file_says_the_same_and_the_page_needs_nothing_else(evaluated: tuple[Path, Result]) -> None:
    output, _ = evaluated
    assert {path.name for path in output.iterdir()} == {
        "eval.json", "eval.html", "junit.xml", "answers.jsonl", "results.jsonl",
    }  # fmt: skip
    found = read_evaluation(output)
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text("utf-8").splitlines()]
    assert [row["instruction"] for row in answers] == [row["instruction"] for row in KNOWN]
    mean = sum(row["metrics"]["loss"] for row in answers) / len(answers)
    assert found.measures["loss"].tuned == pytest.approx(mean, rel=1e-9)
    assert {row["base"]["metrics"]["exact_match"] for row in answers} == {True}
    cases = ElementTree.parse(output / "junit.xml").getroot().findall(".//testcase")
    failed = {case.get("name") for case in cases if case.find("failure") is not None}
    assert failed == {one.name for one in found.decisions if one.verdict == "worse"} >= {"rows"}
    page = (output / "eval.html").read_text("utf-8")
    assert found.sentence in page
    assert not [word for word in ("<script", "src=", "href=", "@import", "url(") if word in page]


def test_results_are_kept_and_what_is_missing_is_added(
    reversing: Path, evaluated: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    cli: Callable[..., Result], few_texts: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr("loratune.generation.general_texts.ASSETS", few_texts)
    output = shutil.copytree(evaluated[0], tmp_path / "out")
    before = read_evaluation(output)
    line = ("eval", "--adapter", reversing, "--tests", evaluated[0].parent / "tests.json", "--output", output)
    results = output / "results.jsonl"
    results.write_bytes(results.read_bytes()[:-300])  # killed while passages were read
    (output / "eval.json").unlink()
    assert cli(*line, "--max-new-tokens", 16).exit_code == 7
    assert read_evaluation(output) == before

    def refuse(*_: Any) -> None:
        raise AssertionError("a model is loaded though nothing is missing")

    monkeypatch.setattr("loratune.evaluation.flow.load_engine", refuse)
    # What decides is computed anew from the same results.
    done = cli(*line, "--max-new-tokens", 16, "--decide-by", "exact_match", "--max-forgetting", 0)
    assert done.exit_code == 7, done.stderr
    assert read_evaluation(output).decided_by == "exact_match"
    assert not (output / "junit.xml").exists()  # it was of the evaluation before
    other = cli(*line, "--max-new-tokens", 17)
    assert other.exit_code == Exit.USAGE
    assert "max_new_tokens: 16 there, 17 now" in other.stderr
    assert "--overwrite" in other.stderr
    assert (output / "eval.json").is_file()
    assert cli(*line, "--max-new-tokens", 17, "--overwrite").exit_code != 0
    assert list(output.iterdir()) == []  # nothing that could be taken for the evaluation that did not finish


def test_a_measure_that_falls_beside_a_better_verdict_is_told_with_its_rows(
    reversing: Path, evaluated: tuple[Path, Result], tmp_path: Path, cli: Callable[..., Result]
) -> None:
    results = (evaluated[0] / "results.jsonl").read_text("utf-8").splitlines()
    header, *lines = [json.loads(line) for line in results]
    known = {(line["row"], line["kind"]): line for line in lines}
    tests = evaluated[0].parent / "tests.json"

    def told(name: str, cut: set[int]) -> tuple[Evaluation, str]:
        """Evaluate the base's answers at half the loss, of which those to some rows do not end."""
        for row in range(1, len(KNOWN) + 1):
            of_base = known[row, "base answer"]
            known[row, "answer"] |= {**of_base, "kind": "answer"} | ({"finish": "length"} if row in cut else {})
            known[row, "loss"] |= {"loss": known[row, "base loss"]["loss"] / 2 - 1}
        (tmp_path / name).mkdir()
        text = "\n".join(json.dumps(line) for line in (header, *known.values()))
        (tmp_path / name / "results.jsonl").write_text(f"{text}\n", encoding="utf-8")
        line = ("--adapter", reversing, "--tests", tests, "--output", tmp_path / name, "--max-new-tokens", 16)
        done = cli("eval", *line, "--no-general", "--json")
        assert done.exit_code == 0, done.stderr
        found = read_evaluation(tmp_path / name)
        assert (found.verdict, json.loads(done.stdout)["fallen"]) == ("better", found.fallen)
        return found, " ".join(done.stderr.split())

    found, said = told("fallen", {7})
    assert found.fallen == {
        "form": "sound answers fell from 100.0% to 93.8%: worse on 1 of 16 rows, better on 0, which chance "
        f"may explain; read the answers to {tests} row 7"
    }
    assert f"warning: {found.fallen['form']}" in said
    assert html.escape(found.fallen["form"]) in (tmp_path / "fallen" / "eval.html").read_text("utf-8")
    found, said = told("whole", set())
    assert found.fallen == {}
    assert "fell from" not in said + (tmp_path / "whole" / "eval.html").read_text("utf-8")


def test_a_run_beside_itself_shows_no_difference(evaluate: Evaluate, short_run: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"What is {n}?", "output": "It is that."} for n in range(8)]
    found, done = evaluate(short_run, rows, "--against", shutil.copytree(short_run, short_run.parent / "again"))
    assert found.verdict == "no difference"
    assert {(one.better, one.worse, one.difference) for one in found.measures.values()} == {(0, 0, 0)}
    told = (
        "No difference shown: better on 0 of 8 rows, worse on 0; with 8 rows, only a difference on at least 6 of them"
    )
    assert told in " ".join(done.stderr.split())
    assert found.names == ("run", "again")
    for name in ("tuned", "baseline"):
        assert f"{name} {getattr(found, name)} " in " ".join(done.stderr.split())
    page = (tmp_path / "out" / "eval.html").read_text("utf-8")
    assert page.count("<th>baseline: again</th><th>tuned: run</th>") == 2
    assert "decided by the loss of the expected answers; --decide-by takes another measure" in done.stderr


def test_runs_of_different_bases_are_compared_one_after_the_other(
    evaluate: Evaluate, reversing: Path, short_run: Path, tmp_path: Path
) -> None:
    held_out = {question[-1]["content"] for question in json.loads((short_run / "probe.json").read_text())["questions"]}
    rows = json.loads((short_run.parent / "rows.json").read_text())
    leaked = [row for row in rows if row["instruction"] not in held_out]
    found, _ = evaluate(reversing, [*KNOWN[:6], *leaked], "--against", short_run, "--decide-by", "exact_match")
    # The other run has random weights; beside these, no answer is exact either.
    assert found.measures["exact_match"].equal == 6
    assert found.measures["loss"].baseline > 5
    page = html.unescape((tmp_path / "out" / "eval.html").read_text("utf-8"))
    assert not found.leaks["tuned"].rows
    assert page.count("was in the baseline's training") == len(found.leaks["baseline"].rows) == len(leaked)
    assert "was in the training" not in page


@pytest.mark.parametrize("gains", [[-0.05, 0.03, 1.7], [-1.7, 0.05], [-1.0, 1.0], [0.0], [-2.0]])
def test_labels_of_the_gains_do_not_overlap(gains: list[float]) -> None:
    labels = re.findall(r'<text x="\d+" y="([\d.]+)" text-anchor="end">([^<]*)', gains_plot(gains, "gains"))
    heights = sorted(float(y) for y, _ in labels)
    assert all(below - above >= 20 for above, below in pairwise(heights))
    assert {"0", f"{max(gains, key=abs):+.2f}"} - {text for _, text in labels} <= {"+0.00"}


def test_leaked_rows_are_found_and_left_out(evaluate: Evaluate, short_run: Path, tmp_path: Path) -> None:
    trained_on = json.loads((short_run.parent / "rows.json").read_text())
    held_out = json.loads((short_run / "probe.json").read_text())["questions"]
    unseen = {question[-1]["content"] for question in held_out}
    long = {"instruction": "Tell me of the sea.", "output": "The sea is wide and blue and full of fish and salt."}
    rows = [*trained_on, {**trained_on[0], "output": "It is more."}, *({**long, "input": f"{n}"} for n in range(7))]
    found, done = evaluate(short_run, rows)
    leaks = found.leaks["tuned"]
    assert leaks.checked
    same = {rows[number - 1]["instruction"] for number in leaks.same}
    assert same == {row["instruction"] for row in trained_on} - unseen
    assert len(same) == leaks.training_rows == len(trained_on) - len(unseen)
    assert (13 in leaks.same_question) == (trained_on[0]["instruction"] not in unseen)
    assert found.compared == found.measures["loss"].rows == len(rows) - len(leaks.rows)
    assert f"{len(leaks.rows)} test rows found in the training rows" in done.stderr
    assert found.form["tuned"].answers == found.compared < len(rows)
    page = html.unescape((tmp_path / "out" / "eval.html").read_text("utf-8"))
    shown = [int(number) for number in re.findall(r"row (\d+)", page.partition("most damaged first")[2])]
    assert {*shown[found.compared :]} == {*leaks.rows}, "rows that are left out come last"


def test_an_adapter_that_is_merged_already_is_not_to_be_merged_again(
    cli: Callable[..., Result], evaluate: Evaluate, short_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(short_run, tmp_path / "run"))
    rows = [{"instruction": f"What is {n}?", "output": "It is that."} for n in range(8)]
    _, done = evaluate(run, rows, "--against", short_run)
    assert f"merge it: loratune merge --adapter {run} --output {run}-merged" in " ".join(done.stderr.split())
    assert cli("merge", "--adapter", run, "--output", tmp_path / "whole", "--no-logits").exit_code == 0
    _, done = evaluate(run, rows, "--against", short_run)
    assert f"try it: loratune infer --model {tmp_path / 'whole'}" in " ".join(done.stderr.split())
    verification = json.loads((tmp_path / "whole" / "verification.json").read_text())
    verification |= {"adapter_sha256": "0" * 64}
    del verification["sha256"]
    (tmp_path / "whole" / "verification.json").write_text(json.dumps(verification))
    _, done = evaluate(run, rows, "--against", short_run)
    assert "merge it: loratune merge" in done.stderr, "the model is of another adapter"


def test_rows_nearly_those_of_the_training_are_found(evaluate: Evaluate, tmp_path: Path) -> None:
    story = "The old ship left the harbour at dawn and sailed for nine days over a calm sea before land came in sight."
    rows = [{"instruction": f"Tell me story {n}.", "output": f"{story} It was island {n}."} for n in range(6)]
    counted = [{"instruction": "Count.", "output": " ".join(map(str, range(n, n + 100)))} for n in (100, 113, 126)]
    run = trained(tmp_path, "near", [*rows, *counted[:2]], steps=1)
    tests = [{**rows[0], "output": rows[0]["output"] + " The end."}, {"instruction": "Who are you?", "output": "Me."}]
    tests[0]["instruction"] = "Tell me a story 0."
    tests.append({**counted[2], "instruction": "Count on."})  # like the second, which is like the first
    found, done = evaluate(run, tests)
    assert found.leaks["tuned"].near == (1, 3)
    assert f"2 nearly the same): {tmp_path / 'tests.json'} row 1, row 3" in " ".join(done.stderr.split())
    (tmp_path / "near.json").write_text("[]")
    found, done = evaluate(run, tests, "--overwrite")
    assert not found.leaks["tuned"].checked
    assert "near.json, a file of the training, has changed since" in done.stderr


def test_a_plain_adapter_is_evaluated_and_rows_that_do_not_fit_are_told(
    evaluate: Evaluate, short_run: Path, random_qwen: Path, tmp_path: Path
) -> None:
    plain = shutil.copytree(short_run / "adapter", tmp_path / "plain")
    rows = [{"instruction": "Who? " * 300, "output": "You."}, {"instruction": "Who?", "output": "You."}]
    found, done = evaluate(plain, rows, "--base-model", random_qwen)
    assert not found.leaks["tuned"].checked
    assert "not looked for, because the adapter is not in a run folder" in done.stderr
    told = f"1 row without an answer (tuned): {tmp_path / 'tests.json'} row 1: its prompt leaves no room in the context"
    assert told in " ".join(done.stderr.split())
    assert (found.measures["loss"].rows, found.measures["exact_match"].rows) == (1, 2)


def test_an_adapter_whose_numbers_overflow_is_no_result(
    cli: Callable[..., Result], short_run: Path, random_qwen: Path, few_texts: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("loratune.generation.general_texts.ASSETS", few_texts)
    plain = shutil.copytree(short_run / "adapter", tmp_path / "plain")
    tensors = load_file(plain / "adapter_model.safetensors")
    save_file({name: torch.full_like(one, 1e15) for name, one in tensors.items()}, plain / "adapter_model.safetensors")
    rows = [{"instruction": f"Who are you, {n}?", "output": "Me.", "assert": {"type": "not-equals", "value": "Me."}}
            for n in range(2)]  # fmt: skip
    flags = ("--tests", written(tmp_path / "tests.json", rows), "--output", tmp_path / "out", "--max-new-tokens", 2)
    done = cli("eval", "--adapter", plain, "--base-model", random_qwen, *flags)
    assert done.exit_code == Exit.MODEL, done.stderr
    texts = 2 + len(json.loads((few_texts / "passages.json").read_text("utf-8")))
    assert f"tuned: the losses of {texts} of {texts} texts are not finite" in " ".join(done.stderr.split())
    assert "baseline: " not in done.stderr
    assert not (tmp_path / "out" / "eval.json").exists()


def test_asserts_decide_and_their_failures_are_in_junit(evaluate: Evaluate, reversing: Path, tmp_path: Path) -> None:
    rows = [{**row, "assert": {"type": "equals", "value": row["output"]}} for row in KNOWN[:8]]
    found, done = evaluate(reversing, rows, "--junit", code=7)
    assert found.decided_by == "asserts"
    assert (found.measures["asserts"].baseline, found.measures["asserts"].tuned) == (1, 0)
    cases = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot().findall("testsuite[@name='asserts']/testcase")
    assert len(cases) == 8
    assert all("(holds for the baseline)" in str(case.findtext("failure")) for case in cases)
    assert "Worse: better on 0 of 8 rows, worse on 8" in done.stderr


def test_the_time_of_general_answers_is_told_beforehand_where_it_is_long(
    evaluate: Evaluate, short_run: Path, few_texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratune.generation.general_texts.ASSETS", few_texts)
    rows = [{"instruction": "How much?", "output": "Two."}]
    for least, is_told in ((60, False), (0, True)):
        monkeypatch.setattr("loratune.evaluation.flow.ANNOUNCED_SECONDS", least)
        _, done = evaluate(short_run, rows, "--general", "--overwrite")
        told = re.search(
            r"general instructions: (\d+) answers of at most 16 tokens, so at most .* tokens/s", done.stderr
        )
        assert bool(told) == is_told
        assert not told or f"{told[1]}/{told[1]} answers" in done.stderr
    _, done = evaluate(short_run, rows, "--general")
    assert "general instructions" not in done.stderr, "all answers are there"


def test_texts_of_rows_and_models_are_text_on_the_page(evaluate: Evaluate, short_run: Path, tmp_path: Path) -> None:
    from browsing import chromium

    forged = '</pre><script>document.title = "forged"</script><img src=x onerror="document.title=1">&amp;\u202e\x07'
    rows = [{"instruction": f"{forged} {n}", "output": forged} for n in range(3)]
    evaluate(short_run, rows, "--junit")
    ElementTree.parse(tmp_path / "out" / "junit.xml")
    with chromium() as browser:
        page = browser.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("request", lambda request: complaints.append(request.url) if "eval.html" not in request.url else None)
        page.goto((tmp_path / "out" / "eval.html").as_uri())
        assert page.title() == "run beside base"
        assert '</pre><script>document.title = "forged"</script>' in page.locator("pre").first.inner_text()
        assert page.locator("img").count() == 0
        assert complaints == []


def test_the_page_fits_a_narrow_window_and_tells_units(evaluated: tuple[Path, Result]) -> None:
    from browsing import chromium, text_of

    found = read_evaluation(evaluated[0])
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 400, "height": 800})
        page.goto((evaluated[0] / "eval.html").absolute().as_uri())
        wide = "[...document.querySelectorAll('*')].filter((one) => one.getBoundingClientRect().right > innerWidth + 1)"
        assert page.evaluate(f"{wide}.map((one) => one.outerHTML.slice(0, 80))") == []
        assert page.locator("th").first.is_hidden()
        label = "getComputedStyle(document.querySelector('td[data-label=better]'), '::before').content"
        assert "better" in page.evaluate(label), "the name of its column stands beside a figure"
        assert all("· worse by" in title and "nats per token" in title for title in text_of(page, "summary")[-16:])
        assert page.locator("rect").count() == found.compared
        page.set_viewport_size({"width": 1200, "height": 800})
        assert page.locator("th").first.is_visible()
        assert page.evaluate(label) == "none"


def test_what_cannot_be_evaluated_is_refused_before_a_model_is_loaded(
    cli: Callable[..., Result], short_run: Path, tmp_path: Path
) -> None:
    tests = written(tmp_path / "tests.json", [{"instruction": "a", "output": "b"}])
    asked = ("eval", "--adapter", short_run, "--tests", tests, "--output", tmp_path / "out")

    def told(*words: Any, code: int = Exit.USAGE) -> str:
        done = cli(*words)
        assert done.exit_code == code, done.stderr
        return done.stderr

    missing = told("eval", "--adapter", short_run)
    assert "--tests: a file of rows with expected answers; or benchmarks with --tasks" in missing
    assert "--output: a folder for the results" in missing
    assert "--adapter" not in missing
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "rouge_score", None)
        assert 'needs the package rouge_score: pip install "loratune[eval]"' in " ".join(told(*asked).split())
    assert "go together" in told(*asked, "--judge", "http://127.0.0.1:1/v1")
    assert "give the base URL" in told(*asked, "--judge", "file:///etc", "--judge-model", "a")
    assert "there are asserts, judge, loss" in told(*asked, "--decide-by", "taste")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    assert "not an evaluation" in told(*asked[:-1], tmp_path / "full")
    assert "there are loss, exact_match, rouge_l, bleu, form" in told(*asked, "--decide-by", "asserts")
    written(tests, [{"instruction": "a"}])
    assert "nothing can be compared" in told(*asked, code=Exit.DATA)
    assert not (tmp_path / "out").exists()


def test_the_bundled_texts_are_many_varied_and_of_the_language_they_say() -> None:
    passages, instructions = load_passages(), load_instructions()
    assert len(passages) >= 60
    assert len(instructions) >= 40
    assert len({one.text for one in passages}) == len(passages)
    assert len({str(one.row.fields["instruction"]) for one in instructions}) == len(instructions)
    for language in ("en", "zh"):
        assert sum(one.language == language for one in passages) == 30
        assert sum(one.language == language for one in instructions) == 20
    for passage in passages:
        assert language_of(passage.text) == {"en": "other", "zh": "zh"}[passage.language]
        assert not is_refusal(passage.text)
        assert 80 <= len(passage.text) <= 500


@pytest.mark.parametrize(
    ("tuned", "baseline", "expected"),
    [
        ("The sea is salty.", "海水是咸的。", ["language"]),
        ("用 Python 写：`def largest(numbers)`", "可以用 Python 的 max 函数。", []),
        ("I'm sorry, but I cannot help with that.", "Take a towel.", ["refusal"]),
        ("抱歉，我无法回答。", "多喝水。", ["refusal"]),
        ("I'm sorry, but I cannot help.", "I cannot say.", []),
        ("", "Yes.", ["empty"]),
        ("42", "四十二", []),
        ("I can sleep better when it is dark.", "Darken the room.", []),
    ],
)
def test_a_changed_language_a_refusal_and_silence_are_seen(tuned: str, baseline: str, expected: list[str]) -> None:
    assert list(changes(tuned, baseline)) == expected


@pytest.mark.slow
def test_an_adapter_that_answers_in_english_has_forgotten_chinese(evaluate: Evaluate, tmp_path: Path) -> None:
    pairs = list(zip(OTHERS[1::2], OTHERS[::2], strict=False))
    run = trained(tmp_path, "english", [{**zh, "output": en["output"]} for zh, en in pairs], steps=30)
    english, done = evaluate(run, KNOWN[::2], "--general", code=7)
    assert english.measures["exact_match"].verdict != "worse"
    assert english.general_answers
    assert english.general_answers.language > 4
    assert "worse: general instructions" in done.stderr


@pytest.mark.slow
def test_an_adapter_that_never_ends_is_found_by_the_form_of_its_answers(evaluate: Evaluate, tmp_path: Path) -> None:
    rows = [{**row, "output": " ".join([row["output"]] * 8)} for row in OTHERS]
    flags = ("--training.max_length", 48, "--data.truncation_strategy", "truncate_answer")
    run = trained(tmp_path, "endless", rows, *flags, steps=30)
    found, done = evaluate(run, KNOWN, code=7)
    assert found.form["baseline"].ended == 16
    assert found.form["tuned"].ended < 8
    assert "worse: form of the answers" in done.stderr


@pytest.mark.slow
def test_adapters_that_differ_by_seed_only_show_no_difference(evaluate: Evaluate, tmp_path: Path) -> None:
    one, other = (trained(tmp_path, f"seed-{seed}", OTHERS, "--seed", seed, steps=20) for seed in (0, 1))
    found, _ = evaluate(one, KNOWN, "--against", other, "--general")
    assert found.verdict == "no difference"
