"""Writes job files for cluster schedulers: training that goes on where it was preempted."""
