"""Shortens imports: modules that few commands need run at their first use, and nothing is searched for garbage."""

from __future__ import annotations

import functools
import gc
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any

_bootstrap: Any = importlib.import_module("importlib._bootstrap")  # of Python's imports; its locks have no other name


class DeferredModule(ModuleType):
    """A module whose code has not run yet. It runs when an attribute is used that has no substitute.

    In contrast to those of `importlib.util.LazyLoader`, such a module can be decorated with and imported from.
    """

    def __getattr__(self, name: str) -> Any:
        loader = _loader(self)
        if loader and loader.thread is None and name in loader.substitutes:
            return loader.substitutes[name](self, name)
        if name != "__path__":  # Python asks whether it is a package
            _run(self)
        # What it has not defined yet is not there for its own code, nor for that of a module that it is importing.
        return ModuleType.__getattribute__(self, name)  # which is no `super` when the code has run


class _Deferring(Loader):
    """The loader of a module whose code is not to run yet."""

    def __init__(self, loader: Loader, substitutes: dict[str, Substitute], inner: Sequence[ModuleSpec]) -> None:
        self.loader, self.substitutes, self.inner = loader, substitutes, inner
        self.claim = threading.Lock()
        """Held by the thread that runs the code, and for good when it has run; none waits for it."""
        self.thread: int | None = None
        """The thread that runs the code."""
        self.calls: list[tuple[str, Any]] = []
        """Calls that the module gets when its code has run: name of the function, argument."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run nothing, but defer the modules inside too."""
        module.__class__ = DeferredModule
        for spec in self.inner:
            made = sys.modules[spec.name] = module_from_spec(spec)
            setattr(module, spec.name.rpartition(".")[2], made)
            if spec.loader:
                spec.loader.exec_module(made)

    def run(self, module: ModuleType) -> None:
        """Run the code of a module that this thread has claimed."""
        self.thread = threading.get_ident()
        try:
            with _bootstrap._ModuleLockManager(module.__name__):
                self.loader.exec_module(module)
                module.__class__ = ModuleType
                module.__loader__ = self.loader
                if module.__spec__:
                    module.__spec__.loader = self.loader
        except BaseException:
            self.thread = None
            self.claim.release()
            raise
        self.call(module)

    def call(self, module: ModuleType) -> None:
        """Make the calls that a module has got before its code has run."""
        while True:
            try:
                name, argument = self.calls.pop(0)
            except IndexError:  # two threads may make them
                return
            getattr(module, name)(argument)


def _loader(module: ModuleType | None) -> _Deferring | None:
    """Return the loader of a module whose code has not run to its end; None for others."""
    spec = module.__spec__ if type(module) is DeferredModule else None
    return spec.loader if spec and isinstance(spec.loader, _Deferring) else None


def _run(module: ModuleType, waits: bool = True) -> None:
    """Run the code of a module if it has not run yet, and before it that of the package that it is in.

    If another thread runs it, this one waits by Python's own lock of the module, as an import does. Python finds
    threads that would wait for each other; the module is then taken as far as it has run, as in any circular import.

    Args:
        module: any module.
        waits: whether to wait for another thread.
    """
    if outer := sys.modules.get(module.__name__.rpartition(".")[0]):
        _run(outer, waits)
    while (loader := _loader(module)) and loader.thread != threading.get_ident():
        if loader.claim.acquire(blocking=False):
            loader.run(module)
        elif not waits:
            return
        else:
            try:
                with _bootstrap._ModuleLockManager(module.__name__):
                    pass
            except _bootstrap._DeadlockError:
                return


# --- substitutes: what an attribute is before the code has run ---

Substitute = Callable[[ModuleType, str], Any]
"""Makes an attribute from the module and its name."""


def _called_later(module: ModuleType, name: str) -> Any:
    """Return a function that runs the module's code when it is called."""

    def call(*arguments: Any, **options: Any) -> Any:
        _run(module)
        return getattr(module, name)(*arguments, **options)

    return call


def _passed_on(module: ModuleType, name: str) -> Any:
    """Return a decorator that returns what it gets, and passes it on when the module's code has run."""

    def mark(decorated: Any) -> Any:
        loader = _loader(module)
        if loader is None:
            return getattr(module, name)(decorated)
        loader.calls.append((name, decorated))
        if _loader(module) is None:  # another thread has run it meanwhile
            loader.call(module)
        return decorated

    return mark


def _not_compiled(module: ModuleType, name: str) -> Any:
    """Return a substitute of `torch._dynamo.disable`: nothing is compiled before the compiler has run."""

    def disable(function: Any = None, recursive: bool = True, **options: Any) -> Any:
        if function is None:
            return functools.partial(disable, recursive=recursive, **options)
        if not inspect.isroutine(function):
            return _called_later(module, name)(function, recursive, **options)
        disabled: list[Any] = []

        @functools.wraps(function)
        def run(*arguments: Any, **given: Any) -> Any:
            if not disabled:
                if _loader(module):
                    return function(*arguments, **given)
                disabled.append(getattr(module, name)(function, recursive, **options))
            return disabled[0](*arguments, **given)

        return run

    return disable


DEFERRED: dict[str, dict[str, Substitute]] = {
    "bitsandbytes": {},
    "scipy.optimize": {"linear_sum_assignment": _called_later},
    "torch._dynamo": {
        "allow_in_graph": _passed_on,
        "assume_constant_result": _passed_on,
        "disallow_in_graph": _passed_on,
        "disable": _not_compiled,
    },
    "torch._dynamo._trace_wrapped_higher_order_op": {"TransformGetItemToIndex": _called_later},
}
"""Module → its attributes that transformers and PEFT use while they are imported, with their substitutes."""


def _answer_by_use(module: ModuleType) -> None:
    """Have PEFT take bitsandbytes as not available until something uses it: before, no layer can be quantised."""
    for name in ("is_bnb_available", "is_bnb_4bit_available"):
        if asked := getattr(module, name, None):
            setattr(module, name, functools.partial(_is_used_and, "bitsandbytes", asked))


def _is_used_and(package: str, asked: Callable[[], bool]) -> bool:
    return package in sys.modules and _loader(sys.modules[package]) is None and asked()


COMPLETED: dict[str, Callable[[ModuleType], None]] = {"peft.import_utils": _answer_by_use}
"""Module → what follows its code."""


class _Finder(MetaPathFinder):
    """Finds the modules of the tables; one that is not where Python finds modules by itself is left to others.

    It runs no code, because Python calls it with a lock that all imports take.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        outer = sys.modules.get(name.rpartition(".")[0])
        deferring = _loader(outer)
        is_inside = deferring is not None and deferring.thread != threading.get_ident()
        if name not in DEFERRED and name not in COMPLETED and not is_inside:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        if outer and is_inside:
            spec.loader = _AfterPackage(spec.loader, outer)
            return spec
        if name in COMPLETED:
            _follow(spec.loader, COMPLETED[name])
            return spec
        within = [inner for inner in DEFERRED if inner.rpartition(".")[0] == name]
        found = [self.find_spec(inner, spec.submodule_search_locations) for inner in within]
        spec.loader = _Deferring(spec.loader, DEFERRED[name], [inner for inner in found if inner])
        return spec


class _AfterPackage(Loader):
    """The loader of a module in a package whose code has not run yet, and runs before."""

    def __init__(self, loader: Loader, package: ModuleType) -> None:
        self.loader, self.package = loader, package
        self.imported: ModuleSpec | None = None
        """Of the module, if the package has imported it."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        # Another thread that runs the package may be waiting for this module.
        _run(self.package, waits=False)
        module = sys.modules.get(spec.name)
        self.imported = module.__spec__ if module else None
        return module or self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if self.imported:
            with suppress(AttributeError):  # torch's modules of settings refuse it, from Python too
                module.__spec__ = self.imported
            return
        if module.__spec__:
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)


def _follow(loader: Any, complete: Callable[[ModuleType], None]) -> None:
    """Have a loader, which is of one module only, call a function after the module's code."""
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        complete(module)

    loader.exec_module = exec_module


def defer_imports() -> None:
    """Have the modules of `DEFERRED` run at their first use in this process."""
    if not _is_deferring():
        sys.meta_path.insert(0, _Finder())


def _is_deferring() -> bool:
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


@contextmanager
def importing() -> Iterator[None]:
    """Import what a command needs, before it makes anything of its own.

    Libraries make a million objects that live as long as the process. Within the block none is searched for garbage,
    and afterwards never again, which would take as long as a third of the imports, once more at the end of the process.
    """
    if not _is_deferring() or not gc.isenabled():  # called as a library: what is alive is not the command's
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
