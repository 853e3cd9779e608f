"""The header of a safetensors file, as written by the library, and damaged in every way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loratune.errors import Exit, LoratuneError
from loratune.model.files import check_safetensors
from loratune.model.weights.tensor_files import TensorFiles
from loratune.runs.fingerprint import sampled_fingerprint
from loratune.runs.tensor_hashes import TensorHashes
from loratune.safetensors_header import header_text, read_header


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "empty": torch.ones(0)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def test_names_shapes_and_places_are_those_of_the_library(path: Path) -> None:
    begin, header = read_header(path)
    with safe_open(path, framework="pt") as file:
        assert {name: entry["shape"] for name, entry in header.items()} == {
            name: file.get_slice(name).get_shape()
            for name in file.keys()  # noqa: SIM118
        }
        start, end = (begin + place for place in header["a"]["data_offsets"])
        assert path.read_bytes()[start:end] == file.get_tensor("a").numpy().tobytes()
    assert json.loads(header_text(path))["__metadata__"] == {"format": "pt"}


def with_header(change: Callable[[bytes], bytes], length: int | None = None) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        whole = path.read_bytes()
        size = int.from_bytes(whole[:8], "little")
        text = change(whole[8 : 8 + size])
        path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + whole[8 + size :])

    return spoil


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "a few bytes": lambda path: path.write_bytes(b"\1\0\0"),
    "cut in the header": lambda path: os.truncate(path, 40),
    "cut in the tensors": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer than it says": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a header of all memory": with_header(lambda text: text, 2**63 - 1),
    "no JSON": with_header(lambda text: b"{" + text),
    "a list": with_header(lambda text: b"[]" + b" " * (len(text) - 2)),
    "nested": with_header(lambda text: b"[" * 200_000),
    "an entry without a place": with_header(lambda text: text.replace(b"data_offsets", b"data_offsetz")),
    "a place before the file": with_header(lambda text: text.replace(b"[0,", b"[-1,")),
    "places as texts": with_header(lambda text: text.replace(b"[0,", b'["0",')),
}


@pytest.mark.parametrize("read", ["check", "map", "hash", "sample"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_message_whoever_reads_it(path: Path, damage: str, read: str) -> None:
    readers: dict[str, Callable[[], object]] = {
        "check": lambda: check_safetensors(path),
        "map": lambda: TensorFiles([path]),
        "hash": lambda: TensorHashes([path]).result(),
        "sample": lambda: sampled_fingerprint(path.parent, [path]),
    }
    readers[read]()
    DAMAGE[damage](path)
    with pytest.raises(LoratuneError, match=r"model\.safetensors") as caught:
        readers[read]()
    assert caught.value.exit_code == Exit.MODEL


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LoratuneError, match="not a regular file"):
        header_text(tmp_path / "pipe")
