"""Rows of any known format → conversations."""
