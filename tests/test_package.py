"""The wheel and the source distribution, and a program that is installed from the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from loratune import __version__
from loratune.recipe.loading import shipped_recipes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both distributions."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def wheel(built: Path) -> Path:
    return built / f"loratune-{__version__}-py3-none-any.whl"


def test_the_wheel_has_the_package_and_what_it_reads(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "loratune").rglob("*") if path.is_file()}
    assert {name for name in package if "__pycache__" not in name} <= names
    for shipped in ("configs", "data"):
        files = [path.relative_to(ROOT) for path in (ROOT / shipped).rglob("*") if path.is_file()]
        assert {f"loratune/assets/{path.as_posix()}" for path in files} <= names
    assert "loratune/assets/constraints.txt" in names
    assert f"loratune-{__version__}.dist-info/licenses/LICENSE" in names
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "docs/")) or "__pycache__" in name]


def test_the_source_distribution_can_be_tested(built: Path) -> None:
    with tarfile.open(built / f"loratune-{__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "README.md", "SECURITY.md", "CHANGELOG.md", "mkdocs.yml", "constraints.txt", "pyproject.toml"}
    assert (
        wanted | {"docs/first-steps.md", "docs/pictures/quickstart.png", "scripts/test", "tests/conftest.py"} <= names
    )


@pytest.mark.slow
def test_an_installed_wheel_works_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    installed, place = tmp_path / "installed", tmp_path / "empty"
    place.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", installed, wheel]
    subprocess.run(pip, check=True)
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    def run(*words: str, program: tuple[str, ...] = ("-m", "loratune")) -> str:
        done = subprocess.run(
            [sys.executable, *program, *words], cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(installed) in run(program=("-c", "import loratune; print(loratune.__file__)"))
    assert __version__ in run("--version")
    for path in shipped_recipes():
        assert "model:" in run("sft", "--config", path.stem, "--show")
    run("sft", "--config", "quickstart", "--training.max_steps", "2")
    assert run("infer", "--adapter", "out/quickstart", "--prompt", "Who are you?").strip()
    assert '"$schema"' in run("schema", "recipe")
    run("doctor")
