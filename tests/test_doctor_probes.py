"""What `loratune doctor` measures, where it is as it should be and where it is not."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from huggingface_hub import constants
from pydantic import TypeAdapter
from torch.nn import functional
from typer.testing import Result

from loratune.doctor import child, isolated, measuring
from loratune.doctor.facts import BaseFacts, Failure, Gpu, HubFacts, Place, TorchFacts, Trial
from loratune.doctor.isolated import measured
from loratune.doctor.probes import packing, rows, trials
from loratune.doctor.probes.base import base_facts
from loratune.doctor.probes.hashes import modelscope_hashes
from loratune.doctor.probes.hub import hub_facts
from loratune.doctor.probes.places import place
from loratune.doctor.probes.rows import check_rows_of
from loratune.doctor.probes.template import check_template
from loratune.doctor.probes.trials import try_package
from loratune.errors import Exit, LoratuneError
from loratune.model import nvidia
from loratune.recipe.loading import load_recipe

Cli = Callable[..., Result]
NO_BASE = {"base": None, "revision": None}

# --- processes ---


@pytest.fixture
def instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put some code in the place of huggingface_hub, for processes that start from now on."""

    def put(code: str) -> None:
        folder = tmp_path / "instead" / "huggingface_hub"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder.parent), os.environ.get("PYTHONPATH", "")]))

    return put


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os; os.kill(os.getpid(), 11)", Failure("signal", "the process crashed with SIGSEGV")),
        ("import os; os.abort()", Failure("signal", "the process crashed with SIGABRT")),
        ("raise ImportError('undefined symbol: _ZN3c10')", Failure("error", "ImportError: undefined symbol: _ZN3c10")),
        ("import os, sys; print('no driver', file=sys.stderr, flush=True); os._exit(3)",
         Failure("error", "the process ended with 3: no driver")),
    ],
    ids=["segfault", "abort", "error", "exit"],
)  # fmt: skip
def test_a_package_that_crashes_is_a_failure_and_not_one_of_the_command(
    instead: Callable[[str], None], code: str, expected: Failure
) -> None:
    instead(code)
    assert measured(HubFacts, "hub", NO_BASE, 60) == expected


def test_a_package_that_hangs_is_killed_with_all_that_it_has_started(
    instead: Callable[[str], None], tmp_path: Path
) -> None:
    number = tmp_path / "number"
    instead(
        f"""import pathlib, subprocess, time
child = subprocess.Popen(["sleep", "1000"])
pathlib.Path({str(number)!r}).write_text(str(child.pid))
time.sleep(1000)"""
    )
    assert measured(HubFacts, "hub", NO_BASE, 6) == Failure("timeout", "no answer after 6 s")
    end = time.monotonic() + 30  # a process that was killed may still be on its way out
    while is_running(int(number.read_text())):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def test_what_a_package_prints_is_no_part_of_the_result(instead: Callable[[str], None], tmp_path: Path) -> None:
    instead("print('Welcome!', flush=True); import sys; sys.stdout.write('{')")
    (tmp_path / "instead" / "huggingface_hub" / "constants.py").write_text(f"HF_HUB_CACHE = {str(tmp_path)!r}")
    found = measured(Place, "place", {"kind": "model cache", "folder": ""}, 60)
    assert isinstance(found, Place)
    assert (found.path, found.reason) == (str(tmp_path), "")


def test_the_command_s_own_process_imports_nothing_that_may_crash() -> None:
    names = "'torch', 'transformers', 'bitsandbytes', 'huggingface_hub', 'safetensors', 'numpy', 'trl', 'datasets'"
    code = f"import sys, loratune.doctor.examination, loratune.doctor.measuring; print({{{names}}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_probe_has_a_time_limit_and_a_function() -> None:
    assert {*child.PROBES} == {*measuring.SECONDS}
    for name in child.PROBES:
        with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
            child.run(name, {"nothing": None})


@pytest.mark.parametrize("facts", [Trial(None, 0.02), Trial(0.5, 0.02), Failure("timeout", "no answer")])
def test_facts_are_the_same_behind_the_pipe(facts: Trial | Failure) -> None:
    written = TypeAdapter(dict[str, Any]).dump_json({"failure" if isinstance(facts, Failure) else "facts": facts})
    assert isolated._read(Trial, written) == facts


# --- packages ---


def _chunks_by_transformers(query: Any, key: Any, value: Any, g: Any, beta: Any, scale: float) -> Any:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    own: Any = inspect.unwrap(torch_chunk_gated_delta_rule)  # else it would call the package
    # It scales queries by the root of their size.
    return own(query * query.shape[-1] ** 0.5 * scale, key, value, g=g, beta=beta)


def _rms_norm(x: Any, weight: Any, eps: float, *_: Any) -> Any:
    return functional.rms_norm(x, weight.shape, weight, eps)


def _attention(query: Any, key: Any, value: Any, causal: bool) -> Any:
    heads = (part.transpose(1, 2) for part in (query, key, value))
    return functional.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2)  # type: ignore[misc]


def _convolution(x: Any, weight: Any, bias: None, activation: str) -> Any:
    assert activation == "silu"
    padded = functional.pad(x, (3, 0))
    return functional.silu(sum(padded[..., n : n + x.shape[-1]] * weight[:, n : n + 1] for n in range(4)))


STAND_INS: dict[str, tuple[str, str, Any]] = {
    "flash-attn": ("flash_attn", "flash_attn_func", _attention),
    "liger-kernel": ("liger_kernel.ops.rms_norm", "LigerRMSNormFunction", _rms_norm),
    "flash-linear-attention": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", _chunks_by_transformers),
    "causal-conv1d": ("causal_conv1d", "causal_conv1d_fn", _convolution),
}


def put_in_place(monkeypatch: pytest.MonkeyPatch, package: str, change: Callable[[Any], Any]) -> None:
    """Give a package for GPUs to a machine without one: its function computes by torch, with a change."""
    path, name, function = STAND_INS[package]
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:end]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    computed = lambda *given, **named: change(function(*given, **named))  # noqa: E731
    setattr(module, name, types.SimpleNamespace(apply=computed) if "liger" in path else computed)


@pytest.mark.parametrize("package", STAND_INS)
def test_a_trial_compares_a_package_with_torch(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    put_in_place(monkeypatch, package, lambda result: result)
    assert try_package(package) == trials.ONLY_IMPORTED  # without a GPU
    monkeypatch.setattr(trials, "_gpu", lambda *_: torch.device("cpu"))
    found = try_package(package)
    assert found.has_computed
    assert found.is_right


@pytest.mark.parametrize("package", STAND_INS)
@pytest.mark.parametrize("fault", ["a late token", "no number"])
def test_a_package_that_computes_something_else_is_wrong(
    monkeypatch: pytest.MonkeyPatch, package: str, fault: str
) -> None:
    def change(result: Any) -> Any:
        output, *rest = result if isinstance(result, tuple) else (result,)
        late = output.roll(1, dims=1) if package != "causal-conv1d" else output.roll(1, dims=2)
        output = late if fault == "a late token" else output * float("nan")
        return (output, *rest) if isinstance(result, tuple) else output

    put_in_place(monkeypatch, package, change)
    monkeypatch.setattr(trials, "_gpu", lambda *_: torch.device("cpu"))
    assert not try_package(package).is_right


def test_bitsandbytes_is_tried_with_codes_that_are_unpacked_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    bnb: Any = bitsandbytes
    assert try_package("bitsandbytes").is_right
    whole = bnb.matmul_4bit
    monkeypatch.setattr(bnb, "matmul_4bit", lambda x, *given, **named: whole(x.roll(1, 0), *given, **named))
    assert not try_package("bitsandbytes").is_right
    monkeypatch.setattr(bnb, "matmul_4bit", whole)
    quantised = bnb.functional.quantize_4bit

    def shifted(*given: Any, **named: Any) -> Any:
        codes, state = quantised(*given, **named)
        return codes.roll(1, 0), state

    monkeypatch.setattr(bnb.functional, "quantize_4bit", shifted)
    assert not try_package("bitsandbytes").is_right


# --- the base ---


@pytest.fixture
def base(random_qwen: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_qwen, tmp_path / "base"))


def facts(folder: Path) -> BaseFacts:
    return base_facts({"base": str(folder)})


def test_a_whole_base_has_no_problem(base: Path) -> None:
    found = facts(base)
    assert found.is_whole
    assert found.weight_bytes == (base / "model.safetensors").stat().st_size


def cut(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def gone(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.part").touch()


def pointer(base: Path) -> None:
    (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n")


def indexed(base: Path, *, more: tuple[str, ...] = (), fewer: int = 0) -> None:
    from loratune.safetensors_header import read_header

    names = [*read_header(base / "model.safetensors")[1]][fewer:]
    weights = dict.fromkeys([*names, *more], "model.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def no_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").unlink()
    (base / "vocab.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("plant", "text"),
    [
        (cut, "where its header declares"),
        (gone, "weights are missing"),
        (lambda base: indexed(base, more=("model.lost",)), "the index names tensors that no file has: model.lost"),
        (lambda base: indexed(base, fewer=1), "not in the index"),
        (no_tokenizer, "no tokenizer.json"),
    ],
)
def test_a_base_that_is_not_whole_is_found(base: Path, plant: Callable[[Path], None], text: str) -> None:
    assert (facts(base).is_whole, facts(base).lacks_files) == (True, False)
    plant(base)
    found = facts(base)
    assert not found.is_whole
    assert found.lacks_files == (plant in (gone, no_tokenizer))
    assert any(text in problem for problem in found.problems), found.problems


def test_all_problems_of_a_base_are_told_at_once(base: Path) -> None:
    cut(base)
    no_tokenizer(base)
    assert len(facts(base).problems) == 2


def test_a_pointer_and_an_unfinished_download_are_told_apart(base: Path) -> None:
    pointer(base)
    assert facts(base).pointers == ("model.safetensors",)
    gone(base)
    kept = base / ".cache" / "huggingface" / "download"
    kept.mkdir(parents=True)
    (kept / "x.incomplete").touch()
    assert {*facts(base).unfinished} == {"model.safetensors.part", ".cache/huggingface/download/x.incomplete"}


def test_bytes_are_compared_with_the_hash_that_the_hub_s_client_has_left(base: Path) -> None:
    path = base / "model.safetensors"
    notes = base / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    note = f"0123456789abcdef\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n1790000000.0\n"
    (notes / "model.safetensors.metadata").write_text(note)
    assert (facts(base).is_whole, facts(base).compared) == (True, 1)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (problem,) = facts(base).problems
    assert "not those of the hub" in problem


def test_a_hub_id_is_looked_for_in_the_cache(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert base_facts({"base": "org/name"}) == BaseFacts(None, (), (), (), 0, 0)
    kept, revision = cache / "models--org--name", "0" * 40
    snapshot, blobs = kept / "snapshots" / revision, kept / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc.incomplete").touch()
    assert base_facts({"base": "org/name"}).unfinished == ("abc.incomplete",)
    shutil.copytree(base, snapshot)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(revision)
    weights = snapshot / "model.safetensors"
    blob = blobs / hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.rename(blob)
    weights.symlink_to(blob)
    found = base_facts({"base": "org/name"})
    assert (found.folder, found.is_whole, found.compared) == (str(snapshot), True, 1)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    assert not base_facts({"base": "org/name"}).is_whole
    weights.unlink()
    assert base_facts({"base": "org/name"}).lacks_files


class _OlderClient:
    """The listing of `HubApi` in modelscope 1.30 to 1.37: entries as ModelScope sends them (modelscope/hub/api.py)."""

    files: dict[str, bytes]
    revisions: list[Any]

    def get_model_files(
        self, model_id: str, revision: str | None = "master", root: Any = None, recursive: bool = False
    ) -> list[dict[str, Any]]:
        assert (model_id, recursive) == ("org/name", True)
        self.revisions.append(revision)
        return [
            {"Name": name, "Path": name, "Type": "blob", "Size": len(content), "Sha256": _sha256(content)}
            for name, content in self.files.items()
        ]


class _NewerClient(_OlderClient):
    """The same from 1.38 on: `list_repo_files` is passed on to modelscope_hub/api.py, and only it tells hashes."""

    def get_model_files(self, *given: Any, **named: Any) -> list[dict[str, Any]]:
        return [{"Path": file["Path"], "Size": file["Size"]} for file in super().get_model_files(*given, **named)]

    def list_repo_files(
        self, repo_id: str, repo_type: str, *, revision: str | None = None, recursive: bool = True
    ) -> list[types.SimpleNamespace]:
        assert repo_type == "model"
        listed = _OlderClient.get_model_files(self, repo_id, revision, recursive=recursive)
        return [types.SimpleNamespace(path=one["Path"], size=one["Size"], sha256=one["Sha256"]) for one in listed]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


FROM_MODELSCOPE = {"base": "org/name", "hub": "modelscope"}


@pytest.fixture(params=[_OlderClient, _NewerClient])
def modelscope(base: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> _OlderClient:
    """ModelScope has the base, and its client a copy of it in its cache."""
    kept = base.parent / "models" / "org--name" / "snapshots" / "master"
    shutil.copytree(base, kept)
    client = types.ModuleType("modelscope")
    client.snapshot_download = lambda name, local_files_only, **_: str(kept)  # type: ignore[attr-defined]
    api = types.ModuleType("modelscope.hub.api")
    planted: type[_OlderClient] = request.param
    planted.files = {path.name: path.read_bytes() for path in base.iterdir()}
    planted.revisions = []
    api.HubApi = planted  # type: ignore[attr-defined]
    for module in (client, types.ModuleType("modelscope.hub"), api):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return planted()


def from_modelscope(**settings: str) -> BaseFacts:
    return base_facts(FROM_MODELSCOPE | settings, modelscope_hashes(FROM_MODELSCOPE | settings))


def test_bytes_of_a_base_from_modelscope_are_compared_with_the_hashes_that_it_tells(modelscope: _OlderClient) -> None:
    found = from_modelscope()
    assert (found.is_whole, found.compared) == (True, 1)
    weights = Path(found.folder or "") / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (problem,) = from_modelscope().problems
    assert f"its bytes are not those of the hub (sha256 {_sha256(content)[:12]}" in problem
    weights.write_bytes(content[:-100])
    found = from_modelscope()
    assert found.compared == 0
    assert "where its header declares" in found.problems[0]


def test_modelscope_is_asked_for_the_revision_that_is_on_this_machine(modelscope: _OlderClient) -> None:
    """A client that is asked for none takes the only one that it has."""
    from_modelscope(revision="v2")
    sys.modules["modelscope"].snapshot_download = lambda name, local_files_only, **_: "/kept/snapshots/v1"
    modelscope_hashes(FROM_MODELSCOPE)
    sys.modules["modelscope"].snapshot_download = lambda name, local_files_only, **_: "/kept/org/name"
    modelscope_hashes(FROM_MODELSCOPE | {"revision": "v2"})
    modelscope_hashes(FROM_MODELSCOPE)
    assert modelscope.revisions == ["master", "v1", "v2", "master"]

    def nothing(*_: Any, **__: Any) -> str:
        raise ValueError

    sys.modules["modelscope"].snapshot_download = nothing
    assert modelscope_hashes(FROM_MODELSCOPE) == {}
    assert len(modelscope.revisions) == 4


@pytest.mark.parametrize("answer", [{"model.safetensors": "ab"}, Failure("timeout", "no answer after 60 s")])
def test_a_base_is_examined_whether_or_not_modelscope_answers(
    monkeypatch: pytest.MonkeyPatch, rows_file: Path, answer: Any
) -> None:
    asked: dict[str, Any] = {}

    def answered(kind: Any, probe: str, arguments: Any, *_: Any) -> Any:
        asked[probe] = arguments
        return answer if probe == "hashes" else BaseFacts(None, (), (), (), 0, 0)

    monkeypatch.setattr(measuring, "measured", answered)
    recipe = load_recipe(None, {"model.base": "org/name", "data.train": [str(rows_file)]})
    measuring.measure_recipe(recipe, "r.yaml")
    assert ("hashes" in asked, asked["base"]["hashes"]) == (False, {})
    recipe = load_recipe(None, {"model.base": "org/name", "model.hub": "modelscope", "data.train": [str(rows_file)]})
    measuring.measure_recipe(recipe, "r.yaml")
    assert asked["base"]["hashes"] == (answer if isinstance(answer, dict) else {})


class _ModelScope(BaseHTTPRequestHandler):
    """Lists and serves the files of a repository as modelscope_hub/_legacy_api.py asks for them."""

    files: dict[str, bytes]

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        content = b"{}"
        if address.path == "/api/v1/models/org/name/repo/files":
            listed = [
                {"Path": name, "Type": "blob", "Size": len(content), "Sha256": _sha256(content)}
                for name, content in self.files.items()
            ]
            content = json.dumps({"Code": 200, "Success": True, "Data": {"Files": listed}}).encode()
        elif address.path == "/api/v1/models/org/name/repo":
            content = self.files[parse_qs(address.query)["FilePath"][0]]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer on a port of this machine, and yield the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.skipif(importlib.util.find_spec("modelscope") is None, reason="runs ModelScope's own client")
def test_modelscope_s_own_client_tells_the_hashes_and_fetches_what_differs_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ModelScope.files = {path.name: path.read_bytes() for path in base.iterdir()}
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fetch = f"from loratune.model.files import find_base, ModelSettings as S; find_base(S(**{FROM_MODELSCOPE}))"

    def examined() -> BaseFacts:
        hashes = measuring._modelscope_hashes(FROM_MODELSCOPE)
        found = measured(BaseFacts, "base", {"settings": FROM_MODELSCOPE, "hashes": hashes}, 120)
        assert isinstance(found, BaseFacts), found
        return found

    with serving(_ModelScope) as address:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", address)
        assert examined() == BaseFacts(None, (), (), (), 0, 0)
        subprocess.run([sys.executable, "-c", fetch], check=True)
        found = examined()
        assert (found.is_whole, found.compared) == (True, 1)
        weights = Path(found.folder or "") / "model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert "not those of the hub" in examined().problems[0]
        subprocess.run([sys.executable, "-c", fetch], check=True)
        assert examined().is_whole
    assert examined().compared == 0  # nobody can be asked


def test_a_template_that_renders_nothing_is_found(base: Path) -> None:
    settings = {"base": str(base)}
    assert check_template(settings, {})
    (base / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    with pytest.raises(LoratuneError):
        check_template(settings, {})


@pytest.mark.parametrize("is_packed", [True, False])
def test_packed_rows_are_run_through_the_model(base: Path, is_packed: bool) -> None:
    found = packing.packing_facts({"base": str(base), "dtype": "float32"}, is_packed)
    assert (found.is_packed, found.dtype, found.recurrent_layers) == (is_packed or None, "float32", 0)


def test_a_model_larger_than_memory_is_not_loaded(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "free_memory_bytes", lambda _: 1000)
    with pytest.raises(LoratuneError, match="out of memory: the base takes"):
        packing.packing_facts({"base": str(base)}, True)


def test_rows_are_opened(tmp_path: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_rows_of(f"{rows_file}#5", "utf-8")
    with pytest.raises(LoratuneError, match="no such file"):
        check_rows_of(str(tmp_path / "none.json"), "utf-8")

    def not_in_the_cache(name: str, _: str) -> None:
        raise LoratuneError(f"{name}: cannot be loaded", Exit.DATA)

    monkeypatch.setattr(rows, "open_rows", not_in_the_cache)
    assert not check_rows_of("hf:org/name:train", "utf-8")


# --- folders and the hub ---


def test_a_place_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    found = place("output", str(tmp_path / "not" / "yet"))
    assert (found.path, found.reason) == (str(tmp_path), "")
    assert found.free_bytes > 0
    assert not [*tmp_path.iterdir()]


def test_a_place_that_cannot_be_written_to_says_why(tmp_path: Path) -> None:
    assert place("output", "/proc/none").reason
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        found = place("output", str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "too large" in found.reason
    assert not [*tmp_path.iterdir()]


class _Answering(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self._answer(200, {})

    def do_GET(self) -> None:
        is_known = self.headers.get("authorization") == "Bearer good"
        if "whoami" in self.path:
            self._answer(200 if is_known else 401, {"name": "me"} if is_known else {"error": "Invalid credentials"})
        elif "auth-check" in self.path:
            self._answer(200 if "org/name" in self.path else 404, {})
        else:
            files = [("model.safetensors", 1000), ("config.json", 50), ("adapter_model.safetensors", 7), ("a.bin", 9)]
            siblings = [{"rfilename": name, "size": size} for name, size in files]
            self._answer(200, {"id": "org/name", "siblings": siblings})

    def _answer(self, code: int, values: Any) -> None:
        body = json.dumps(values).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    """A hub on this machine."""
    with serving(_Answering) as address:
        yield address


def asked(endpoint: str, token: str, base: str | None = None) -> HubFacts:
    """What another process finds of a hub, since huggingface_hub reads its variables when it is imported."""
    environment = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token, "NO_PROXY": "127.0.0.1"}
    found = measured(HubFacts, "hub", {"base": base, "revision": None}, 60, environment)
    assert isinstance(found, HubFacts), found
    return found


def test_a_hub_that_answers_takes_the_token_or_not(address: str) -> None:
    assert asked(address, "good", "org/name") == HubFacts(address, False, "", "accepted", 1050, "")
    other = asked(address, "bad", "org/other")
    assert (other.token, other.base_bytes) == ("refused", None)
    assert "404 Not Found" in other.base_reason
    assert "HTTPError" not in other.base_reason


def test_a_hub_that_does_not_answer_is_told() -> None:
    found = asked("http://127.0.0.1:9", "good")
    assert "refused" in found.reason
    assert found.token == "not tried"


def test_a_machine_without_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_facts(None, None).is_offline


# --- the exchange, and the whole command ---


def test_ways_to_exchange_are_left_out_one_by_one_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def exchanged(_: Any, __: str, ___: Any, ____: float, environment: dict[str, str] | None = None) -> Any:
        return Trial(0.0, 0.0) if environment == {"NCCL_P2P_DISABLE": "1"} else Failure("timeout", "no answer")

    monkeypatch.setattr(measuring, "measured", exchanged)
    assert {name: isinstance(found, Trial) for name, found in measuring._exchanges(2).items()} == {
        "": False, "NCCL_P2P_DISABLE=1": True, "NCCL_SHM_DISABLE=1": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC 12.2.0\n",
         "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs)\n", "580.95.05"),
        ("", None),
    ],
)  # fmt: skip
def test_the_driver_s_version_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, driver: str | None
) -> None:
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(nvidia, "DRIVER", tmp_path / "version")
    assert measuring._driver() == driver


def test_a_gpu_without_kernels_is_not_computed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would fail there would only repeat why."""
    asked = []
    old = Gpu("Tesla V100", (7, 0), 16 * 10**9, has_bfloat16=False)
    torch_facts = TorchFacts("2.13.0", "13.0", ("sm_75", "sm_90"), (old, old), "", (), True, 1, 1, 10**10)

    def answered(kind: Any, probe: str, *_: Any) -> Any:
        asked.append(probe)
        return torch_facts if probe == "torch_facts" else Failure("error", "not here")

    monkeypatch.setattr(measuring, "measured", answered)
    machine = measuring.measure_machine(None, None)
    assert {*asked} == {"torch_facts", "place", "hub"}
    assert not machine.can_compute
    asked.clear()
    torch_facts = dataclasses.replace(torch_facts, architectures=("sm_70",))
    measuring.measure_machine(None, None)
    assert {"trial", "packing", "exchange"} <= {*asked}


def test_torch_that_fails_is_asked_again_without_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answered(kind: Any, probe: str, _: Any, __: float, environment: dict[str, str] | None = None) -> Any:
        hidden = environment == {"CUDA_VISIBLE_DEVICES": "-1"}
        facts = TorchFacts("2.13.0", "13.0", (), (), "", (), True, 1, 1, 10**10)
        return facts if hidden else Failure("timeout", "no answer")

    monkeypatch.setattr(measuring, "measured", answered)
    monkeypatch.setattr(nvidia, "DEVICE", tmp_path / "nvidiactl")
    assert not measuring.measure_machine(None, None).works_without_gpu
    (tmp_path / "nvidiactl").touch()
    machine = measuring.measure_machine(None, None)
    assert machine.works_without_gpu
    assert isinstance(machine.torch, Failure)


@pytest.mark.slow
def test_processes_add_up_a_tensor() -> None:
    assert measured(Trial, "exchange", {"count": 2}, 300) == Trial(0.0, 0.0)


@pytest.mark.slow
def test_this_machine_is_in_order_and_a_crashing_package_is_its_only_fault(
    cli: Cli, base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{base: {base}}}\ndata: {{train: [{rows_file}]}}\noutput: {tmp_path / 'run'}\n")
    result = cli("doctor", "--config", recipe, "--json")
    values = json.loads(result.stdout)
    broken = {one["name"] for group in values["groups"] for one in group["findings"] if one["state"] == "broken"}
    assert (result.exit_code, broken) == (Exit.OK, set())
    package = tmp_path / "packages" / "flash_attn"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import os; os.kill(os.getpid(), 11)")
    description = package.parent / "flash_attn-2.9.dist-info"
    description.mkdir()
    (description / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.9\n")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]))
    from loratune.runs.versions import version_of

    version_of.cache_clear()
    result = cli("doctor", "--json")
    version_of.cache_clear()
    found = [one for group in json.loads(result.stdout)["groups"] for one in group["findings"]]
    (crashed,) = (one for one in found if one["name"] == "flash-attn")
    assert (result.exit_code, crashed["state"]) == (Exit.IO, "broken")
    assert "SIGSEGV" in crashed["text"]
    assert crashed["remedies"][0]["line"] == "pip uninstall flash-attn"
