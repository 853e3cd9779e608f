"""Trains an adapter: from a recipe to a run folder."""
