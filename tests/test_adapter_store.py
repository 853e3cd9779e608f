"""Adapters of a folder: each answer is the adapter's own, whatever is loaded, evicted or replaced meanwhile."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from serving import benchmark_figures
from test_own_parameters import make_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune.engine import adapter_store as store_module
from loratune.engine.adapter_store import AdapterStore
from loratune.engine.engine import Engine, load_engine
from loratune.engine.sampling import Sampling
from loratune.engine.sequence import RunningSequence
from loratune.engine.types import Delta, GenerationRequest, joined
from loratune.errors import Exit, LoratuneError
from loratune.runs.adapter_folders import AdapterFolders

TEXT = "Once upon a time there was a river"
TOKENS = 8


def write_plain(folder: Path, seed: int, rank: int = 4, base: int = 32) -> Path:
    """A PEFT folder for random_qwen with LoRA on two projections of each layer, written without PEFT."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for module, rows in (("mlp.gate_proj", 48), ("self_attn.v_proj", 16)):
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, base, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "new", {"format": "pt"})
    (folder / "new").rename(folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["gate_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@cache
def _said(base: Path, folder: Path | None, text: str, _version: float) -> str:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():  # PEFT speaks of tied embeddings
        warnings.simplefilter("ignore")
        model = model if folder is None else PeftModel.from_pretrained(model, str(folder))
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(text, return_tensors="pt").input_ids
    output = model.eval().generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def said_by_peft(base: Path, folder: Path | None, text: str = TEXT) -> str:
    """What PEFT and `generate` say with an adapter alone."""
    version = (folder / "adapter_model.safetensors").stat().st_mtime_ns if folder else 0
    return _said(base, folder, text, version)


@contextmanager
def opened(base: Path, folder: Path, most: int) -> Iterator[tuple[Engine, AdapterStore]]:
    engine = load_engine([], str(base), slots=4)
    weights = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    engine.model.float().load_state_dict(weights)
    told: list[str] = []
    engine.store = AdapterStore(engine, AdapterFolders(folder, [engine.base_name]), most, told.append)
    try:
        yield engine, engine.store
    finally:
        engine.close()


def ask(engine: Engine, name: str, text: str = TEXT, **sampling: Any) -> str:
    """The answer of an adapter of the store."""
    assert engine.store
    found = engine.store.folders.find(name)
    assert found, name
    lease = engine.store.lease(found).result(60)
    pieces: list[Delta] = []
    ended = threading.Event()

    def add(piece: Delta) -> None:
        pieces.append(piece)
        if piece.finish:
            ended.set()

    engine.submit(GenerationRequest(text, Sampling(**{"max_new_tokens": TOKENS, **sampling})), add, lease)
    assert ended.wait(60)
    whole = joined(*pieces)
    if whole.error:
        raise whole.error
    return whole.text


KINDS: dict[str, dict[str, Any]] = {
    "usual": {},
    "of another rank": {"r": 7},
    "scaled by the root": {"use_rslora": True},
    "with patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "DoRA": {"use_dora": True},
    "with trained biases": {"bias": "all"},
    "with a whole module": {"modules_to_save": ["norm"]},
    "on the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "with tokens": {"trainable_token_indices": [5, 6, 7]},
}


@pytest.fixture(scope="module")
def kinds(random_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of each kind."""
    folder = tmp_path_factory.mktemp("store")
    for seed, (name, settings) in enumerate(KINDS.items()):
        make_adapter(random_qwen, folder / name, seed, **settings)
    return folder


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Six adapters of one layout."""
    for number in range(6):
        write_plain(tmp_path / "store" / f"a{number}", number)
    return tmp_path / "store"


def test_adapters_of_all_kinds_answer_as_they_do_alone(random_qwen: Path, kinds: Path) -> None:
    with opened(random_qwen, kinds, most=2) as (engine, store):
        with ThreadPoolExecutor(6) as clients:
            asked = [name for _ in range(3) for name in KINDS]
            found = list(clients.map(lambda name: ask(engine, name), asked))
        expected = {name: said_by_peft(random_qwen, kinds / name) for name in KINDS}
        assert dict(zip(asked, found, strict=True)) == expected
        assert found == [expected[name] for name in asked]
        assert len(set(expected.values())) >= len(KINDS) - 1
        assert store.in_memory == 2
        assert store.loads - store.evictions == 2
        base = dict(engine.answers([GenerationRequest(TEXT, Sampling(max_new_tokens=TOKENS))]))[0].text
        assert base == said_by_peft(random_qwen, None)


def mistakes(engine: Engine, base: Path, folder: Path, rounds: int = 4) -> list[str]:
    """Adapters whose answer is not their own when many are asked at once."""
    names = [f"a{number}" for number in range(6)] * rounds
    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(lambda name: ask(engine, name), names))
    return [name for name, text in zip(names, found, strict=True) if text != said_by_peft(base, folder / name)]


def test_more_adapters_than_fit_answer_at_once(random_qwen: Path, plain: Path) -> None:
    with opened(random_qwen, plain, most=2) as (engine, store):
        assert mistakes(engine, random_qwen, plain) == []
        assert len({said_by_peft(random_qwen, plain / f"a{number}") for number in range(6)}) == 6
        assert store.evictions >= 4


def test_an_eviction_of_an_adapter_in_use_is_caught(
    random_qwen: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module._Resident, "requests", property(lambda _: 0, lambda *_: None), raising=False)
    with opened(random_qwen, plain, most=2) as (engine, _):
        assert mistakes(engine, random_qwen, plain)


def test_a_prefix_of_another_adapter_is_caught(random_qwen: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(random_qwen, plain, most=1) as (engine, _):
        right = [ask(engine, name) for name in ("a0", "a1")]
    assert right == [said_by_peft(random_qwen, plain / name) for name in ("a0", "a1")]
    monkeypatch.setattr(RunningSequence, "shares_with", property(lambda self: (self.adapter, "")))
    with opened(random_qwen, plain, most=1) as (engine, _):
        assert [ask(engine, name) for name in ("a0", "a1")] != right


def adapter_tensors() -> list[tuple[int, ...]]:
    """The shapes of all tensors of adapters that this process holds, copies of theirs included."""
    gc.collect()
    sizes = {(4, 32), (48, 4), (16, 4)}
    # isinstance asks an object for its class, which some of other libraries warn of.
    found = (one for one in gc.get_objects() if issubclass(type(one), torch.Tensor))
    return sorted(tuple(one.shape) for one in found if tuple(one.shape) in sizes)


def test_the_number_of_tensors_in_memory_stays_the_same(random_qwen: Path, plain: Path) -> None:
    with opened(random_qwen, plain, most=2) as (engine, store):
        names = [f"a{number}" for number in range(6)]
        for name in names:
            ask(engine, name)
        before, objects = adapter_tensors(), len(gc.get_objects())
        assert before.count((4, 32)) >= 2 * 2 * 2  # adapters × layers × modules
        for name in names * 5:
            ask(engine, name)
        assert adapter_tensors() == before
        assert len(gc.get_objects()) < objects + 200
        assert store.loads == 6 * 6


def test_the_least_recently_used_adapter_leaves(random_qwen: Path, plain: Path) -> None:
    with opened(random_qwen, plain, most=2) as (engine, store):
        for name, loads in (("a0", 1), ("a1", 2), ("a0", 2), ("a2", 3), ("a0", 3), ("a1", 4)):
            ask(engine, name)
            assert (name, store.loads) == (name, loads)


def test_an_adapter_that_all_ask_for_makes_room_in_the_end(random_qwen: Path, plain: Path) -> None:
    """The only place is in use without a pause, and another adapter is waited for."""
    with opened(random_qwen, plain, most=1) as (_, store):
        found = {name: store.folders.all()[name] for name in ("a0", "a1")}
        first = store.lease(found["a0"]).result(60)
        other = store.lease(found["a1"])
        while store._closing is None:
            pass
        late = store.lease(found["a0"])
        assert not late.done()
        first.release()
        lease = other.result(60)
        assert not late.done()
        lease.release()
        late.result(60).release()
        assert store.loads == 3


def test_a_request_that_has_left_gets_no_adapter(random_qwen: Path, plain: Path) -> None:
    with opened(random_qwen, plain, most=1) as (engine, store):
        found = [store.folders.all()[name] for name in ("a0", "a1", "a2")]
        first = store.lease(found[0]).result(60)
        waiting = [store.lease(one) for one in found[1:]]
        assert waiting[1].cancel()
        first.release()
        waiting[0].result(60).release()
        ask(engine, "a0")
        assert store.loads == 3


def test_replaced_and_removed_files_are_noticed_and_running_answers_end(
    random_qwen: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratune.runs.adapter_folders.SCAN_SECONDS", 0.0)
    with opened(random_qwen, plain, most=2) as (engine, store):
        old = said_by_peft(random_qwen, plain / "a0")
        found = store.folders.find("a0")
        assert found
        lease = store.lease(found).result(60)  # of a request that has not begun
        write_plain(plain / "a0", seed=77)
        new = said_by_peft(random_qwen, plain / "a0")
        assert old != new
        assert ask(engine, "a0") == new
        pieces: list[Delta] = []
        ended = threading.Event()
        shutil.rmtree(plain / "a0")
        assert store.folders.find("a0") is None
        assert "a0" not in store.folders.all()
        engine.submit(
            GenerationRequest(TEXT, Sampling(max_new_tokens=TOKENS)),
            lambda piece: (pieces.append(piece), ended.set() if piece.finish else None)[0],
            lease,
        )
        assert ended.wait(60)
        assert joined(*pieces).text == old
        write_plain(plain / "b", seed=5)
        assert ask(engine, "b") == said_by_peft(random_qwen, plain / "b")


def test_a_wrong_adapter_is_refused_by_its_reason_and_the_others_go_on(
    random_qwen: Path, plain: Path, short_run: Path
) -> None:
    write_plain(plain / "wide", seed=1, base=40)
    config = json.loads((plain / "a0" / "adapter_config.json").read_text())
    write_plain(plain / "odd", seed=1)
    (plain / "odd" / "adapter_config.json").write_text(json.dumps(config | {"lora_ga_scale": 2.0}))
    write_plain(plain / "nan", seed=1)
    tensors = load_file(plain / "nan" / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, plain / "nan" / "adapter_model.safetensors", {"format": "pt"})
    shutil.copytree(short_run, plain / "of another base")
    base = shutil.copytree(random_qwen, plain.parent / "base")
    changed = load_file(base / "model.safetensors")
    changed["model.norm.weight"] += 1
    save_file(changed, base / "model.safetensors", {"format": "pt"})
    reasons = {
        "wide": "does not fit", "odd": "lora_ga_scale is set", "nan": "holds NaN",
        "of another base": r"base is another model: weights differ in 1 of \d+ tensors \(model.norm.weight\)",
    }  # fmt: skip
    with opened(base, plain, most=1) as (engine, store):
        for name, reason in reasons.items():
            with pytest.raises(LoratuneError, match=reason) as raised:
                ask(engine, name)
            assert raised.value.exit_code == Exit.MODEL
            assert "/loratune-" not in str(raised.value)  # the copy that was read
            ask(engine, "a0")
        assert store.loads == 1


def test_runs_are_offered_when_they_have_ended(short_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    run = shutil.copytree(short_run, folder / "run")
    status = json.loads((run / "status.json").read_text())
    names = []
    for state in ("running", "interrupted", "finished"):
        (run / "status.json").write_text(json.dumps(status | {"state": state}))
        names.append(list(AdapterFolders(folder).all()))
    assert names == [[], [], ["run"]]
    (folder / "step").symlink_to(next((short_run / "checkpoints").iterdir()))
    with opened(Path(json.loads((run / "manifest.json").read_text())["base"]["path"]), folder, most=2) as (engine, _):
        assert ask(engine, "run") == ask(engine, "step")  # the last checkpoint is the run's end


def test_half_written_and_strange_folders_are_not_offered(plain: Path, tmp_path: Path) -> None:
    folders = AdapterFolders(plain, ["a5"])
    weights = (plain / "a0" / "adapter_model.safetensors").read_bytes()
    (plain / "a0" / "adapter_model.safetensors").write_bytes(weights[:-4])
    (plain / "a1" / "adapter_config.json").unlink()
    (plain / "a2").rename(plain / ".a2")
    (plain / "a3").rename(plain / "a\x1b3")
    (plain / "file").write_text("")
    (plain / "loop").symlink_to(plain / "loop")
    write_plain(tmp_path / "outside", 1)
    (plain / "link").symlink_to(tmp_path / "outside")
    assert list(folders.all()) == ["a4", "link"]
    for name in ("../outside", str(tmp_path / "outside"), ".a2", "a4/../a4", "a5", "", ".", "..", "a\0"):
        assert folders.find(name) is None
    (plain / "a0" / "adapter_model.safetensors").write_bytes(weights)
    found = folders.find("a4")
    assert found
    write_plain(plain / "a4", 4)
    again = folders.find("a4")
    assert again
    assert again.version != found.version  # the same bytes, written anew


def test_a_file_that_changes_while_it_is_read_is_read_again(
    random_qwen: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(random_qwen, plain, most=1) as (engine, store):
        real: Callable[..., Any] = store._opener.open
        rewritten: list[Path] = []

        def slow(path: Path) -> Any:
            read = real(path)
            if not rewritten:
                rewritten.append(write_plain(path, seed=99))
            return read

        monkeypatch.setattr(store._opener, "open", slow)
        assert ask(engine, "a0") == said_by_peft(random_qwen, plain / "a0")
        assert store.loads == 1


@pytest.mark.slow
def test_a_store_with_many_more_adapters_than_fit_under_load(tmp_path: Path) -> None:
    found = benchmark_figures(tmp_path, "store", "--adapters", "60", "--clients", "20", "--seconds", "40")
    assert found["wrong"] == []
    assert found["loratune_adapters_in_memory"] == 8
    assert found["loratune_adapter_evictions_total"] > 8
