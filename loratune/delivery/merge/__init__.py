"""Merges an adapter into its base and writes a model folder."""
