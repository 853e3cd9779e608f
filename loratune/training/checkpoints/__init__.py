"""Saves checkpoints, and resumes runs from them."""
