"""Parses rows of any known format into conversations."""
