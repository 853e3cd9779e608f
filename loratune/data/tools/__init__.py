"""Determines how a template writes tool calls, and parses them in answers."""
