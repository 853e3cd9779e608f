"""Weights in safetensors files: memory-mapped, streamed, quantised."""
