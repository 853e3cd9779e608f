"""Uploads a folder to Hugging Face or ModelScope, and checks that it arrived."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.extras import required
from loratune.runs.folder import file_sha256

HUBS = {"hf": "Hugging Face", "ms": "ModelScope"}
SITES = {"hf": "https://huggingface.co", "ms": "https://www.modelscope.cn/models"}
LOGINS = {
    "hf": "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
    "ms": "log in with `modelscope login`, or set MODELSCOPE_API_TOKEN",
}
NAME = r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?"
REPOSITORY = re.compile(f"{NAME}/{NAME}")
LONGEST_ID = 96
# Files of a trainer: useless to others, pickled, and larger than the adapter.
NEVER_PUSHED = (
    "*.tmp", "optimizer*", "scheduler.*", "scaler.*", "rng_state*", "trainer_state.json", "training_args.bin",
)  # fmt: skip
MODELSCOPE_PUBLIC = 5  # the API's code for public visibility


@dataclass(frozen=True)
class Destination:
    """A repository on a hub."""

    hub: str
    """hf or ms."""
    repository: str
    """org/name."""

    @property
    def url(self) -> str:
        """Its URL for a browser."""
        return f"{SITES[self.hub]}/{self.repository}"

    def __str__(self) -> str:
        return f"{self.hub}:{self.repository}"


@dataclass(frozen=True)
class PushResult:
    """The files that were pushed, or would be."""

    destination: Destination
    files: dict[str, int]
    """Name in the repository → bytes."""
    dry_run: bool


class RemoteFile(NamedTuple):
    """A hub's information about a file."""

    size: int
    sha256: str | None


def parse_push(text: str) -> Destination:
    """Parse `hf:org/name` or `ms:org/name`.

    Raises:
        LoratuneError: the text has another form.
    """
    hub, _, repository = text.partition(":")
    is_valid = (
        hub in HUBS
        and REPOSITORY.fullmatch(repository)
        and len(repository) <= LONGEST_ID
        and not any(part in repository for part in ("--", ".."))
        and not repository.endswith(".git")
    )
    if not is_valid:
        raise LoratuneError(
            f"cannot push to {text!r}: expected hf:org/name (Hugging Face) or ms:org/name (ModelScope), with a name of "
            f"letters, digits, -, _ and ., at most {LONGEST_ID} characters",
            Exit.USAGE,
        )
    return Destination(hub, repository)


def push_folder(folder: Path, destination: Destination, private: bool, dry_run: bool) -> PushResult:
    """Upload a folder and compare it with the hub's list of files.

    Hidden files, temporary files and a trainer's state are excluded.

    Args:
        folder: the folder to upload.
        destination: the repository; created if it does not exist.
        private: create it private; an existing public repository is an error.
        dry_run: only return the files; needs neither token nor network.

    Raises:
        LoratuneError: the folder is empty, the client is not installed, the hub returned an error or is unreachable, or
            the files did not arrive completely.
    """
    paths = _files_to_push(folder)
    if not dry_run:
        upload = _upload_to_hugging_face if destination.hub == "hf" else _upload_to_modelscope
        with _linked(folder, paths) as staged, _explained(destination):
            arrived = upload(staged, destination, private)
        _check_arrived(folder, paths, destination, arrived)
    return PushResult(destination, {name: path.stat().st_size for name, path in paths.items()}, dry_run)


def _files_to_push(folder: Path) -> dict[str, Path]:
    """Return name in the repository → file."""
    if not folder.is_dir():
        raise LoratuneError(f"{folder}: no such folder to push", Exit.USAGE)
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    chosen = {
        name: path
        for name, path in paths.items()
        if not any(part.startswith(".") for part in Path(name).parts)
        and not any(fnmatch(path.name, pattern) for pattern in NEVER_PUSHED)
    }
    if not chosen:
        raise LoratuneError(f"{folder}: nothing in it to push", Exit.USAGE)
    return chosen


@contextmanager
def _linked(folder: Path, paths: dict[str, Path]) -> Iterator[Path]:
    """Yield a folder of links to the chosen files, which limits the upload and the location of a client's cache."""
    with tempfile.TemporaryDirectory(prefix="loratune-push-") as place:
        for name, path in paths.items():
            link = Path(place) / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.absolute())
        yield Path(place)


def _upload_to_hugging_face(folder: Path, destination: Destination, private: bool) -> dict[str, RemoteFile]:
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise LoratuneError(f"{destination}: no token for Hugging Face; {LOGINS['hf']}", Exit.IO)
    api = HfApi()
    api.create_repo(destination.repository, private=private, exist_ok=True)
    if private and not api.model_info(destination.repository).private:
        raise _is_public(destination)
    api.upload_folder(repo_id=destination.repository, folder_path=folder, commit_message="Upload with loratune")
    listed = api.model_info(destination.repository, files_metadata=True).siblings or []
    return {file.rfilename: RemoteFile(file.size, file.lfs.sha256 if file.lfs else None) for file in listed}


def _upload_to_modelscope(folder: Path, destination: Destination, private: bool) -> dict[str, RemoteFile]:
    with required(str(destination), "modelscope", Exit.IO):
        from modelscope.hub.api import HubApi
    api = HubApi()
    api.create_repo(destination.repository, visibility="private" if private else "public", exist_ok=True)
    if private and api.get_model(destination.repository).get("Visibility") == MODELSCOPE_PUBLIC:
        raise _is_public(destination)
    api.upload_folder(repo_id=destination.repository, folder_path=folder, commit_message="Upload with loratune")
    return modelscope_files(destination.repository)


def modelscope_files(repository: str, revision: str | None = None) -> dict[str, RemoteFile]:
    """Ask ModelScope which files a repository has.

    Args:
        repository: org/name.
        revision: branch, tag or commit; None for `master`, which the client downloads.

    Returns:
        Name in the repository → size and hash.
    """
    from modelscope.hub.api import HubApi

    api, revision = HubApi(), revision or "master"
    if hasattr(api, "list_repo_files"):  # modelscope 1.38 has it, and leaves the hashes out of get_model_files
        files = api.list_repo_files(repository, "model", revision=revision)
        return {file.path: RemoteFile(file.size, getattr(file, "sha256", None) or None) for file in files}
    listed = api.get_model_files(repository, revision=revision, recursive=True)
    return {file["Path"]: RemoteFile(file["Size"], file.get("Sha256") or None) for file in listed}


def _is_public(destination: Destination) -> LoratuneError:
    return LoratuneError(
        f"{destination} is there already and is public; make it private on {destination.url}, or push to another name",
        Exit.IO,
    )


@contextmanager
def _explained(destination: Destination) -> Iterator[None]:
    """Turn errors of a hub's client into one message."""
    try:
        yield
    except LoratuneError:
        raise
    except Exception as error:  # each hub client and HTTP library has its own exceptions
        raise LoratuneError(f"{destination}: not pushed{_explanation(error, destination)}", Exit.IO) from error


def _explanation(error: Exception, destination: Destination) -> str:
    chain = list(_with_causes(error))
    hub, status = HUBS[destination.hub], next((code for code in map(_http_status, chain) if code), None)
    reasons = dict.fromkeys(line for cause in chain for line in str(cause).strip().splitlines()[:1])
    reason = "; ".join(reasons) or type(error).__name__
    if status == 401 or (status is None and "login" in reason.lower()):
        return f", {hub} does not accept the token: {reason}; {LOGINS[destination.hub]}"
    if status == 403:
        org = destination.repository.partition("/")[0]
        return f", the token may not write there (403); give it write access to {org}, or use another name"
    if status is not None:
        return f", {hub} refuses ({status}): {reason}"
    return f": {reason}\ncheck the network, then push again"


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _http_status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status_code", None)
    return status if isinstance(status, int) else None


def _check_arrived(
    folder: Path, paths: dict[str, Path], destination: Destination, arrived: dict[str, RemoteFile]
) -> None:
    problems = []
    for name, path in paths.items():
        remote, size = arrived.get(name), path.stat().st_size
        if remote is None:
            problems.append(f"{name} is missing")
        elif remote.size != size:
            problems.append(f"{name} has {remote.size} bytes instead of {size}")
        elif remote.sha256 is not None and remote.sha256 != file_sha256(path):
            problems.append(f"{name} has other contents")
    if problems:
        raise LoratuneError(
            f"{destination} does not hold what was pushed from {folder}:\n{bullet_list(problems)}\npush it again",
            Exit.IO,
        )
