"""Fault injection cases by name. Each case yields, for every run, None or a description of the failure."""

from fault_cases import damage, kills, processes, signals

CASES = {**kills.CASES, **signals.CASES, **damage.CASES, **processes.CASES}
