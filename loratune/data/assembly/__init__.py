"""Rows of several sources → the sequences and batches of a training."""
