"""Conversations → token ids and labels, kept as Arrow files."""
