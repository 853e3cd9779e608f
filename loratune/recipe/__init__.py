"""Declares every setting once, loads recipes from YAML and flags, and advises on risky values."""
