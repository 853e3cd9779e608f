"""Answers the rows of a file and scores the answers."""
