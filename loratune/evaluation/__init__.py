"""Evaluates an adapter against its base or another run: on rows, on general text, and by the form of its answers."""
