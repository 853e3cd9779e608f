"""Weights in their safetensors files: read in place, mapped, quantised."""
