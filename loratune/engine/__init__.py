"""Continuous batching: the scheduler, the KV cache, sampling, and the thread that runs the model."""
