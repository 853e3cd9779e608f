"""Calls of tools: how a template writes them, and how they are read in an answer."""
