"""A merged model is held to base + adapter with the rounding errors of its weights, whatever they cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_QWEN
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_merge import HEAD, make_adapter, make_model, merged, small
from test_update import rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
from typer.testing import Result

from loratune.delivery.merge import model_folder
from loratune.delivery.verification.parity import InState, compare_models
from loratune.delivery.verification.proof import EXACT, check_parity
from loratune.errors import Exit
from loratune.model.adapter.attach import load_adapter
from loratune.model.adapter.peft_merge import PeftMerge
from loratune.model.weights.mapped import load_mapped
from loratune.model.weights.rounding import Rounding, rounded_as
from loratune.runs.probe import BUILT_IN_QUESTIONS

Cli = Callable[..., Result]
WARNING = "rounding to bfloat16 takes a good part"
pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* have invalid shape. .*lora_B.bias")


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora with biases": {"use_rslora": True, "lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "saved norms": {"modules_to_save": ["norm"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "head": {"target_modules": ["lm_head", "k_proj"]},
    "trained tokens": {"trainable_token_indices": {"embed_tokens": [5, 700]}},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_becomes_peft_s_merge_rounded_once(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", small(Qwen2Config, tie_word_embeddings=False), torch.bfloat16)
    peft = make_adapter(base, tmp_path / "adapter", **KINDS[kind])
    whole = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
    ).merge_and_unload()
    for parameter in whole.parameters():
        parameter.data = parameter.to(dtype).float()
    changes = PeftMerge(base, tmp_path / "adapter", peft.config.vocab_size, False).changes
    roundings = {name: Rounding(dtype, changes.get(name)) for name in dict(whole.named_parameters())}
    reference, rows = load_adapter(load_mapped(base), tmp_path / "adapter", keep_dtype=True), rows_of(40, 60)
    before, like_peft = compare_models(reference, [reference, whole.eval()], rows)
    assert before.largest_difference == 0
    (exact,) = compare_models(InState(reference, lambda: rounded_as(reference, roundings)), [whole], rows)
    assert exact.largest_difference < 0.02 * like_peft.largest_difference
    assert check_parity(exact, EXACT) == []
    (after,) = compare_models(reference, [whole], rows)
    assert after == like_peft, "nothing may be left of the rounding errors"


def test_where_float32_decides_between_two_numbers_the_written_one_is_taken_and_no_other(tmp_path: Path) -> None:
    base, adapter = make_model(tmp_path / "base", small(Qwen2Config), torch.bfloat16), tmp_path / "adapter"
    make_adapter(base, adapter, use_dora=True)
    name, rows = "model.layers.0.self_attn.q_proj.weight", torch.arange(4)
    held = load_file(base / "model.safetensors")[name][rows]

    def merged_rows() -> tuple[Any, torch.Tensor]:
        change = PeftMerge(base, adapter, 3008, False).changes[name]
        return change, change.rows(held.double(), rows)

    tensors = load_file(adapter / "adapter_model.safetensors")
    (magnitude,) = (key for key in tensors if "layers.0.self_attn.q_proj.lora_magnitude" in key)
    step = 2.0**-8 * torch.frexp(merged_rows()[1][0, 0]).exponent.double().exp2()
    middle = (merged_rows()[1][0, 0] / step).floor() * step + step / 2
    tensors[magnitude][0] *= (middle / merged_rows()[1][0, 0]).float()
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})

    change, merged = merged_rows()
    rounded = merged.bfloat16()
    written = rounded.clone()
    written[0, 0] = 2 * middle - rounded[0, 0]  # the other neighbour, as near as the first
    written[1, 1] *= 1 + 2.0**-7  # a fault of a step
    error = Rounding(torch.bfloat16, change, found=written).error(held, rows)
    assert written[0, 0] != rounded[0, 0]
    expected = rounded.clone()
    expected[0, 0] = written[0, 0]
    torch.testing.assert_close(error.double(), expected.double() - merged, rtol=0, atol=1e-9)
    assert not torch.equal(Rounding(torch.bfloat16, change).error(held, rows), error)


def half_lost(tmp_path: Path, size: float = 0.1) -> tuple[Path, Path]:
    """A base whose large weights bfloat16 holds coarsely, and an adapter much of which is less than half a step."""
    base = make_model(tmp_path / "base", small(Qwen2Config, tie_word_embeddings=False, hidden_size=256), torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    tensors[HEAD] *= 500
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    make_adapter(base, tmp_path / "adapter", target_modules=["lm_head"], r=1, lora_alpha=1)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    trained = load_file(path)
    torch.manual_seed(3)
    for name, tensor in trained.items():
        trained[name] = torch.randn_like(tensor).sign() * (0.5 if "lora_A" in name else size)
    save_file(trained, path, metadata={"format": "pt"})
    return base, tmp_path / "adapter"


def test_an_update_that_rounding_takes_a_part_of_is_merged_with_a_warning(
    cli: Cli, output: Path, tmp_path: Path
) -> None:
    base, adapter = half_lost(tmp_path)
    report = merged(cli, output, "--adapter", adapter, "--model", base)
    lost, effect = report["logits"]["original"]["mean_kl"], report["without_adapter"]["mean_kl"]
    assert lost > 0.5 * effect, "a bound on the distance from base + adapter would refuse it"
    assert report["logits_with_rounding"]["original"]["mean_kl"] < 1e-6
    assert any(warning.startswith(WARNING) for warning in report["warnings"])
    told = " ".join(cli("verify", output, env={"COLUMNS": "200"}).stderr.split())
    rounded = report["logits_with_rounding"]["original"]["mean_kl"]
    for label, mean_kl in (("logits", lost), ("rounded alike", rounded)):
        assert f"mean KL {mean_kl:.1e}" in told.partition(f" {label} ")[2].partition("largest difference")[0]
    one = report["logits_with_rounding"]["original"]
    share = one["largest_difference"] / max(1, one["largest_logit"])
    assert f"largest difference {share:.2g} of the largest logit ({one['largest_logit']:.3g})" in told
    assert "bounds rounded alike: largest difference" in told
    wide = merged(cli, tmp_path / "wide", "--adapter", adapter, "--model", base, "--dtype", "float32")
    assert wide["logits"]["original"]["mean_kl"] < 1e-6
    assert not any(warning.startswith(WARNING) for warning in wide["warnings"])


def test_what_rounding_takes_is_told_once(cli: Cli, output: Path, tmp_path: Path) -> None:
    base, adapter = half_lost(tmp_path, 0.01)
    report = merged(cli, output, "--adapter", adapter, "--base-model", base)
    assert report["read_back"]["lost_to_rounding"] > 0.9, "which alone would be told"
    lost, effect = report["logits"]["original"]["mean_kl"], report["without_adapter"]["mean_kl"]
    assert lost > 0.1 * effect, "and so would this"
    (told,) = [warning for warning in report["warnings"] if "rounding" in warning]
    assert told.startswith(WARNING)


def test_tensors_that_rounding_leaves_as_they_were_are_told_with_it(cli: Cli, output: Path, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", small(Qwen2Config, tie_word_embeddings=False), torch.bfloat16)
    make_adapter(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    sizes = {"layers.0": 1e-9, "layers.1": 1e-4}
    uneven = {
        name: tensor * next(size for layer, size in sizes.items() if layer in name) if "lora_B" in name else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(uneven, path, metadata={"format": "pt"})
    flags = ("--adapter", tmp_path / "adapter", "--base-model", base, "--no-logits")
    report = merged(cli, output, *flags)
    back = report["read_back"]
    assert 0 < len(back["unchanged"]) < back["updated"]
    (told,) = [warning for warning in report["warnings"] if "rounding" in warning or "still equal" in warning]
    words = f"{len(back['unchanged'])} of {back['updated']} tensors that the adapter changes still equal the base's"
    assert words in told


def test_an_update_below_the_rounding_steps_is_warned_of_without_running_the_models(
    cli: Cli, output: Path, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base", small(Qwen2Config, tie_word_embeddings=False), torch.bfloat16)
    make_adapter(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    light = {name: tensor * (1e-4 if "lora_B" in name else 1) for name, tensor in load_file(path).items()}
    save_file(light, path, metadata={"format": "pt"})
    flags = ("--adapter", tmp_path / "adapter", "--base-model", base, "--no-logits")
    report = merged(cli, output, *flags)
    assert report["read_back"]["lost_to_rounding"] > 0.9
    assert any("little is left of the training" in warning for warning in report["warnings"])
    wide = merged(cli, tmp_path / "wide", *flags, "--dtype", "float32")
    assert not any("little is left" in warning for warning in wide["warnings"])


@pytest.mark.parametrize("values", [{"rms_norm_eps": 3e-6}, {"rope_theta": 5000.0}])
def test_a_fault_that_does_less_than_rounding_is_noticed(
    cli: Cli, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, float]
) -> None:
    base, adapter = half_lost(tmp_path)
    write = model_folder._write_config

    def write_wrong(source: Path, folder: Path, *others: Any) -> list[str]:
        changes = write(source, folder, *others)
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"] |= {key: value for key, value in values.items() if key in config["rope_parameters"]}
        (folder / "config.json").write_text(json.dumps(config | {key: values[key] for key in values if key in config}))
        return changes

    monkeypatch.setattr(model_folder, "_write_config", write_wrong)
    monkeypatch.setattr("loratune.delivery.merge.merge.check_beside", lambda *_: None)
    result = cli("merge", "--adapter", adapter, "--model", base, "--output", output)
    assert result.exit_code == Exit.MODEL
    told = " ".join(result.stderr.split())
    assert "is not what base + adapter is" in told
    assert "The merged model has been removed" in told
    assert not output.exists()


def nearly_tied(folder: Path, share: float) -> tuple[Path, Path]:
    """A base and an adapter that answer the first question with a token whose logit is larger by a share.

    The other token's row of the head is one of numbers in bfloat16, and this one's is larger than it by the share.
    """
    base, adapter = make_model(folder / "base", small(Qwen2Config, tie_word_embeddings=False)), folder / "adapter"
    peft, tensors = make_adapter(base, adapter), load_file(base / "model.safetensors")
    with torch.no_grad():
        logits = peft(torch.tensor([prompt_ids(BUILT_IN_QUESTIONS[0])])).logits[0, -1]
    other = int(logits[:-1].argmax())  # of two equal logits the first is taken
    tensors[HEAD][other] = tensors[HEAD][other].bfloat16().float()
    tensors[HEAD][-1] = tensors[HEAD][other] * (1 + share)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base, adapter


def prompt_ids(question: str) -> list[int]:
    turns = [{"role": "user", "content": question}]
    ids: list[int] = AutoTokenizer.from_pretrained(TINY_QWEN).apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )
    return ids


def test_an_answer_that_rounding_has_changed_is_told_and_is_no_error(cli: Cli, tmp_path: Path) -> None:
    base, adapter = nearly_tied(tmp_path, share=1e-3)
    line = ("merge", "-a", adapter, "-m", base, "--dtype", "bfloat16", "-o", tmp_path / "merged", "--json")
    done = cli(*line, env={"COLUMNS": "20000"})
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.dtype == torch.bfloat16
    expected = []
    for question, answer in zip(BUILT_IN_QUESTIONS, found["answers"], strict=True):
        prompt = prompt_ids(question)
        ids = plain.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0]
        with torch.no_grad():
            logits = reference(ids[None]).logits[0, len(prompt) - 1 : -1]
        leads = logits.max(-1).values - logits.gather(-1, ids[len(prompt) :, None])[:, 0]
        agreeing = next((place for place, lead in enumerate(leads) if lead > 1e-4), len(leads))
        assert (answer["tokens"], answer["agreeing"]) == (len(leads), agreeing)
        assert answer["lead"] == pytest.approx(float([*leads, 0][agreeing]), abs=1e-5)
        assert (answer["adapter"] != answer["merged"]) == (agreeing < len(leads))
        same = f"{question!r}: the same for {agreeing} of {len(leads)} tokens"
        expected += [same] if agreeing < len(leads) else []
    assert expected[0] == f"{BUILT_IN_QUESTIONS[0]!r}: the same for 0 of 20 tokens"
    (told,) = (warning for warning in found["warnings"] if "greedy answer" in warning)
    assert told.startswith(f"{len(expected)} of 3 greedy answers differ")
    assert [line.strip().partition(", then")[0] for line in told.splitlines()[1:-1]] == expected
    assert "--dtype float32" in told
    assert told.splitlines()[0] in done.stderr
    again = cli("verify", tmp_path / "merged", "-a", adapter, "--base-model", base, "--json")
    assert again.exit_code == 0, again.stderr
    assert told in json.loads(again.stdout)["warnings"]
    assert told in json.loads(cli("verify", tmp_path / "merged", "--json").stdout)["warnings"]  # as recorded


def test_answers_that_are_the_same_are_not_told(cli: Cli, tmp_path: Path) -> None:
    base, adapter = nearly_tied(tmp_path, share=1e-3)
    found = merged(cli, tmp_path / "merged", "-a", adapter, "-m", base)
    assert found["dtype"] == "float32"
    assert all((one["agreeing"], one["lead"]) == (one["tokens"], 0) for one in found["answers"])
    assert "greedy" not in str(found["warnings"])


def test_a_token_that_float32_alone_decides_is_the_same(cli: Cli, tmp_path: Path) -> None:
    base, adapter = nearly_tied(tmp_path, share=1e-5)
    (first, *_) = merged(cli, tmp_path / "merged", "-a", adapter, "-m", base, "--dtype", "bfloat16")["answers"]
    prompt = torch.tensor([prompt_ids(BUILT_IN_QUESTIONS[0])])
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with torch.no_grad():
        of_both = [model(prompt).logits[0, -1] for model in (reference, load_mapped(tmp_path / "merged", False))]
    assert int(of_both[0].argmax()) == len(of_both[0]) - 1 != int(of_both[1].argmax())
    assert first["agreeing"] > 0
