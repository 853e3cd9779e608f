"""The checks of `scripts/gpu_check`, one module for each idea; table.py lists them."""
