"""Which libraries a command runs, and how those are put off that few commands need."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from loratune.imports import importing

LIBRARIES = [
    "accelerate", "bitsandbytes", "datasets", "fastapi", "lm_eval", "matplotlib", "mcp", "openai", "optuna", "pandas",
    "peft", "PIL", "pyarrow", "scipy.optimize", "sklearn", "torch", "torch._dynamo", "torch._inductor", "transformers",
    "transformers.trainer", "trl", "uvicorn",
]  # fmt: skip
OF_A_MODEL = {"accelerate", "peft", "PIL", "torch", "transformers"}
OF_TRAINING = OF_A_MODEL | {
    "datasets", "matplotlib", "pandas", "pyarrow", "torch._dynamo", "torch._inductor", "transformers.trainer", "trl",
}  # fmt: skip
MAIN = """\
import atexit, json, sys

def tell():
    from loratune.imports import DeferredModule
    ran = [name for name in {libraries} if name in sys.modules and type(sys.modules[name]) is not DeferredModule]
    print(json.dumps(ran), file=sys.stderr)

atexit.register(tell)
from loratune.cli.app import main
main()
"""


def libraries_run_by(*words: str | Path, cwd: Path) -> set[str]:
    """Run a command line; return those of `LIBRARIES` whose code it has run."""
    code = MAIN.format(libraries=LIBRARIES)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_commands_run_the_libraries_that_they_need(short_run: Path, tmp_path: Path) -> None:
    rows = short_run.parent / "rows.json"
    base = ("--model.base", "tiny-qwen", "--data.train", rows)
    assert libraries_run_by("runs", "list", short_run.parent, cwd=tmp_path) == set()
    assert libraries_run_by("data", "check", *base, cwd=tmp_path) <= {"pyarrow"}
    assert libraries_run_by("infer", "--adapter", short_run, "--prompt", "Hi", cwd=tmp_path) <= OF_A_MODEL
    assert libraries_run_by("sft", *base, "--training.max_steps", "1", cwd=tmp_path) <= OF_TRAINING


@pytest.mark.slow
def test_other_commands_run_the_libraries_that_they_need(short_run: Path, tmp_path: Path) -> None:
    merged = libraries_run_by("merge", "--adapter", short_run, "--output", "merged", cwd=tmp_path)
    assert merged <= OF_A_MODEL
    assert libraries_run_by("verify", "merged", cwd=tmp_path) <= OF_A_MODEL
    assert libraries_run_by("doctor", cwd=tmp_path) == set()


@pytest.mark.slow
def test_what_is_put_off_runs_where_it_is_needed(short_run: Path, tmp_path: Path) -> None:
    """bitsandbytes quantises, and the run is that of a process that puts nothing off."""
    flags = [
        "--data.train",
        short_run.parent / "rows.json",
        "--data.validation",
        "0",
        "--evaluation.questions_share",
        "0",
    ]
    words = ["sft", "--model.base", "tiny-qwen", "--model.quantization", "nf4", "--training.max_steps", "1", *flags]
    assert "bitsandbytes" in libraries_run_by(*words, "--output", "one", cwd=tmp_path)
    code = "import loratune.cli.app as app; app.defer_imports = lambda: None; app.main()"
    subprocess.run([sys.executable, "-c", code, *map(str, words), "--output", "other"], cwd=tmp_path, check=True)
    one, other = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other


CHECKS = """\
import sys
from loratune.imports import DeferredModule, defer_imports

defer_imports()
import bitsandbytes
import torch._dynamo
from torch._dynamo import allow_in_graph, disable

assert type(bitsandbytes) is type(torch._dynamo) is DeferredModule
marked = allow_in_graph(abs)
assert marked is abs
plain = disable(lambda number: number + 1)
assert plain(1) == 2 and type(torch._dynamo) is DeferredModule
assert torch._dynamo.config.verbose is False  # has no substitute: the code runs
assert type(torch._dynamo) is not DeferredModule
assert "torch._dynamo.trace_rules" in sys.modules
assert plain(1) == 2
assert torch.compile(lambda number: plain(number) * 2, backend="eager")(torch.ones(1)).item() == 4
assert bitsandbytes.functional.quantize_4bit and type(bitsandbytes) is not DeferredModule
try:
    bitsandbytes.nothing_of_this_name
except AttributeError as error:
    assert "nothing_of_this_name" in str(error)
else:
    raise SystemExit("an attribute that is not there was found")
"""


def test_a_module_that_is_put_off_behaves_as_one_that_is_not() -> None:
    done = subprocess.run([sys.executable, "-c", CHECKS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "line", ["import torch._dynamo.config", "from torch._subclasses import FakeTensorMode; FakeTensorMode()"]
)
def test_a_module_whose_package_imports_it_first_may_refuse_attributes(line: str) -> None:
    """torch's modules of settings do, and Python passes over it."""
    code = f"from loratune.imports import defer_imports; defer_imports(); import torch; {line}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_library_s_caller_keeps_its_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the command line, which puts imports off, may do without."""
    monkeypatch.setattr(gc, "freeze", lambda: pytest.fail("what the caller has made is not searched any more"))
    with importing():
        assert gc.isenabled()


MODULES = {
    "heavy/__init__.py": """\
import time
from __main__ import heavy_runs, other_imports, PAUSES

first = 1
heavy_runs.set()
other_imports.wait()
time.sleep(PAUSES[0])
import {imported}
last = 2
""",
    "heavy/part.py": "first = 1\n",
    "helper.py": """\
import time
from __main__ import other_imports, PAUSES

other_imports.set()
time.sleep(PAUSES[1])
import {used}
first = {used}.first
""",
    "other.py": "first = 1\n",
}
THREADS = """\
import sys, threading, time
from loratune import imports

imports.DEFERRED.update(heavy={{}}, other={{}})
imports.defer_imports()
import heavy, other

PAUSES = {pauses}
heavy_runs, other_imports, found = threading.Event(), threading.Event(), {{}}

class Asked:
    def find_spec(self, name, path=None, target=None):
        if name == "heavy.part" and threading.current_thread().name == "second":
            other_imports.set()
            time.sleep(PAUSES[1])

sys.meta_path.insert(0, Asked())

def first():
    found["first"] = heavy.last

def second():
    heavy_runs.wait()
    import {imported}
    found["second"] = {imported}.first

threads = [threading.Thread(target=one, name=one.__name__, daemon=True) for one in (first, second)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(30)
assert not any(thread.is_alive() for thread in threads), "they wait for each other"
assert found == {{"first": 2, "second": 1}}, found
assert type(heavy) is not imports.DeferredModule
"""


@pytest.mark.parametrize("pauses", [(0.1, 0), (0, 0.1)], ids=["its code waits last", "its code waits first"])
@pytest.mark.parametrize(
    ("imported", "used"),
    [("helper", "other"), ("helper", "heavy"), ("heavy.part", "other")],
    ids=["another that is put off", "the same", "a module in it"],
)
def test_threads_that_import_do_not_wait_for_each_other(
    tmp_path: Path, imported: str, used: str, pauses: tuple[float, float]
) -> None:
    """One runs a module that was put off; the other is importing what that needs, and needs one that was put off."""
    (tmp_path / "heavy").mkdir()
    for name, code in MODULES.items():
        (tmp_path / name).write_text(code.format(imported=imported, used=used))
    (tmp_path / "main.py").write_text(THREADS.format(imported=imported, pauses=pauses))
    done = subprocess.run([sys.executable, tmp_path / "main.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
