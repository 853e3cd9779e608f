"""Merges adapters into their base or exports them for other programs, and verifies the results."""
