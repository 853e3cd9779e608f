"""Merged models and adapters in the forms of other programs."""
