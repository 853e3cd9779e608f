"""Measures on the model, before the first step, what a run relies on."""
