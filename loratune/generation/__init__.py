"""Answers from a trained adapter or a plain model."""
