"""What of an adapter can be merged, what is refused, and that neither a damaged file nor a wrong model gets past."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_QWEN
from hypothesis import given, settings
from hypothesis import strategies as st
from misreading import misread_updates
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_merge import make_adapter
from transformers import AutoModelForCausalLM
from typer.testing import Result

from loratune.data.encoding.encoder import IGNORED, Encoder
from loratune.delivery.merge import merge
from loratune.delivery.merge.merged_weights import MergePlan, plan_merge, write_merged
from loratune.delivery.merge.update import TensorUpdate, read_updates
from loratune.delivery.verification.parity import compare_models, likeliest_tokens
from loratune.delivery.verification.proof import EXACT, OTHER_BASE, check_parity, compare_answers
from loratune.delivery.verification.read_back import read_back
from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.peft_merge import PeftMerge
from loratune.model.from_folder import load_plain
from loratune.model.tokenizer import load_tokenizer
from loratune.model.weights.mapped import load_mapped
from loratune.model.weights.tensor_files import TensorFiles
from loratune.recipe.sections import PromptSettings
from loratune.runs.probe import Probe, ProbeRow
from loratune.runs.verification import Bounds

Cli = Callable[..., Result]
Edit = Callable[[Path], None]
PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def plain_adapter(random_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "plain"
    make_adapter(random_qwen, folder)
    return folder


@pytest.fixture
def adapter(plain_adapter: Path, tmp_path: Path) -> Path:
    """One to be spoilt."""
    return shutil.copytree(plain_adapter, tmp_path / "adapter")


# --- arithmetic ---

SIZES = st.integers(1, 9)


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.integers(1, 4), st.floats(-3, 3), st.booleans(), st.booleans(), st.integers(0, 2**30), SIZES)
def test_rows_of_an_update_are_those_of_the_whole(
    rows: int, columns: int, rank: int, scaling: float, has_magnitude: bool, is_replaced: bool, seed: int, step: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base, up, down = draw(rows, columns), draw(rows, rank), draw(rank, columns)
    magnitude = draw(rows) if has_magnitude else None
    replacement = draw(rows + 2, columns) if is_replaced else None  # a vocabulary may have grown
    if replacement is not None:
        up, magnitude = draw(rows + 2, rank), draw(rows + 2) if has_magnitude else None
    expected = (base if replacement is None else replacement).clone()
    expected[rows - 1], expected[0] = draw(columns), draw(columns)
    numbers, values = torch.tensor([rows - 1, 0][: min(rows, 2)]), expected[[rows - 1, 0][: min(rows, 2)]]
    expected = expected + scaling * (up @ down)
    if magnitude is not None:
        expected = torch.stack([m * row / row.norm() for m, row in zip(magnitude, expected, strict=True)])
    update = TensorUpdate(replacement, up, down, scaling, magnitude, row_numbers=numbers, row_values=values)
    before, source = base.clone(), update.source(base)
    pieces = [update.apply(source[start : start + step], start) for start in range(0, len(source), step)]
    torch.testing.assert_close(torch.cat(pieces), expected)
    assert torch.equal(base, before)


def test_a_shift_of_a_bias_is_scaled() -> None:
    update = TensorUpdate(shift=torch.tensor([1.0, 2.0, 3.0]), scaling=0.5)
    assert update.apply(torch.tensor([10.0, 20.0]), 1).tolist() == [11.0, 21.5]


# --- what does not fit ---


def edit_config(**values: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)

    return edit


def put(name: str, *shape: int) -> Edit:
    return edit_weights(lambda tensors: tensors.update({PREFIX + name: torch.zeros(*shape)}))


SAVED_HEAD = "lm_head.modules_to_save.default.weight"
A, B = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"
FAULTS: dict[str, tuple[Edit, str]] = {
    "an extra tensor": (put("model.layers.0.extra.weight", 2), "layers.0.extra.weight: the base has no"),
    "a tensor of a module that there is not": (put("model.layers.7.mlp.up_proj.lora_A.weight", 4, 32), "layers.7.mlp"),
    "a tensor without PEFT's prefix": (edit_weights(lambda t: t.update(foo=torch.zeros(1))), "foo"),
    "a part that nobody knows": (put(f"{Q0}.lora_C.weight", 4, 4), f"{Q0}.lora_C.weight"),
    "a tensor of a tensor": (
        put(f"{Q0}.weight.lora_A.weight", 4, 32),
        f"1 tensor too many, 0 too few, first base_model.model.{Q0}.weight.lora_A.weight",
    ),
    "a missing B": (edit_weights(lambda t: t.pop(B)), f"1 too few, first base_model.model.{Q0}.lora_B.weight"),
    "a missing A": (edit_weights(lambda t: t.pop(A)), f"1 too few, first base_model.model.{Q0}.lora_A.weight"),
    "A of another rank": (edit_weights(lambda t: t.update({A: torch.zeros(5, 32)})), "q_proj.lora_A.weight: rank 5"),
    "A of another width": (
        edit_weights(lambda t: t.update({A: torch.zeros(4, 31)})),
        "[32, 31] for a base of [32, 32]",
    ),
    "B of another height": (edit_weights(lambda t: t.update({B: torch.zeros(1, 4)})), "[1, 32] for a base of [32, 32]"),
    "a flat B": (edit_weights(lambda t: t.update({B: torch.zeros(32)})), "q_proj.lora_B.weight: of shape [32]"),
    "a flat A": (edit_weights(lambda t: t.update({A: torch.zeros(4)})), "q_proj.lora_A.weight: of shape [4]"),
    "another rank in the config": (edit_config(r=2), "rank 4 where the adapter's config says 2"),
    "a rank pattern that does not fit": (edit_config(rank_pattern={"q_proj": 3}), "q_proj.lora_A.weight: rank 4"),
    "no alpha": (edit_config(lora_alpha=None), "lora_alpha"),
    "an alpha that is none": (edit_config(lora_alpha=float("inf")), "alpha"),
    "no rank": (edit_config(r=0), "r is 0; a rank is a whole number from 1"),
    "NaN": (edit_weights(lambda t: t[A].view(-1).__setitem__(0, math.nan)), "q_proj.lora_A.weight"),
    "infinity": (edit_weights(lambda t: t[B].view(-1).__setitem__(0, -math.inf)), "q_proj.lora_B.weight"),
    "PiSSA": (edit_config(init_lora_weights="pissa_niter_16"), "pissa_niter_16"),
    "OLoRA": (edit_config(init_lora_weights="olora"), "olora"),
    "trained tokens that are not there": (edit_config(trainable_token_indices=[1, 2]), "embed_tokens was trained"),
    "a module that is not there": (edit_config(modules_to_save=["lm_head"]), "lm_head was trained and is not in"),
    "biases that are not there": (edit_config(bias="lora_only"), "layers.0.self_attn.q_proj.bias was trained"),
    "tokens that nobody names": (
        put("model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 32),
        "trainable_token_indices does not say which",
    ),
    "repeated layers": (edit_config(layer_replication=[[0, 1], [0, 1]]), "layer_replication"),
    "a setting of the future": (edit_config(use_something_new=True), "use_something_new"),
    "a grown vocabulary": (put("model.embed_tokens.weight", 3010, 32), "3008 or 3010 rows; the base has 3008"),
    "a grown head": (put("lm_head.weight", 3010, 32), "the rows of model.embed_tokens.weight are not in"),
    "DoRA on an embedding": (put("model.embed_tokens.lora_magnitude_vector", 32), "embed_tokens.lora_magnitude_vector"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_does_not_fit_leaves_nothing_behind(
    cli: Cli, random_qwen: Path, adapter: Path, tmp_path: Path, fault: str
) -> None:
    edit, message = FAULTS[fault]
    edit(adapter)
    result = cli("merge", "-a", adapter, "-m", random_qwen, "-o", tmp_path / "out" / "merged", "--no-logits")
    assert result.exit_code == Exit.MODEL, result.stderr
    assert message in " ".join(result.stderr.split())
    assert not list((tmp_path / "out").glob("*"))


def test_one_tensor_given_twice_is_refused(random_qwen: Path, adapter: Path) -> None:
    put("lm_head.weight", 3008, 32)(adapter)
    edit_weights(lambda tensors: tensors.update({f"{PREFIX}{SAVED_HEAD}": torch.ones(3008, 32)}))(adapter)
    with pytest.raises(LoratuneError, match="replaced twice"):
        read_updates(adapter, TensorFiles([random_qwen / "model.safetensors"]).infos, is_tied=True)


def test_every_problem_is_told_at_once(random_qwen: Path, adapter: Path) -> None:
    put("one.weight", 1)(adapter)
    put("two.weight", 1)(adapter)
    with pytest.raises(LoratuneError, match=r"does not fit the base[\s\S]*one\.weight[\s\S]*two\.weight"):
        read_updates(adapter, TensorFiles([random_qwen / "model.safetensors"]).infos, is_tied=True)


# --- reading back ---

ROUGH = Bounds(0.1, 5e-3, 0.005)
"""Bounds that no wrong merge is within, however rough."""
Written = tuple[MergePlan, PeftMerge, TensorFiles, Path]


@pytest.fixture
def written(random_qwen: Path, plain_adapter: Path, tmp_path: Path) -> Written:
    """A correctly merged model in bfloat16 and in two files, not yet read back."""
    base = TensorFiles([random_qwen / "model.safetensors"])
    updates = read_updates(plain_adapter, base.infos, is_tied=True)
    plan = plan_merge(base, updates, True, torch.bfloat16, 200_000)
    assert len(plan.shards) == 2
    write_merged(plan, base, tmp_path, lambda _: None)
    return plan, PeftMerge(random_qwen, plain_adapter, plan.vocabulary, is_tied=True), base, tmp_path


def file_of(written: Written, name: str) -> Path:
    plan, _, _, folder = written
    return folder / next(shard for shard, infos in plan.shards.items() if name in [info.name for info in infos])


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def flip_bit(path: Path, name: str, place: int) -> None:
    """Flip the highest bit but the sign's of a two-byte number."""
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    content = bytearray(path.read_bytes())
    start = json.loads(content[8 : 8 + header_bytes])[name]["data_offsets"][0]
    content[8 + header_bytes + start + 2 * place + 1] ^= 0x20
    path.write_bytes(content)


def test_what_was_written_well_is_found_well(written: Written) -> None:
    plan, _, _, folder = written
    seen: list[int] = []
    found = read_back(*written, seen.append, torch.bfloat16)
    assert (found.tensors, found.updated, found.identical) == (26, 6, 20)
    assert (
        sum(seen) == plan.nbytes == sum(t.nbytes for p in folder.glob("*.safetensors") for t in load_file(p).values())
    )
    assert 0 < found.largest_error_steps <= 0.5
    assert found.unchanged == ()
    assert found.rows == 2 * (32 + 16 + 32)
    assert found.largest_forward_error < 1e-9
    assert 0 < found.lost_to_rounding < 0.1


@pytest.mark.parametrize("place", [0, 1001, 3008 * 32 - 1])
def test_any_flipped_bit_of_an_untouched_tensor_is_noticed(written: Written, place: int) -> None:
    name = "model.embed_tokens.weight"
    flip_bit(file_of(written, name), name, place)
    with pytest.raises(LoratuneError, match=name):
        read_back(*written, lambda _: None, torch.bfloat16)


@pytest.mark.parametrize("place", [0, 31, 97, 32 * 32 - 1])
def test_a_flipped_bit_in_any_row_of_a_merged_tensor_is_noticed(written: Written, place: int) -> None:
    flip_bit(file_of(written, f"{Q0}.weight"), f"{Q0}.weight", place)
    with pytest.raises(LoratuneError, match=r"q_proj\.weight.*rounding steps"):
        read_back(*written, lambda _: None, torch.bfloat16)


def test_a_zero_that_became_something_is_noticed(random_qwen: Path, adapter: Path, tmp_path: Path) -> None:
    edit_weights(lambda tensors: tensors[B].zero_())(adapter)
    base = shutil.copytree(random_qwen, tmp_path / "base")
    rewrite(base / "model.safetensors", lambda tensors: tensors[f"{Q0}.weight"].zero_())
    files = TensorFiles([base / "model.safetensors"])
    plan = plan_merge(files, read_updates(adapter, files.infos, True), True, torch.bfloat16, 1 << 30)
    (tmp_path / "out").mkdir()
    write_merged(plan, files, tmp_path / "out", lambda _: None)
    peft = PeftMerge(base, adapter, plan.vocabulary, is_tied=True)
    assert f"{Q0}.weight" in read_back(plan, peft, files, tmp_path / "out", lambda _: None, torch.bfloat16).unchanged
    rewrite(tmp_path / "out" / "model.safetensors", lambda tensors: tensors[f"{Q0}.weight"][0].fill_(1e-3))
    with pytest.raises(LoratuneError, match="q_proj"):
        read_back(plan, peft, files, tmp_path / "out", lambda _: None, torch.bfloat16)


def test_a_base_that_is_not_finite_is_one_message(random_qwen: Path, adapter: Path, tmp_path: Path) -> None:
    base = shutil.copytree(random_qwen, tmp_path / "base")
    rewrite(base / "model.safetensors", lambda tensors: tensors[f"{Q0}.weight"][3].fill_(math.inf))
    files = TensorFiles([base / "model.safetensors"])
    plan = plan_merge(files, read_updates(adapter, files.infos, True), True, None, 1 << 30)
    (tmp_path / "out").mkdir()
    write_merged(plan, files, tmp_path / "out", lambda _: None)
    peft = PeftMerge(base, adapter, plan.vocabulary, is_tied=True)
    with pytest.raises(LoratuneError, match="PEFT does not merge this adapter"):
        read_back(plan, peft, files, tmp_path / "out", lambda _: None)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "without a tensor": lambda path: rewrite(path, lambda t: t.pop(f"{Q0}.weight")),
    "with another tensor": lambda path: rewrite(path, lambda t: t.update(more=torch.zeros(2))),
    "of another type": lambda path: rewrite(path, lambda t: t.update({n: v.float() for n, v in t.items()})),
    "of another shape": lambda path: rewrite(path, lambda t: t.update({n: v.flatten() for n, v in t.items()})),
    "with NaN": lambda path: rewrite(path, lambda t: t[f"{Q0}.weight"][0].fill_(math.nan)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_noticed(written: Written, damage: str) -> None:
    DAMAGE[damage](file_of(written, f"{Q0}.weight"))
    with pytest.raises(LoratuneError) as raised:
        read_back(*written, lambda _: None, torch.bfloat16)
    assert raised.value.exit_code == Exit.MODEL


def test_an_index_that_names_another_file_is_noticed(written: Written) -> None:
    path = written[3] / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, last = sorted(set(index["weight_map"].values()))
    index["weight_map"][f"{Q0}.weight"] = first if index["weight_map"][f"{Q0}.weight"] == last else last
    path.write_text(json.dumps(index))
    with pytest.raises(LoratuneError, match="does not describe"):
        read_back(*written, lambda _: None, torch.bfloat16)


@pytest.mark.parametrize("flags", [(), ("--no-logits",)])
def test_a_target_left_as_in_the_base_is_noticed_and_nothing_stays(
    cli: Cli, random_qwen: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    def forget_one(plan: MergePlan, base: TensorFiles, folder: Path, advance: Callable[[int], None]) -> None:
        write_merged(plan, base, folder, advance)
        rewrite(folder / "model.safetensors", lambda t: t.update({f"{Q0}.weight": base.tensor(f"{Q0}.weight").clone()}))

    monkeypatch.setattr(merge, "write_merged", forget_one)
    result = cli("merge", "-a", adapter, "-m", random_qwen, "-o", tmp_path / "out" / "merged", *flags)
    assert result.exit_code == Exit.MODEL
    assert "rounding steps away from PEFT's" in " ".join(result.stderr.split())
    assert not list((tmp_path / "out").iterdir())


def test_peft_s_own_merge_shows_what_was_read_wrongly_throughout(
    cli: Cli, random_qwen: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def double(updates: dict[str, TensorUpdate]) -> None:
        updates[f"{Q0}.weight"].scaling *= 2

    misread_updates(monkeypatch, double)
    result = cli("merge", "-a", adapter, "-m", random_qwen, "-o", tmp_path / "out" / "merged")
    assert result.exit_code == Exit.MODEL
    assert f"{Q0}.weight: the written file holds row 0" in " ".join(result.stderr.split())
    assert not list((tmp_path / "out").iterdir())


# --- comparing models ---


def rows_of(*lengths: int) -> list[ProbeRow]:
    generator = torch.Generator().manual_seed(2)
    rows = []
    for length in lengths:
        ids = torch.randint(0, 3000, (length,), generator=generator).tolist()
        rows.append(ProbeRow(ids, [IGNORED] * (length // 3) + ids[length // 3 :]))
    return rows


def perturbed(folder: Path) -> Any:
    model = load_plain(folder)
    generator = torch.Generator().manual_seed(4)
    head = model.lm_head.weight.detach().clone()
    model.lm_head.weight = torch.nn.Parameter(head + 0.05 * torch.randn(head.shape, generator=generator))
    return model.requires_grad_(False)


def test_a_model_is_like_itself(random_qwen: Path) -> None:
    for candidate in (load_plain(random_qwen), load_mapped(random_qwen)):
        (parity,) = compare_models(load_mapped(random_qwen), [candidate], rows_of(5, 9))
        assert (parity.top1_agreement, parity.clear_disagreement) == (1, 0)
        assert parity.largest_difference < 1e-6
        assert abs(parity.mean_kl) < 1e-6
        assert check_parity(parity, EXACT) == []
    model = load_plain(random_qwen)
    (parity,) = compare_models(model, [model], rows_of(5, 9))
    assert (parity.largest_difference, parity.mean_kl) == (0, 0)


def test_what_is_measured_is_plain_arithmetic_on_the_logits(random_qwen: Path) -> None:
    reference, candidate, rows = load_plain(random_qwen), perturbed(random_qwen), rows_of(70, 3, 25)
    (parity,) = compare_models(reference, [candidate], rows)
    kl, agree, unlike, difference, largest = [], [], [], 0.0, 0.0
    for row in rows:
        p, q = (model(torch.tensor([row.input_ids])).logits[0].double() for model in (reference, candidate))
        for place in range(len(row.input_ids) - 1):
            if row.labels[place + 1] == IGNORED:
                continue
            wanted, given = (logits[place].softmax(-1) for logits in (p, q))
            kl.append(float((wanted * (wanted.log() - given.log())).sum()))
            agree.append(int(wanted.argmax()) == int(given.argmax()))
            unlike.append(float(wanted[given.argmax()] / wanted.max()) < 0.5)
            difference = max(difference, float((p - q)[place].abs().max()))
            largest = max(largest, float(p[place].abs().max()))
    assert parity.tokens == len(kl)
    assert parity.mean_kl == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert parity.top1_agreement == sum(agree) / len(agree)
    assert 0 < parity.top1_agreement < 1
    assert parity.clear_disagreement == sum(unlike) / len(unlike)
    assert parity.largest_difference == pytest.approx(difference, rel=1e-4)
    assert parity.largest_logit == pytest.approx(largest, rel=1e-4)
    assert check_parity(parity, EXACT)


def test_batches_of_rows_of_any_length_give_what_each_row_gives(random_qwen: Path) -> None:
    reference, candidate = load_plain(random_qwen), perturbed(random_qwen)
    rows = rows_of(9, 250, 3, 200, 120, 240, 7, 180)
    found = likeliest_tokens(candidate, rows)
    together = [[one.token for one in row] for row in found]
    assert together == [[one.token for one in likeliest_tokens(candidate, [row])[0]] for row in rows]
    labelled = [
        candidate(torch.tensor([row.input_ids])).logits[0, :-1][torch.tensor(row.labels[1:]) >= 0] for row in rows
    ]
    assert together == [logits.argmax(-1).tolist() for logits in labelled]
    for row, logits, leads in zip(rows, labelled, found, strict=True):
        labels = torch.tensor([label for label in row.labels[1:] if label >= 0])
        behind = logits.max(-1).values - logits[torch.arange(len(labels)), labels]
        assert [one.lead for one in leads] == pytest.approx(behind.tolist(), abs=1e-5)
    (whole,) = compare_models(reference, [candidate], rows)
    parts = [compare_models(reference, [candidate], [row])[0] for row in rows]
    assert whole.tokens == sum(part.tokens for part in parts)
    assert whole.mean_kl == pytest.approx(sum(part.mean_kl * part.tokens for part in parts) / whole.tokens, rel=1e-4)
    assert whole.largest_difference == pytest.approx(max(part.largest_difference for part in parts), rel=1e-4)


@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_nan_is_out_of_bounds(random_qwen: Path, side: str) -> None:
    models = {"reference": load_plain(random_qwen), "candidate": perturbed(random_qwen)}
    models[side].lm_head.weight.data[7] = math.nan
    (parity,) = compare_models(models["reference"], [models["candidate"]], rows_of(5))
    for bounds in (EXACT, ROUGH, OTHER_BASE):
        assert check_parity(parity, bounds)


def test_the_base_without_its_adapter_is_out_of_bounds(random_qwen: Path, plain_adapter: Path) -> None:
    reference = PeftModel.from_pretrained(load_plain(random_qwen), plain_adapter).eval()
    (parity,) = compare_models(reference, [load_plain(random_qwen)], rows_of(20, 30))
    for bounds in (EXACT, ROUGH):
        assert check_parity(parity, bounds)


def test_answers_are_followed_to_their_first_other_token() -> None:
    encoder = Encoder(load_tokenizer(TINY_QWEN), PromptSettings())
    probe = Probe([], [[{"role": "user", "content": text}] for text in ("Who are you?", "How much is 3+3?")])
    model = load_plain(TINY_QWEN)
    same = compare_answers(model, load_plain(TINY_QWEN), encoder, probe, 0.0)
    for question, answer in zip(probe.questions, same, strict=True):
        assert answer.question == question[0]["content"]
        assert answer.merged == answer.adapter
        assert (answer.has_changed, answer.agreeing, answer.lead) == (False, answer.tokens, 0)
        ids = torch.tensor([encoder.prompt_ids(question)])
        output = AutoModelForCausalLM.from_pretrained(TINY_QWEN).generate(ids, max_new_tokens=20, do_sample=False)
        assert answer.merged == encoder.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    other = load_plain(TINY_QWEN)
    other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.detach().clone())
    ids = encoder.tokenizer(same[0].merged).input_ids
    kept = 2
    lost = next(token for token in ids[kept:] if token not in ids[:kept])
    other.lm_head.weight.data[lost] = 0  # never the likeliest again
    different = compare_answers(model, other, encoder, probe, 0.0)[0]
    assert different.merged == same[0].merged
    assert different.has_changed
    assert (different.tokens, different.agreeing) == (same[0].tokens, ids.index(lost))
    place = ids.index(lost)
    before = encoder.tokenizer.decode(ids[:place])
    assert different.adapter.startswith(before)
    assert len(encoder.tokenizer(different.adapter).input_ids) <= place + 1
    assert not different.merged.startswith(different.adapter)
