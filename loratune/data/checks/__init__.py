"""Finds problems in the rows and decides whether each is an error or a warning."""
