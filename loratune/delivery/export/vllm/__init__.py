"""Checks whether vLLM can serve an adapter, and determines the flags."""
