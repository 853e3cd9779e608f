"""Finds the tokenizer's chat template, probes its behaviour, and renders conversations with it."""
