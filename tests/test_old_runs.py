"""Run folders and checkpoints of earlier versions: kept as those versions wrote them, and opened by every command.

`old_runs/finished` and `old_runs/interrupted` are of loratune 0.1.0, on tiny-qwen; without what is copied here. So are
`old_runs/reports` and `old_runs/verifications`, of which those that are called first are older.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loratune.errors import Exit

OLD_RUNS = Path(__file__).parent / "old_runs"
TINY_QWEN = Path(__file__).parents[1] / "loratune" / "assets" / "tiny-qwen"


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a run folder, with the rows that it was trained on, into the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(OLD_RUNS / "rows.json", tmp_path)

    def put(name: str) -> Path:
        run = shutil.copytree(OLD_RUNS / name, tmp_path / name)
        if (run / "adapter").is_dir():
            shutil.copy(TINY_QWEN / "tokenizer.json", run / "adapter")
        return Path(name)

    return put


def answer_of_peft(adapter: Path, question: str, tokens: int) -> str:
    """PEFT's own answer, greedily."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    base = AutoModelForCausalLM.from_pretrained(TINY_QWEN, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def test_a_finished_run_is_asked(old_run: Any, cli: Any, tmp_path: Path) -> None:
    run = old_run("finished")
    Path("rows.jsonl").write_text('{"instruction": "When is the kitchen cleaned?"}\n', encoding="utf-8")
    flags = ["--input", "rows.jsonl", "--output", "answers.jsonl", "--max-new-tokens", 12]
    result = cli("infer", "--adapter", run, *flags)
    assert result.exit_code == 0, result.stderr
    answer = json.loads(Path("answers.jsonl").read_text(encoding="utf-8"))
    assert answer_of_peft(run / "adapter", "When is the kitchen cleaned?", 12) in answer.values()


@pytest.mark.parametrize("model", [[], ["--base-model", TINY_QWEN]], ids=["as recorded", "given"])
def test_a_finished_run_is_merged_and_exported(old_run: Any, cli: Any, model: list[Any]) -> None:
    run = old_run("finished")
    merged = cli("merge", "--adapter", run, "--output", "merged", *model)
    assert merged.exit_code == 0, merged.stderr
    tensors = load_file("merged/model.safetensors")
    expected = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(TINY_QWEN, dtype=torch.float32), str(run / "adapter")
    ).merge_and_unload()
    for name, weight in expected.state_dict().items():
        if name in tensors:
            torch.testing.assert_close(tensors[name].float(), weight, rtol=2**-7, atol=1e-6)
    exported = cli("export", "--adapter", run, "--format", "adapter", "--output", "given-away", *model)
    assert exported.exit_code == 0, exported.stderr
    sealed = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["files"]
    weights = "adapter_model.safetensors"
    assert Path("given-away", weights).stat().st_size == sealed[f"adapter/{weights}"]["bytes"]


def test_a_finished_run_is_shown(old_run: Any, cli: Any) -> None:
    shown = cli("runs", "show", old_run("finished"), "--json")
    assert shown.exit_code == 0, shown.stderr
    state = json.loads(shown.stdout)
    assert (state["state"], state["step"], state["steps"], state["changed"]) == ("finished", 4, 4, [])


def test_an_interrupted_run_goes_on_to_its_end(old_run: Any, cli: Any) -> None:
    run = old_run("interrupted")
    result = cli("sft", "--config", run / "recipe.yaml", "--resume")
    assert result.exit_code == 0, result.stderr
    assert "an earlier version, which drew rows in another order" in " ".join(result.stderr.split())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == list(range(1, 41))  # the first three are those of the earlier version
    assert json.loads((run / "status.json").read_text(encoding="utf-8"))["state"] == "finished"


LEFT_OUT = ("  alpha: 16\n", "  dropout: 0.05\n", "  learning_rate: 0.0001\n", "  max_length: 1024\n")
"""Defaults of the earlier version, in the run's recipe."""


@pytest.mark.parametrize("named", [False, True])
def test_a_run_goes_on_with_the_defaults_that_it_began_with(
    old_run: Any, cli: Any, tmp_path: Path, named: bool
) -> None:
    text = (old_run("interrupted") / "recipe.yaml").read_text(encoding="utf-8")
    for line in LEFT_OUT:
        assert line in text
        text = text.replace(line, "")
    (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
    flags = ["--training.learning_rate", 3e-4] if named else []
    result = cli("sft", "--config", "own.yaml", "--resume", *flags)
    said = " ".join(result.stderr.split())
    if named:
        assert result.exit_code == Exit.USAGE
        assert "training.learning_rate: 0.0001 → 0.0003" in said
        assert "lora.alpha: 16" not in said
    else:
        assert result.exit_code == 0, result.stderr
        assert "lora.alpha 16, lora.dropout 0.05, training.learning_rate 0.0001, training.max_length 1024, as" in said


def test_its_best_checkpoint_is_still_that_of_the_lowest_loss(old_run: Any, cli: Any) -> None:
    run = old_run("interrupted")
    resume = ("sft", "--config", run / "recipe.yaml", "--resume", "--checkpoints.best_by")
    refused = cli(*resume, "exact")
    assert refused.exit_code == Exit.USAGE
    assert "checkpoints.best_by: auto → exact" in " ".join(refused.stderr.split())
    done = cli(*resume, "loss")
    assert done.exit_code == 0, done.stderr
    assert "which counted no exact answers: the lowest loss is best" in " ".join(done.stderr.split())
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["best_by"] == "loss"
    assert report["exact_answers"]["before"] is None  # of the untrained adapter, which the earlier version validated


def kept(old: Any, new: Any) -> bool:
    """Whether everything that an old file says is said again, and in its place."""
    if isinstance(old, dict):
        return all(key in new and kept(value, new[key]) for key, value in old.items())
    if isinstance(old, list):
        return len(old) == len(new) and all(map(kept, old, new))
    return bool(old == new)


REPORTS = [OLD_RUNS / "finished" / "report.json", OLD_RUNS / "reports" / "first.json"]
VERIFICATIONS = sorted((OLD_RUNS / "verifications").iterdir())


@pytest.mark.parametrize("file", REPORTS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_an_old_report_is_read_whole_and_shown(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from loratune.runs.report import read_report
    from loratune.training.reporting.report import show_report

    shutil.copy(file, tmp_path / "report.json")
    old = json.loads(file.read_text(encoding="utf-8"))
    report = read_report(tmp_path)
    assert kept(old, json.loads(json.dumps(report.values())))
    show_report(report)
    told = capsys.readouterr().err
    assert f"{old['steps']} ({old['epochs']:g} epochs)" in told
    assert ("0 of 1 differ from the base's" in " ".join(told.split())) == ("health" in old)


@pytest.mark.parametrize("file", VERIFICATIONS, ids=lambda file: file.stem)
def test_an_old_verification_is_read_whole_and_shown(file: Path, tmp_path: Path) -> None:
    from loratune.delivery.verification.report import show_verification
    from loratune.runs.verification import MergedModel, read_verification

    shutil.copy(file, tmp_path / "verification.json")
    old = json.loads(file.read_text(encoding="utf-8"))
    verification = read_verification(tmp_path)
    assert verification is not None
    assert (verification.kind, verification.is_sealed) == (old["kind"], False)
    assert (verification.files is None) == ("files" not in old)
    assert kept(old, json.loads(json.dumps(verification.values())))
    if isinstance(verification.proved, MergedModel):
        show_verification(verification.proved)


def test_a_model_merged_by_an_old_version_is_asked_as_it_was_trained(tmp_path: Path) -> None:
    from loratune.runs.opening import merged_prompt

    for name, generation_prompt in (("merged", "auto"), ("first_merged", "template"), ("bnb4", "template")):
        shutil.copy(OLD_RUNS / "verifications" / f"{name}.json", tmp_path / "verification.json")
        prompt = merged_prompt(tmp_path)
        assert (prompt.enable_thinking, prompt.generation_prompt, prompt.date) == (False, generation_prompt, None)


def test_what_was_chosen_in_an_old_run_is_a_difference_and_new_settings_are_none(old_run: Any, cli: Any) -> None:
    run = old_run("interrupted")
    flags = ["sft", "--config", run / "recipe.yaml", "--resume"]
    refused = cli(*flags, "--lora.target_modules", "k_proj")
    assert refused.exit_code == Exit.USAGE
    said = " ".join(refused.stderr.split())
    assert "lora.target_modules: ['q_proj'] → ['k_proj']" in said
    settings = said.partition("different settings:")[2]  # another build of torch is told before
    assert settings.count(" → ") == 1
    refused = cli(*flags, "--training.max_grad_norm", "0.5")
    assert "training.max_grad_norm: 1.0 → 0.5" in " ".join(refused.stderr.split())
