"""Verified LoRA fine-tuning of Qwen-family models from the command line."""

import time

__version__ = "0.1.0"
STARTED = time.perf_counter()
"""When this program began, for what it reports of its own start."""
