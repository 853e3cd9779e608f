"""Converts conversations into token ids and labels, cached as Arrow files."""
