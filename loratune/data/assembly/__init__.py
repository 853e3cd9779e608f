"""Combines the rows of several sources into the sequences and batches of a training run."""
