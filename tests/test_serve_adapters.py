"""`loratune serve --adapters`: names, vLLM's endpoints, refusals, and what a client may not reach."""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from processes import Program, comes_true
from serving import API_KEY, Served, served
from test_adapter_store import TEXT, TOKENS, opened, said_by_peft, write_plain

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Four adapters of one layout."""
    for number in range(4):
        write_plain(tmp_path / "store" / f"a{number}", number)
    return tmp_path / "store"


@pytest.fixture
def running(random_qwen: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server with two of the adapters in memory."""
    monkeypatch.setattr("loratune.runs.adapter_folders.SCAN_SECONDS", 0.0)
    with opened(random_qwen, store, most=2) as (engine, _), served(engine) as server:
        yield server


def said(server: Served, model: str) -> str:
    status, _, text = server.request("/v1/completions", {"model": model, "prompt": TEXT, "max_tokens": TOKENS})
    assert status == 200, text
    return str(json.loads(text)["choices"][0]["text"])


def models(server: Served) -> dict[str, dict[str, Any]]:
    return {model["id"]: model for model in json.loads(server.request("/v1/models")[2])["data"]}


def metric(server: Served, name: str) -> float:
    found = re.search(rf"^{name} (\S+)", server.request("/metrics")[2], re.MULTILINE)
    assert found, name
    return float(found[1])


def test_many_clients_get_the_answers_of_their_adapters(running: Served, random_qwen: Path, store: Path) -> None:
    names = [f"a{number}" for number in range(4)] * 5 + [random_qwen.name] * 3
    with ThreadPoolExecutor(12) as clients:
        found = list(clients.map(lambda name: said(running, name), names))
    expected = {name: said_by_peft(random_qwen, store / name) for name in names if name != random_qwen.name}
    expected[random_qwen.name] = said_by_peft(random_qwen, None)
    assert found == [expected[name] for name in names]
    assert metric(running, "loratune_adapters_in_memory") == 2
    loads, evictions = (metric(running, f"loratune_adapter_{what}_total") for what in ("loads", "evictions"))
    assert loads - evictions == 2
    assert loads >= 4


def test_models_are_listed_with_base_and_folder(running: Served, random_qwen: Path, store: Path) -> None:
    listed = models(running)
    assert list(listed) == [random_qwen.name, "a0", "a1", "a2", "a3"]
    assert (listed["a0"]["parent"], listed["a0"]["root"]) == (random_qwen.name, "a0")
    assert listed["a0"]["created"] == int((store / "a0" / "adapter_model.safetensors").stat().st_mtime)
    assert (listed[random_qwen.name]["parent"], listed[random_qwen.name]["root"]) == (None, random_qwen.name)
    assert json.loads(running.request("/v1/models/a3")[2]) == listed["a3"]
    shutil.rmtree(store / "a3")
    write_plain(store / "new", 9)
    assert list(models(running)) == [random_qwen.name, "a0", "a1", "a2", "new"]
    for error in (running.error("/v1/models/a3"), running.error("/v1/completions", {"model": "a3", "prompt": "x"})):
        assert (error["status"], error["code"]) == (404, "model_not_found")
    assert said(running, "new") == said_by_peft(random_qwen, store / "new")


def test_adapters_are_loaded_and_unloaded_as_in_vllm(running: Served, random_qwen: Path, store: Path) -> None:
    loading = {"lora_name": "mine", "lora_path": str(store / "a1")}
    status, _, text = running.request(LOAD, loading)
    assert (status, text) == (200, "Success: the adapter mine is loaded.")
    assert said(running, "mine") == said(running, "a1") == said_by_peft(random_qwen, store / "a1")
    assert models(running)["mine"]["root"] == "a1"
    again = running.error(LOAD, loading)
    assert (again["status"], again["code"]) == (400, "already_loaded")
    other = {"lora_name": "mine", "lora_path": "a2", "load_inplace": True}
    assert running.request(LOAD, other)[0] == 200
    assert said(running, "mine") == said_by_peft(random_qwen, store / "a2")
    assert running.request(UNLOAD, {"lora_name": "mine", "lora_int_id": None})[0] == 200
    assert "mine" not in models(running)
    for name in ("mine", random_qwen.name):
        assert running.error(UNLOAD, {"lora_name": name})["status"] == 404
    assert running.request(UNLOAD, {"lora_name": "a0"})[0] == 200
    assert running.error("/v1/completions", {"model": "a0", "prompt": TEXT})["status"] == 404
    assert running.request(LOAD, {"lora_name": "a0", "lora_path": "a0"})[0] == 200
    assert said(running, "a0") == said_by_peft(random_qwen, store / "a0")
    for name, path, code in (
        (random_qwen.name, "a1", "name_taken"),
        ("a3", "a1", "name_taken"),
        ("a\x1b", "a1", "invalid_value"),
    ):
        error = running.error(LOAD, {"lora_name": name, "lora_path": path})
        assert (error["status"], error["code"]) == (400, code)
    assert running.error(LOAD, {"lora_name": "x"})["param"] == "lora_path"


def test_a_client_s_path_is_never_opened(
    running: Served, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = write_plain(tmp_path / "outside", 1)
    looked_at: list[str] = []
    folders = running.engine.store.folders
    plain = folders._look_at
    monkeypatch.setattr(folders, "_look_at", lambda name: (looked_at.append(name), plain(name)))
    paths = [
        str(outside), "../outside", f"{store}/../outside", "a0/../../outside", "/etc", "/etc/passwd", ".", "..", "/",
        f"{store}/a0/adapter_config.json", str(store), "hf/repo", "https://example.org/a", "a\0", "~",
    ]  # fmt: skip
    messages = set()
    for path in paths:
        error = running.error(LOAD, {"lora_name": "x", "lora_path": path})
        assert (error["status"], error["code"]) == (404, "adapter_not_found"), path
        messages.add(error["message"].replace(path, "PATH"))
        assert running.error("/v1/completions", {"model": path, "prompt": "x"})["status"] == 404
    assert messages == {"no adapter is in the store at PATH"}  # whether there is anything does not show
    assert set(looked_at) == {"a0", "a1", "a2", "a3"}


def test_loading_needs_the_key_and_a_body_of_limited_size(running: Served) -> None:
    for path in (LOAD, UNLOAD):
        body = {"lora_name": "a0", "lora_path": "a0"}
        assert running.error(path, body, Authorization="")["status"] == 401
        with running.connect(path, b"", f"Content-Length: {5 * 2**20}") as opened_connection:
            assert opened_connection.recv(4096).startswith(b"HTTP/1.1 413")
    assert running.request("/v1/models", Authorization=f"Bearer {API_KEY}")[0] == 200


def test_a_wrong_adapter_is_refused_with_the_reason_alone(running: Served, random_qwen: Path, store: Path) -> None:
    write_plain(store / "wide", 1, base=40)
    for path, body in (
        ("/v1/completions", {"model": "wide", "prompt": TEXT}),
        ("/v1/chat/completions", {"model": "wide", "messages": [{"role": "user", "content": "Hi"}], "stream": True}),
        (LOAD, {"lora_name": "w", "lora_path": "wide"}),
    ):
        error = running.error(path, body)
        assert (error["status"], error["code"]) == (400, "adapter_refused")
        assert error["message"].startswith("wide: the adapter does not fit the base model")
        assert str(store) not in error["message"]
    assert said(running, "a0") == said_by_peft(random_qwen, store / "a0")
    running.wait_until(lambda: not running.queue.replies)


def test_without_a_store_there_is_nothing_to_load() -> None:
    from serving import FakeEngine

    with served(FakeEngine()) as server:
        assert server.error(LOAD, {"lora_name": "a", "lora_path": "a"})["status"] == 404


def test_the_command_serves_a_folder_of_runs(start: Callable[..., Program], short_run: Path, tmp_path: Path) -> None:
    shutil.copytree(short_run, tmp_path / "store" / "run")
    program = start("serve", "--adapters", tmp_path / "store", "--port", 0, "--adapters-in-memory", 3)
    assert comes_true(lambda: "}]}'" in program.stderr)
    assert """-d '{"model": "run",""" in program.stderr, "an adapter is asked, not the base"
    told = " ".join(program.stderr.split())
    assert f"and 1 adapter of {tmp_path / 'store'}, at most 3 in memory" in told
    found = re.search(r"page: (\S+)/#api_key=(\S+)", told)
    assert found, told
    asked = {"model": "run", "prompt": TEXT, "max_tokens": 2}
    headers = {"Authorization": f"Bearer {found[2]}", "Content-Type": "application/json"}
    call = urllib.request.Request(f"{found[1]}/v1/completions", json.dumps(asked).encode(), headers)
    with urllib.request.urlopen(call, timeout=60) as response:
        assert json.loads(response.read())["model"] == "run"


def test_a_folder_that_names_no_base_is_refused(cli: Callable[..., Any], store: Path, tmp_path: Path) -> None:
    result = cli("serve", "--adapters", store)
    assert result.exit_code == 2
    assert "no adapter in it names its base; give it with --base-model" in result.stderr
    assert cli("serve", "--adapters", tmp_path / "none").exit_code == 4
