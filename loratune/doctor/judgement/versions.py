"""Judges the versions of packages by loratune's own ranges, and by the set that it is tested with."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.specifiers import SpecifierSet

from loratune.commands import Command
from loratune.doctor.facts import Machine, Version
from loratune.doctor.finding import Finding, broken, fine, installing
from loratune.doctor.judgement.packages import PACKAGES
from loratune.errors import counted


def judge_versions(machine: Machine) -> Iterator[Finding]:
    """Yield a finding for each package outside its range, and one for all others."""
    good = {}
    for name, version in machine.versions.items():
        if version.installed is None:
            if name not in PACKAGES:  # judged with what it is for
                yield broken(name, "not installed", _install(name, version))
        elif not SpecifierSet(version.wanted).contains(version.installed, prereleases=True):
            text = f"{version.installed}, where loratune needs {version.wanted}"
            yield broken(name, text, _install(name, version))
        else:
            good[name] = version
    other = [
        f"{name} {version.installed} ({version.tested})"
        for name, version in good.items()
        if version.tested and not _is_tested(version)
    ]
    text = f"{counted(len(good), 'package')} in the ranges that loratune supports"
    if other:
        text += f"; {len(other)} not in the tested version, which is in brackets: {', '.join(other)}"
    yield fine("packages", text)


def _is_tested(version: Version) -> bool:
    """Whether the versions are equal, without a build such as +cu130."""
    return str(version.installed).partition("+")[0] == version.tested


def _install(name: str, version: Version) -> Command:
    return installing("install another version", f"{name}{version.wanted}")
