"""Examines a machine, each part in a process of its own, and says how to mend what is wrong."""
