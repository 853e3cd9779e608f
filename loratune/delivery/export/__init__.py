"""Exports merged models and adapters for other programs."""
