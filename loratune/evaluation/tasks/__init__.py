"""Benchmarks of lm-evaluation-harness, asked and answered as the run's adapter is."""
