"""What the import knows of one tool: its names and defaults, and how it means them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, get_args

from loratune.migration.config_file import Config
from loratune.migration.sheet import SETTINGS, Context, Rule, Sheet, is_off, number, truth, whole
from loratune.nearest import MISSPELT, nearest
from loratune.recipe.not_offered import NOT_OFFERED
from loratune.recipe.suggestions import KNOWN_ELSEWHERE, WITHOUT_SETTING

Rules = Mapping[tuple[str, ...], Rule]
"""Names that are translated together → how; a name is in one group."""
SAME_NAMES = {
    setting.rpartition(".")[2]: setting
    for setting in (
        "model.revision",
        "lora.use_rslora",
        "lora.use_dora",
        "lora.rank_pattern",
        "lora.alpha_pattern",
        "training.learning_rate",
        "training.weight_decay",
        "training.max_grad_norm",
        "tracking.run_name",
        "seed",
    )
}
"""Names that loratune has in common with the tools → setting."""


@dataclass(frozen=True)
class Tool:
    """A training tool whose configs can be read."""

    name: str
    marks: frozenset[str]
    """Names that only this tool's configs have."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Its names → those that the rules know."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Name as the rules know it → value that it has there if a config does not give it."""
    rules: Rules = field(default_factory=dict)
    programs: frozenset[str] = frozenset()
    """Programs of shell commands that belong to it."""
    unfolded: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """Brings nested settings to one level."""
    is_dump: Callable[[Mapping[str, Any]], bool] = lambda values: False
    """Whether a file holds every setting that the tool has, with those that nobody has set."""

    @property
    def names(self) -> set[str]:
        """Every name that is translated, or known to need no translation."""
        ruled = {name for names in self.rules for name in names}
        ruled |= SAME_NAMES.keys()
        return ruled | self.aliases.keys() | KNOWN_ELSEWHERE.keys() | WITHOUT_SETTING.keys() | NOT_OFFERED.keys()

    def translate(self, config: Config, context: Context) -> Sheet:
        """Return the recipe that a config means, and the account of each of its settings.

        Args:
            config: the file as read.
            context: what the translation depends on beside it.
        """
        sheet = Sheet(self.name, context=context)
        given = self.unfolded(config.values)
        spelled, values = dict[str, str](), dict[str, Any]()
        for name, value in given.items():
            usual = self.aliases.get(name, name)
            if usual in values:
                with sheet.of({name: value}):
                    sheet.lose(f"it is given as {spelled[usual]} too; leave one of them out")
                continue
            spelled[usual], values[usual] = name, value
        for name in [name for name, value in values.items() if _is_of_a_shell(value, config)]:
            with sheet.of({spelled[name]: values.pop(name)}):
                sheet.lose("it holds a variable of the shell, whose value is not known here")
        known = sheet.known = dict(self.defaults) | values
        is_dump = self.is_dump(values)

        def account(names: Collection[str]) -> AbstractContextManager[None]:
            here = {name: values[name] for name in names if name in values}
            is_asked = not is_dump or any(self.defaults.get(name) != value for name, value in here.items())
            left_out = tuple(self._own_name(name) for name in names if name in self.defaults and name not in values)
            return sheet.of({spelled[name]: value for name, value in here.items()}, is_asked, left_out)

        for names, rule in self.rules.items():
            if here := {name: known[name] for name in names if name in known}:
                with account(names):
                    rule(sheet, here)
        ruled = {name for names in self.rules for name in names}
        for name in (name for name in known if name not in ruled):
            with account([name]):
                self._translate_by_table(sheet, name, known[name], is_dump)
        return sheet

    def _own_name(self, name: str) -> str:
        """Return what the tool calls a setting that the rules know under another name."""
        return next((own for own, usual in self.aliases.items() if usual == name), name)

    def _translate_by_table(self, sheet: Sheet, name: str, value: Any, is_dump: bool) -> None:
        """Translate a setting with the same meaning in all tools, or say why there is none."""
        setting = KNOWN_ELSEWHERE.get(name, SAME_NAMES.get(name, ""))
        if setting == "method":  # of another tool; what has been taken so far depends on the method
            sheet.lose(f"{self.name} has no such setting; give --method")
        elif setting in SETTINGS:
            sheet.take(setting, as_type_of(setting, value))
        elif name in KNOWN_ELSEWHERE:
            sheet.lose(f"in loratune this is {KNOWN_ELSEWHERE[name]}; set it by hand")
        elif name in WITHOUT_SETTING:
            sheet.skip(WITHOUT_SETTING[name])
        elif name in NOT_OFFERED:
            if not is_off(value):
                sheet.lose(NOT_OFFERED[name])
        elif is_dump:
            sheet.skip(f"a value of {self.name}'s dump that no table of loratune has")
        else:
            near = nearest(name, sorted(self.names), MISSPELT)
            sheet.lose(
                f"{self.name} has no such setting that loratune knows" + (f"; did you mean {near}?" if near else "")
            )


def as_type_of(setting: str, value: Any) -> Any:
    """Return a value with the type of a setting of the recipe.

    Raises:
        ValueError: it is of another kind.
    """
    if isinstance(value, dict | list):
        return value
    kinds = {SETTINGS[setting].annotation, *get_args(SETTINGS[setting].annotation)}
    for kind, read in ((bool, truth), (int, whole), (float, number)):
        if kind in kinds:
            return read(value)
    return str(value) if str in kinds else value


def _is_of_a_shell(value: Any, config: Config) -> bool:
    return bool(config.program) and any("$" in str(one) for one in (value if isinstance(value, list) else [value]))
