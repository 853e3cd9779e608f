"""Verified LoRA fine-tuning of Qwen-family models from the command line."""

__version__ = "0.1.0"
