"""Pushing to the hubs: huggingface_hub and ModelScope's client against stand-ins of their servers on this machine."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import inspect
import json
import sys
import threading
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from loratune.delivery.export.hub import Destination, PushResult, parse_push, push_folder
from loratune.errors import Exit, LoratuneError

# huggingface_hub 2.4 hands files to httpx2 by an argument that this would rather have under another name.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

HF, MS = Destination("hf", "org/name"), Destination("ms", "org/name")
HAS_MODELSCOPE = importlib.util.find_spec("modelscope") is not None


class Hub:
    """A hub's repository in memory; `serve` answers the requests of its client."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.is_private: bool | None = None
        self.refusal: int | None = None
        self.url = ""

    def serve(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        raise NotImplementedError


class HuggingFace(Hub):
    """create_repo, model_info, preupload, LFS and commit, as huggingface_hub calls them."""

    lfs_suffix = ".safetensors"

    def serve(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        match method, path.partition("?")[0]:
            case "POST", "/api/repos/create":
                asked = json.loads(body)
                exists, address = self.is_private is not None, f"{self.url}/{asked['organization']}/{asked['name']}"
                if not exists:
                    self.is_private = asked["visibility"] == "private"
                return 409 if exists else 200, {"url": address}
            case "GET", "/api/models/org/name":
                siblings = [self.describe(name) for name in self.files] if "blobs" in path else []
                return 200, {"id": "org/name", "private": self.is_private, "siblings": siblings}
            case "POST", "/api/validate-yaml":
                return 200, {}
            case "POST", "/api/models/org/name/preupload/main":
                return 200, {"files": [self.mode(file["path"]) for file in json.loads(body)["files"]]}
            case "POST", "/org/name.git/info/lfs/objects/batch":
                objects = json.loads(body)["objects"]
                return 200, {"transfer": "basic", "objects": [self.upload_action(wanted) for wanted in objects]}
            case "PUT", blob if blob.startswith("/blobs/"):
                self.blobs[blob.removeprefix("/blobs/")] = body
                return 200, {}
            case "POST", "/api/models/org/name/commit/main":
                for line in body.splitlines():
                    self.commit(**json.loads(line))
                return 200, {"commitUrl": f"{self.url}/org/name/commit/0", "commitOid": "0" * 40}
        return 404, {}

    def mode(self, name: str) -> dict[str, Any]:
        return {
            "path": name, "uploadMode": "lfs" if name.endswith(self.lfs_suffix) else "regular", "shouldIgnore": False,
        }  # fmt: skip

    def upload_action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "actions": {"upload": {"href": f"{self.url}/blobs/{wanted['oid']}"}}}

    def commit(self, key: str, value: dict[str, Any]) -> None:
        if key == "file":
            self.files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            self.files[value["path"]] = self.blobs[value["oid"]]

    def describe(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        about = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
        if name.endswith(".safetensors"):
            about["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 130}
        return about


class ModelScope(Hub):
    """The same of ModelScope."""

    def serve(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        match method, path.partition("?")[0]:
            case "POST", "/api/v1/models":
                if self.is_private is not None:
                    return 400, {"Code": 10020101001, "Message": "model already exists", "Success": False}
                self.is_private = json.loads(body)["Visibility"] == 1
                return self.data({})
            case "GET", "/openapi/v1/models/org/name":
                return 200, {"success": True, "data": {"id": "org/name", "private": self.is_private}}
            case "POST", "/api/v1/repos/models/org/name/info/lfs/objects/batch":
                objects = [
                    {**wanted, "actions": {"upload": {"href": f"{self.url}/blobs/{wanted['oid']}"}}}
                    for wanted in json.loads(body)["objects"]
                ]
                return self.data({"objects": objects})
            case "PUT", blob if blob.startswith("/blobs/"):
                self.blobs[blob.removeprefix("/blobs/")] = body
                return self.data({})
            case "POST", "/api/v1/repos/models/org/name/commit/master":
                for action in json.loads(body)["actions"]:
                    is_lfs = action["type"] == "lfs"
                    content = self.blobs[action["sha256"]] if is_lfs else base64.b64decode(action["content"])
                    self.files[action["path"]] = content
                return self.data({})
            case "GET", "/api/v1/models/org/name/repo/files":
                return self.data({"Files": [self.describe(name) for name in self.files]})
        return 404, {"Code": 404, "Message": f"no {path}", "Success": False}

    def describe(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        return {"Path": name, "Size": len(content), "Type": "blob", "Sha256": hashlib.sha256(content).hexdigest()}

    def data(self, value: Any) -> tuple[int, Any]:
        return 200, {"Code": 200, "Success": True, "Data": value}


class FakeHubApi:
    """What loratune calls of modelscope.hub.api.HubApi, with its signatures."""

    hub: ModelScope

    def __init__(self, endpoint: Any = None, timeout: int = 60, max_retries: int = 2, token: str | None = None) -> None:
        pass

    def call(self, method: str, path: str, value: Any = None) -> Any:
        status, answer = self.hub.serve(method, path, json.dumps(value).encode())
        status = self.hub.refusal or status
        if status >= 400:
            error = RuntimeError(str(answer))
            error.status_code = status  # type: ignore[attr-defined]
            raise error
        return answer

    def create_repo(
        self,
        repo_id: str,
        *,
        token: Any = None,
        visibility: Any = None,
        repo_type: str = "model",
        chinese_name: Any = None,
        license: Any = None,
        exist_ok: bool = False,
        create_default_config: bool = False,
        endpoint: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.hub.is_private is None or not exist_ok:
            self.call("POST", "/api/v1/models", {"Visibility": {"private": 1, "public": 5}[visibility]})

    def get_model(self, model_id: str, revision: Any = None) -> dict[str, Any]:
        is_private = self.call("GET", f"/openapi/v1/models/{model_id}")["data"]["private"]
        return {"Visibility": 1 if is_private else 5}

    def upload_folder(self, repo_id: str, folder_path: Any = None, **kwargs: Any) -> None:
        actions = [
            {
                "path": path.relative_to(folder_path).as_posix(),
                "type": "normal",
                "content": base64.b64encode(path.read_bytes()).decode(),
            }
            for path in sorted(Path(folder_path).rglob("*"))
            if path.is_file()
        ]
        (folder_path / ".ms_upload_cache").write_text("{}")
        self.call("POST", f"/api/v1/repos/models/{repo_id}/commit/master", {"actions": actions})

    def list_repo_files(
        self, repo_id: str, repo_type: Any, *, revision: str | None = None, recursive: bool = True
    ) -> list[types.SimpleNamespace]:
        listed = self.call("GET", f"/api/v1/models/{repo_id}/repo/files")["Data"]["Files"]
        return [types.SimpleNamespace(**{key.lower(): value for key, value in file.items()}) for file in listed]


@pytest.fixture
def start() -> Iterator[Callable[[Hub], Hub]]:
    """Put a stand-in on a port of this machine."""
    servers = []

    def run(hub: Hub) -> Hub:
        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.read_body()
                hub.tokens.add(self.headers.get("Authorization", ""))
                status, value = (hub.refusal, {}) if hub.refusal else hub.serve(self.command, self.path, body)
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def read_body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                pieces = []
                while size := int(self.rfile.readline(), 16):
                    pieces.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(pieces)

            do_GET = do_POST = do_PUT = answer  # noqa: N815

            def log_message(self, format: str, *values: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        hub.url = f"http://127.0.0.1:{server.server_port}"
        return hub

    yield run
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hugging_face(start: Callable[[Hub], Hub], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in that huggingface_hub takes for its hub, which it else asks nothing in a test."""
    from huggingface_hub import close_session, constants

    hub = start(HuggingFace())
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    close_session()
    yield hub
    close_session()


@pytest.fixture
def modelscope(start: Callable[[Hub], Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """The same for ModelScope; without its client, a fake one speaks with the stand-in."""
    if HAS_MODELSCOPE:
        from modelscope_hub import config

        hub = start(ModelScope())
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-test")
        monkeypatch.setattr(
            config, "_default_config", config.HubConfig(endpoint=hub.url, token="ms-test", config_dir=tmp_path / "ms")
        )
        return hub
    hub = ModelScope()
    api = types.ModuleType("modelscope.hub.api")
    api.HubApi = type("HubApi", (FakeHubApi,), {"hub": hub})  # type: ignore[attr-defined]
    for name in ("modelscope", "modelscope.hub"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", api)
    return hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported adapter, and beside it what no hub should get."""
    folder = tmp_path / "exported adapter"
    (folder / "more").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# 中文\n", encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "more" / "vocab.json").write_text('{"a": 1}')
    (folder / "empty.txt").write_bytes(b"")
    for name in (".env", "adapter.tmp", "optimizer.pt", "rng_state_0.pth", "trainer_state.json", "training_args.bin"):
        (folder / name).write_text("secret")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("secret")
    return folder


PUSHED = ("README.md", "adapter_model.safetensors", "empty.txt", "more/vocab.json")


def push(folder: Path, destination: Destination, private: bool = True, dry_run: bool = False) -> PushResult:
    return push_folder(folder, destination, private, dry_run)


@pytest.mark.parametrize(
    ("text", "destination"),
    [
        ("hf:org/name", HF),
        ("ms:org/name", MS),
        ("hf:My-Org_1/Qwen2.5-7B.faq_v1", Destination("hf", "My-Org_1/Qwen2.5-7B.faq_v1")),
    ],
)
def test_destinations_are_read(text: str, destination: Destination) -> None:
    assert parse_push(text) == destination
    assert str(destination) == text


@pytest.mark.parametrize(
    "text",
    [
        "org/name", "hf:", "hf:name", "hf:org/", "hf:/name", "hf:org/name/more", "gh:org/name", "HF:org/name",
        "hf:org/-name", "hf:org/name.", "hf:org/na--me", "hf:org/na..me", "hf:org/name.git", "hf:../name", "hf:org/名",
        "hf:org/na me", "hf:org/name\n", f"hf:org/{'n' * 93}",
    ],
)  # fmt: skip
def test_other_destinations_are_refused(text: str) -> None:
    with pytest.raises(LoratuneError, match=r"expected hf:org/name .*or ms:org/name") as raised:
        parse_push(text)
    assert raised.value.exit_code == Exit.USAGE


@pytest.mark.parametrize("destination", [HF, MS])
def test_a_dry_run_tells_the_files_without_token_or_network(
    folder: Path, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.socket", None)
    result = push(folder, destination, dry_run=True)
    assert result == PushResult(destination, {name: (folder / name).stat().st_size for name in PUSHED}, dry_run=True)


@pytest.mark.parametrize(("hub", "destination"), [("hugging_face", HF), ("modelscope", MS)])
@pytest.mark.parametrize("private", [True, False])
def test_the_hub_gets_the_folder_s_bytes_and_nothing_else(
    folder: Path, hub: str, destination: Destination, private: bool, request: pytest.FixtureRequest
) -> None:
    before = sorted(folder.rglob("*"))
    remote = request.getfixturevalue(hub)
    result = push(folder, destination, private)

    assert remote.files == {name: (folder / name).read_bytes() for name in PUSHED}
    assert remote.is_private is private
    assert result.files == {name: len(content) for name, content in remote.files.items()}
    assert sorted(folder.rglob("*")) == before


def test_the_newer_way_of_uploading_gets_the_same_files(
    folder: Path, hugging_face: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With hf_xet, huggingface_hub commits in batches; its storage has no stand-in, so all files are small here."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(HuggingFace, "lfs_suffix", ".none")
    push(folder, HF)
    assert hugging_face.files == {name: (folder / name).read_bytes() for name in PUSHED}


def test_the_token_is_sent(folder: Path, hugging_face: Hub) -> None:
    push(folder, HF)
    assert "Bearer hf_test" in hugging_face.tokens


@pytest.mark.parametrize(("hub", "destination"), [("hugging_face", HF), ("modelscope", MS)])
def test_a_push_may_be_repeated_with_changed_files(
    folder: Path, hub: str, destination: Destination, request: pytest.FixtureRequest
) -> None:
    remote = request.getfixturevalue(hub)
    push(folder, destination)
    (folder / "README.md").write_text("# New\n")
    push(folder, destination)
    assert remote.files["README.md"] == b"# New\n"


@pytest.mark.parametrize(("hub", "destination"), [("hugging_face", HF), ("modelscope", MS)])
def test_what_is_to_be_private_is_not_pushed_to_a_public_repository(
    folder: Path, hub: str, destination: Destination, request: pytest.FixtureRequest
) -> None:
    remote = request.getfixturevalue(hub)
    remote.is_private = False
    with pytest.raises(LoratuneError, match="is there already and is public"):
        push(folder, destination)
    assert not remote.files


@pytest.mark.parametrize(("hub", "destination"), [("hugging_face", HF), ("modelscope", MS)])
@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, r"does not accept the token.*(hf auth login|modelscope login)"),
        (403, r"\(403\).*write access to org"),
        (418, r"\(418\)"),
    ],
)
def test_a_refusal_is_one_message(
    folder: Path, hub: str, destination: Destination, status: int, advice: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(hub).refusal = status
    with pytest.raises(LoratuneError, match=advice) as raised:
        push(folder, destination)
    assert raised.value.exit_code == Exit.IO
    assert str(raised.value).startswith(f"{destination}: not pushed")


@pytest.mark.parametrize(("hub", "destination"), [("hugging_face", HF), ("modelscope", MS)])
@pytest.mark.parametrize(
    ("loss", "problem"),
    [
        (lambda files: files.pop("more/vocab.json"), r"more/vocab\.json is missing"),
        (lambda files: files.update({"README.md": b"# cut"}), r"README\.md has 5 bytes instead of 36"),
    ],
)
def test_files_that_have_not_arrived_whole_are_named(
    folder: Path,
    hub: str,
    destination: Destination,
    loss: Callable[[dict[str, bytes]], Any],
    problem: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remote = request.getfixturevalue(hub)
    serve = remote.serve

    def lossy(method: str, path: str, body: bytes) -> tuple[int, Any]:
        answer: tuple[int, Any] = serve(method, path, body)
        if "/commit/" in path:
            loss(remote.files)
        return answer

    monkeypatch.setattr(remote, "serve", lossy)
    with pytest.raises(LoratuneError, match=problem) as raised:
        push(folder, destination)
    assert raised.value.exit_code == Exit.IO


def test_weights_of_the_right_size_but_other_contents_are_noticed(
    folder: Path, hugging_face: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hugging_face, "blobs", _Zeros())
    with pytest.raises(LoratuneError, match=r"adapter_model\.safetensors has other contents"):
        push(folder, HF)


def test_modelscope_s_hashes_are_compared_as_well(
    folder: Path, modelscope: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modelscope, "files", _Zeros())
    with pytest.raises(LoratuneError, match="has other contents") as raised:
        push(folder, MS)
    assert all(f"{name} has other contents" in str(raised.value) for name in PUSHED if name != "empty.txt")


class _Zeros(dict[str, bytes]):
    """Files of which only the lengths are kept."""

    def __setitem__(self, name: str, content: bytes) -> None:
        super().__setitem__(name, bytes(len(content)))


def test_without_a_token_nothing_is_asked(
    folder: Path, hugging_face: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(LoratuneError, match="no token for Hugging Face; log in with `hf auth login`") as raised:
        push(folder, HF)
    assert raised.value.exit_code == Exit.IO
    assert not hugging_face.tokens


def test_a_hub_that_cannot_be_reached_is_told(folder: Path, hugging_face: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LoratuneError, match=r"hf:org/name: not pushed: .*refused\ncheck the network") as raised:
        push(folder, HF)
    assert raised.value.exit_code == Exit.IO


def test_offline_mode_is_told(folder: Path, hugging_face: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LoratuneError, match="HF_HUB_OFFLINE"):
        push(folder, HF)


def test_without_modelscope_s_client_its_installation_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", None)
    with pytest.raises(
        LoratuneError, match=r'needs the package modelscope: pip install "loratune\[modelscope\]"'
    ) as raised:
        push(folder, MS)
    assert raised.value.exit_code == Exit.IO


@pytest.mark.skipif(not HAS_MODELSCOPE, reason="compares with ModelScope's own client")
def test_the_fake_client_has_the_signatures_of_the_real_one() -> None:
    import modelscope_hub
    from modelscope.hub.api import HubApi

    for name in ("__init__", "create_repo", "get_model", "upload_folder", "list_repo_files"):
        client = HubApi if hasattr(HubApi, name) else modelscope_hub.HubApi  # which it passes other names on to
        fake, real = (inspect.signature(getattr(api, name)).parameters for api in (FakeHubApi, client))
        assert [(p.name, p.kind) for p in fake.values()] == [(p.name, p.kind) for p in real.values()]


@pytest.mark.parametrize("content", [None, ".hidden", "half.tmp"])
def test_a_folder_with_nothing_to_push_is_an_error(tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "folder"
    if content:
        folder.mkdir()
        (folder / content).touch()
    with pytest.raises(LoratuneError) as raised:
        push(folder, HF, dry_run=True)
    assert raised.value.exit_code == Exit.USAGE
