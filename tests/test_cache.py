"""Encoded rows between runs: what is found again, what never is, and what happens to damaged or old entries."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS, TINY_QWEN
from processes import Program
from typer.testing import Result

from loratune.data.assembly.dataset import as_dataset
from loratune.data.encoding import cache
from loratune.data.encoding.encoded import SCHEMA, Line
from loratune.data.encoding.encoder import Encoder
from loratune.data.encoding.loaded_source import Rendering
from loratune.data.preparation import prepare_data
from loratune.errors import Exit, LoratuneError
from loratune.recipe.data_sections import DataSettings, SourceSettings
from loratune.recipe.sections import PromptSettings


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_environment: None) -> Path:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from loratune.model.tokenizer import load_tokenizer

    return load_tokenizer(TINY_QWEN)


class Preparing:
    """Prepares rows and counts how often a tokenizer was needed, which is once for each file that is not cached."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.encoded = 0

    def __call__(self, train: Any, seed: int = 0, max_length: int = 256, sha256: str = "a", **settings: Any) -> Any:
        prompt = PromptSettings(**settings.pop("prompt", {}))

        def make_encoder() -> Encoder:
            self.encoded += 1
            return Encoder(self.tokenizer, prompt)

        train = train if isinstance(train, list) else [str(train)]
        data = DataSettings(train=train, **({"validation": 0.0} | settings))
        return prepare_data(data, Rendering(prompt, sha256, make_encoder, max_length), seed)

    def ids(self, *arguments: Any, **settings: Any) -> list[list[int]]:
        return list(as_dataset(self(*arguments, **settings).train)["input_ids"])


@pytest.fixture
def prepare(tokenizer: Any) -> Preparing:
    return Preparing(tokenizer)


def test_unchanged_rows_are_encoded_once(prepare: Preparing, rows_file: Path, tmp_path: Path) -> None:
    first = prepare.ids(rows_file)
    elsewhere = tmp_path / "moved.json"
    elsewhere.write_bytes(rows_file.read_bytes())
    assert prepare.ids(rows_file) == prepare.ids(elsewhere) == first
    assert prepare.encoded == 1


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 64},
        {"seed": 5},
        {"validation": 0.5},
        {"remove": ["duplicates"]},
        {"severity": {"short": "ignore"}},
        {"on_bad_row": "skip"},
        {"truncation_strategy": "refuse"},
    ],
    ids=str,
)
def test_what_does_not_change_the_ids_keeps_them(prepare: Preparing, rows_file: Path, change: dict[str, Any]) -> None:
    prepare(rows_file)
    prepare(rows_file, **change)
    assert prepare.encoded == 1


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "b"},
        {"prompt": {"system": "Be brief."}},
        {"prompt": {"template": "plain"}},
        {"prompt": {"enable_thinking": True}},
        {"prompt": {"instruction_prefix": "Q: "}},
        {"placeholders": {"name": "Li"}},
        {"columns": {"output": "input"}},
        {"encoding": "gb18030"},
        {"train_on_turns": "last"},
        {"train_thinking": False},
        {"truncation_strategy": "truncate_prompt"},
        {"truncation_strategy": "truncate_answer"},
    ],
    ids=str,
)
def test_a_changed_setting_never_meets_old_ids(prepare: Preparing, rows_file: Path, change: dict[str, Any]) -> None:
    prepare(rows_file)
    prepare(rows_file, **change)
    assert prepare.encoded == 2
    shortening = {"truncation_strategy": "truncate_prompt"}
    prepare(rows_file, **shortening, max_length=99)
    count = prepare.encoded
    prepare(rows_file, **shortening, max_length=98)
    assert prepare.encoded == count + 1


def test_a_changed_row_file_sample_or_system_prompt_is_encoded_anew(prepare: Preparing, rows_file: Path) -> None:
    prepare(rows_file)
    rows_file.write_text(json.dumps([*ROWS[:-1], {"instruction": "a", "output": "bcd"}]))
    assert prepare.ids(rows_file)[-1] != prepare.ids(rows_file)[-2]
    assert prepare.encoded == 2
    prepare(f"{rows_file}#5")
    prepare(f"{rows_file}#5")
    prepare(f"{rows_file}#6")
    prepare(f"{rows_file}#6", seed=1)
    assert prepare.encoded == 5
    prepare([SourceSettings(path=str(rows_file), system="s")])
    assert prepare.encoded == 6
    prepare([SourceSettings(path=f"{rows_file}#3x", weight=4.0)])
    assert prepare.encoded == 6


def test_other_code_or_libraries_make_other_entries(
    prepare: Preparing, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(rows_file)
    monkeypatch.setattr(cache, "_version_of", lambda name: "0.1")
    prepare(rows_file)
    monkeypatch.setattr(cache, "_hash_of_own_code", lambda: "changed")
    prepare(rows_file)
    assert prepare.encoded == 3


@pytest.mark.parametrize("name", ["rows.arrow", "info.json"])
@pytest.mark.parametrize("keep", [0, 0.5], ids=["empty", "half"])
def test_a_damaged_entry_is_made_again(
    prepare: Preparing, rows_file: Path, own_cache: Path, name: str, keep: float
) -> None:
    first = prepare.ids(rows_file)
    (file,) = own_cache.glob(f"*/{name}")
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[: int(len(content) * keep)])
    assert prepare.ids(rows_file) == first
    assert prepare.encoded == 2


def test_an_interrupted_encoding_leaves_nothing_behind(prepare: Preparing, tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS)[:-10])
    with pytest.raises(LoratuneError, match="not valid JSON"):
        prepare(tmp_path / "rows.json")
    assert [path for path in own_cache.iterdir() if path.is_dir()] == []


def test_entries_that_nobody_reads_make_room_for_new_ones(prepare: Preparing, rows_file: Path, own_cache: Path) -> None:
    prepare(rows_file)
    (old,) = [path for path in own_cache.iterdir() if path.is_dir()]
    long_ago = time.time() - (cache.UNUSED_DAYS + 1) * 86400
    os.utime(old, (long_ago, long_ago))
    prepare(rows_file)
    assert old.stat().st_mtime > long_ago
    os.utime(old, (long_ago, long_ago))
    prepare(rows_file, train_on_turns="last")
    assert not old.exists()
    assert len(list(own_cache.glob("*/rows.arrow"))) == 1


def test_a_cache_that_cannot_be_written_is_told(
    prepare: Preparing, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(LoratuneError, match="set LORATUNE_CACHE") as caught:
        prepare(rows_file)
    assert caught.value.exit_code == Exit.IO


def test_two_processes_share_one_encoding(start: Callable[..., Program], rows_file: Path, own_cache: Path) -> None:
    check = ("data", "check", "--model.base", "tiny-qwen", "--data.train", rows_file, "--json")
    both = [start(*check) for _ in range(2)]
    assert [program.exit_code() for program in both] == [0, 0]
    assert both[0].stdout == both[1].stdout != ""
    assert len(list(own_cache.glob("*/rows.arrow"))) == 1


def test_a_second_check_loads_no_tokenizer(cli: Callable[..., Result], rows_file: Path, own_cache: Path) -> None:
    arguments = ["data", "check", "--model.base", "tiny-qwen", "--data.train", str(rows_file)]
    assert cli(*arguments).exit_code == 0
    code = (
        f"import sys; from loratune.cli.app import app; app({arguments!r}, standalone_mode=False)\n"
        "print([name for name in ('pyarrow', 'torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['pyarrow']"


def imported_by(module: str, root: Path) -> set[str]:
    """Own modules that one imports, and that those import, at any level of their code."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = root / f"{name.replace('.', '/')}.py"
        if name in found or not path.is_file():
            continue
        found.add(name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("loratune"):
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def test_the_key_hashes_the_code_that_makes_ids_and_none_that_only_reports() -> None:
    root = Path(cache.__file__).resolve().parents[3]
    hashed = {str(path.relative_to(root))[:-3].replace("/", ".") for path in cache.id_code()}
    needed = {name for name in imported_by("loratune.data.encoding.row_encoder", root) if ".data." in name}
    assert len(needed) > 20
    assert needed <= hashed
    assert "loratune.model.tokenizer" in hashed
    reporting = ("loratune.data.checks.findings", "loratune.data.preparation", "loratune.data.assembly.packing")
    assert not hashed & set(reporting)


def test_a_kept_line_has_a_value_for_each_column_by_its_name() -> None:
    assert Line._fields == tuple(SCHEMA.names)
