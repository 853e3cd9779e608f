"""What can happen to a run, by name; each case yields, for every run, None or what was wrong with it."""

from fault_cases import damage, kills, signals

CASES = {**kills.CASES, **signals.CASES, **damage.CASES}
