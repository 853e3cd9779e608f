"""Hashes of a base's tensors: of every byte, remembered until a file changes in any way that its system tells of."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from loratune.errors import Exit, LoratuneError
from loratune.runs import remembered, tensor_hashes
from loratune.runs.tensor_hashes import TensorHashes, _digest
from loratune.safetensors_header import read_header

Read = Callable[[Path], dict[str, str]]


@pytest.fixture
def base(random_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of weights that nobody has changed for a while, and a cache that holds nothing."""
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "SETTLED_NS", 0)
    shutil.copyfile(random_qwen / "model.safetensors", tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[str]]:
    """Which tensors have to be read for a file's hashes."""
    plain = tensor_hashes._digest

    def of(path: Path) -> list[str]:
        read: list[str] = []

        def digest(path: Path, entry: dict[str, Any], start: int, buffer: memoryview) -> str:
            read.append(str(entry["shape"]))
            return plain(path, entry, start, buffer)

        with monkeypatch.context() as patch:
            patch.setattr(tensor_hashes, "_digest", digest)
            TensorHashes([path]).result()
        return read

    return of


def test_a_hash_is_that_of_type_shape_and_all_bytes(base: Path) -> None:
    found = TensorHashes([base]).result()
    weights = load_file(base)
    assert found.keys() == weights.keys()
    for name, values in weights.items():
        about = json.dumps(["F32", list(values.shape)]).encode()
        assert found[name] == hashlib.sha256(about + values.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("piece", [1, 7, 4096])
def test_no_byte_is_left_out_wherever_pieces_end(base: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    weights = load_file(base)
    small = {name: values for name, values in weights.items() if values.numel() < 100}
    save_file(small, base)
    monkeypatch.setattr(tensor_hashes, "PIECE_BYTES", piece)
    before = TensorHashes([base]).result()
    content = base.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    for place in range(length, len(content), 61):
        changed = bytearray(content)
        changed[place] ^= 1
        base.write_bytes(changed)
        found = TensorHashes([base]).result()
        assert sum(found[name] != before[name] for name in found) == 1


def test_it_is_computed_once(base: Path, read_bytes: Callable[[Path], list[str]]) -> None:
    first = TensorHashes([base]).result()
    assert read_bytes(base) == []
    assert TensorHashes([base]).result() == first


def test_a_link_is_followed(base: Path, tmp_path: Path, read_bytes: Callable[[Path], list[str]]) -> None:
    link = tmp_path / "snapshot.safetensors"
    link.symlink_to(base)
    TensorHashes([link]).result()
    assert read_bytes(base) == []
    other = shutil.copyfile(base, tmp_path / "other")
    change_a_byte(Path(other))
    link.unlink()
    link.symlink_to(other)
    assert read_bytes(link) != []


def change_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def touch(path: Path) -> None:
    os.utime(path)


def change_and_set_the_time_back(path: Path) -> None:
    about = path.stat()
    time.sleep(0.02)
    change_a_byte(path)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def replace(path: Path) -> None:
    shutil.copy2(path, path.with_name("new"))
    path.with_name("new").replace(path)


@pytest.mark.parametrize("change", [change_a_byte, touch, change_and_set_the_time_back, replace])
def test_a_changed_file_is_read_again(
    base: Path, read_bytes: Callable[[Path], list[str]], change: Callable[[Path], None]
) -> None:
    before = TensorHashes([base]).result()
    time.sleep(0.02)
    change(base)
    assert read_bytes(base) != []
    assert (TensorHashes([base]).result() != before) == (change in (change_a_byte, change_and_set_the_time_back))


def test_a_file_that_has_just_been_written_is_not_remembered(
    base: Path, read_bytes: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "SETTLED_NS", 2_000_000_000)
    touch(base)
    TensorHashes([base]).result()
    assert read_bytes(base) != []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"tensors": {}, "sha256": "0"}', '{"sha256": null}'])
def test_a_damaged_memory_is_no_memory(base: Path, read_bytes: Callable[[Path], list[str]], content: str) -> None:
    expected = TensorHashes([base]).result()
    (entry,) = (base.parent / "cache" / "bases").iterdir()
    entry.write_text(content)
    assert TensorHashes([base]).result() == expected
    assert read_bytes(base) == []


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_cache_that_cannot_be_written_costs_nothing_else(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    expected = TensorHashes([base]).result()
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / place))
    assert TensorHashes([base]).result() == expected
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_that_ends_too_soon_is_one_message(base: Path) -> None:
    base.write_bytes(base.read_bytes()[:-10])
    with pytest.raises(LoratuneError, match="bytes where its header declares") as raised:
        TensorHashes([base]).result()
    assert raised.value.exit_code == Exit.MODEL


def test_a_file_that_shrinks_while_it_is_read_is_noticed(base: Path) -> None:
    start, header = read_header(base)
    last = max(header.values(), key=lambda entry: int(entry["data_offsets"][1]))
    base.write_bytes(base.read_bytes()[:-10])
    with pytest.raises(OSError, match="ends before its tensors do"):
        _digest(base, last, start, memoryview(bytearray(1000)))
