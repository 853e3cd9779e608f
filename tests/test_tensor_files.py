"""Our safetensors reader and writer against the library, transformers and each other."""

from __future__ import annotations

import json
import math
import mmap
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loratune.errors import Exit, LoratuneError
from loratune.model.files import check_base, weight_files
from loratune.model.weights.tensor_files import DTYPES, INDEX, TensorFiles, TensorInfo, plan_shards, write_shards

Tensors = dict[str, torch.Tensor]
SHAPES = [(), (0,), (1,), (7,), (3, 5), (0, 4), (4, 0), (2, 3, 5), (1, 1, 1, 9)]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bits that the type has, NaN and infinity among them."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    bits = torch.randint(0, high, (size,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).reshape(shape)


def as_bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert as_bits(found) == as_bits(expected)


def write(folder: Path, tensors: Tensors, shard_bytes: int = 1 << 30, rows: int = 2) -> dict[str, list[TensorInfo]]:
    """Write tensors some rows at a time."""

    def pieces(info: TensorInfo) -> Iterator[torch.Tensor]:
        tensor = tensors[info.name]
        whole = tensor if tensor.ndim else tensor.reshape(1)
        for start in range(0, len(whole), rows):
            yield whole[start : start + rows]

    infos = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    shards = plan_shards(infos, shard_bytes)
    write_shards(folder, shards, pieces)
    return shards


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_the_library_reads_what_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {f"t{place}": random_tensor(shape, dtype, place) for place, shape in enumerate(SHAPES)}
    write(tmp_path, tensors)
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # without which transformers refuses a file


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_what_the_library_writes_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {f"t{place}": random_tensor(shape, dtype, place) for place, shape in enumerate(SHAPES)}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    files = TensorFiles([tmp_path / "a.safetensors"])
    assert files.infos.keys() == tensors.keys()
    assert "t0" in files.infos
    assert "t99" not in files.infos
    for name, tensor in tensors.items():
        assert files.infos[name] == TensorInfo(name, dtype, tuple(tensor.shape))
        assert_same(files.tensor(name), tensor)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 6), max_size=3), st.sampled_from(list(DTYPES.values()))),
        min_size=1, max_size=8,
    ),
    st.integers(1, 400),
    st.integers(1, 7),
)  # fmt: skip
def test_any_tensors_survive_any_way_of_splitting_them(
    given_tensors: list[tuple[list[int], torch.dtype]], shard_bytes: int, rows: int
) -> None:
    tensors = {
        f"layer.{place}.weight": random_tensor(tuple(shape), dtype, place)
        for place, (shape, dtype) in enumerate(given_tensors)
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = write(folder, tensors, shard_bytes, rows)
        assert sorted(path.name for path in folder.iterdir() if path.name != INDEX) == sorted(shards)
        mine = TensorFiles([folder / shard for shard in shards])
        theirs = {key: value for shard in shards for key, value in load_file(folder / shard).items()}
        for key, tensor in tensors.items():
            assert_same(theirs[key], tensor)
            assert_same(mine.tensor(key), tensor)
        for shard, infos in shards.items():
            sizes = [tensors[info.name].nbytes for info in infos]
            assert sum(sizes) <= shard_bytes or len([size for size in sizes if size]) == 1
            assert set(load_file(folder / shard)) == {info.name for info in infos}
        if len(shards) == 1:
            assert list(shards) == ["model.safetensors"]
            assert not (folder / INDEX).exists()
        else:
            index = json.loads((folder / INDEX).read_text())
            assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
            assert index["weight_map"] == {i.name: shard for shard, infos in shards.items() for i in infos}


def test_transformers_loads_a_model_in_shards(random_qwen: Path, tmp_path: Path) -> None:
    tensors = load_file(random_qwen / "model.safetensors")
    limit = 20_000
    shards = write(tmp_path, tensors, limit, rows=100)
    (tmp_path / "config.json").write_text((random_qwen / "config.json").read_text())
    (tmp_path / "tokenizer.json").write_text((random_qwen / "tokenizer.json").read_text())
    assert len(shards) > 2
    for name in shards:
        found = load_file(tmp_path / name)
        assert len(found) == 1 or sum(tensor.nbytes for tensor in found.values()) <= limit
    check_base(tmp_path)
    assert [path.name for path in weight_files(tmp_path)] == sorted(shards)

    ids = torch.tensor([[5, 6, 7]])
    whole, split = (AutoModelForCausalLM.from_pretrained(folder) for folder in (random_qwen, tmp_path))
    torch.testing.assert_close(split(ids).logits, whole(ids).logits, rtol=0, atol=0)


def test_values_are_aligned_for_whoever_maps_the_file(tmp_path: Path) -> None:
    for length in range(1, 10):
        write(tmp_path, {"n" * length: random_tensor((3,), torch.float64)})
        header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
        assert header % 8 == 0


def test_tensors_that_old_files_do_not_align_are_read(tmp_path: Path) -> None:
    byte, numbers = random_tensor((1,), torch.uint8), torch.arange(5, dtype=torch.float32)
    header = json.dumps(
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
         "b": {"dtype": "F32", "shape": [5], "data_offsets": [1, 21]}}
    ).encode()  # fmt: skip
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + as_bits(byte) + as_bits(numbers))
    files = TensorFiles([path])
    assert_same(files.tensor("a"), byte)
    assert_same(files.tensor("b"), numbers)


def test_letting_pages_go_changes_no_value(tmp_path: Path) -> None:
    tensors = {f"t{place}": random_tensor((1000 + place,), torch.float32, place) for place in range(8)}
    save_file(tensors, tmp_path / "a.safetensors")
    files = TensorFiles([tmp_path / "a.safetensors"])
    views = {name: files.tensor(name) for name in tensors}
    for name in tensors:
        files.release([name])
        for other, tensor in tensors.items():
            assert_same(views[other], tensor)
            assert_same(files.tensor(other), tensor)


def test_an_empty_tensor_at_the_end_of_a_page_can_be_let_go(tmp_path: Path) -> None:
    entries = {"big": {"dtype": "U8", "shape": [mmap.PAGESIZE], "data_offsets": [0, mmap.PAGESIZE]},
               "none": {"dtype": "F32", "shape": [0], "data_offsets": [mmap.PAGESIZE, mmap.PAGESIZE]}}  # fmt: skip
    header = json.dumps(entries).encode().ljust(mmap.PAGESIZE - 8)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(mmap.PAGESIZE))
    files = TensorFiles([tmp_path / "a.safetensors"])
    files.release(["none", "big"])
    assert files.tensor("none").shape == (0,)


def test_a_tensor_of_another_length_than_planned_is_a_bug(tmp_path: Path) -> None:
    infos = [TensorInfo("a", torch.float32, (4,))]
    with pytest.raises(RuntimeError, match="a: wrote 12 of 16 bytes"):
        write_shards(tmp_path, plan_shards(infos, 100), lambda info: iter([torch.zeros(3)]))


def test_a_type_that_no_language_model_has_is_named(tmp_path: Path) -> None:
    save_file({"wave": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "a.safetensors")
    with pytest.raises(LoratuneError, match="wave has the unsupported dtype C64") as raised:
        TensorFiles([tmp_path / "a.safetensors"])
    assert raised.value.exit_code == Exit.MODEL
