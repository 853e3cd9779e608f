"""Verified LoRA fine-tuning of Qwen-family models from the command line."""

import time

__version__ = "0.2.0"
STARTED = time.perf_counter()
"""Start time of the program, for timing its start-up."""
