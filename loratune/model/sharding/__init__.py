"""Holds a base once over all processes of a run, each of which has some rows of every weight."""
