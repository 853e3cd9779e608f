"""The whole examination: all groups of findings, the exit code, and the same as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from typing_extensions import TypedDict

from loratune import __version__
from loratune.commands import CommandLine
from loratune.doctor.facts import Machine, RecipeFacts
from loratune.doctor.finding import Finding, Group, State
from loratune.doctor.judgement.gpu import judge_gpu
from loratune.doctor.judgement.hub import judge_hub
from loratune.doctor.judgement.packages import judge_attention, judge_packages
from loratune.doctor.judgement.recipe import judge_recipe
from loratune.doctor.judgement.several_gpus import judge_several_gpus
from loratune.doctor.judgement.storage import judge_storage
from loratune.doctor.judgement.versions import judge_versions
from loratune.errors import Exit

FORMAT_VERSION = 1


class FindingValues(TypedDict):
    """How one part of the machine is."""

    name: str
    state: State
    text: str
    remedies: list[CommandLine]
    """Commands that mend it, the most likely one first."""


class GroupValues(TypedDict):
    """Findings about one subject."""

    title: str
    findings: list[FindingValues]


class ExaminationValues(TypedDict):
    """What was found about a machine, and about a recipe's files."""

    format_version: int
    program: str
    exit_code: int
    """0 if nothing is broken."""
    groups: list[GroupValues]
    machine: Machine
    recipe: RecipeFacts | None


@dataclass(frozen=True)
class Examination:
    """What was found about a machine, and about a recipe's files if there is a recipe."""

    groups: tuple[Group, ...]
    machine: Machine
    recipe: RecipeFacts | None

    @property
    def findings(self) -> list[Finding]:
        return [finding for group in self.groups for finding in group.findings]

    @property
    def exit_code(self) -> Exit:
        """That of the first broken part; 0 if nothing is broken."""
        return next((finding.exit_code for finding in self.findings if finding.state == "broken"), Exit.OK)

    def summary(self) -> str:
        counts = Counter(finding.state for finding in self.findings)
        if not counts["broken"] and not counts["slower"]:
            return f"all {len(self.findings)} checks are fine"
        slower = f"{counts['slower']} slower than could be"
        return f"{counts['broken']} broken, {slower}, {counts['fine']} fine"

    def values(self) -> ExaminationValues:
        """Return the examination as JSON has it."""
        return {
            "format_version": FORMAT_VERSION,
            "program": f"loratune {__version__}",
            "exit_code": int(self.exit_code),
            "groups": [
                {"title": group.title, "findings": [_finding_values(finding) for finding in group.findings]}
                for group in self.groups
            ],
            "machine": self.machine,
            "recipe": self.recipe,
        }


def judge(machine: Machine, recipe: RecipeFacts | None) -> Examination:
    """Judge all facts.

    Args:
        machine: the facts about the machine.
        recipe: the facts about a recipe's files.
    """
    groups = {
        "GPU and CPU": judge_gpu(machine, recipe),
        "Packages with kernels": judge_packages(machine),
        f"Training {recipe.base if recipe else 'the practice model'}": judge_attention(machine, recipe),
        "Several GPUs": judge_several_gpus(machine),
        "Memory and disk": judge_storage(machine),
        "Hub": judge_hub(machine, recipe),
        "Versions": judge_versions(machine),
        **({f"Recipe {recipe.config}": judge_recipe(recipe, machine)} if recipe else {}),
    }
    found = (Group(title, tuple(findings)) for title, findings in groups.items())
    return Examination(tuple(group for group in found if group.findings), machine, recipe)


def _finding_values(finding: Finding) -> FindingValues:
    return {
        "name": finding.name,
        "state": finding.state,
        "text": finding.text,
        "remedies": [command.told for command in finding.remedies],
    }
