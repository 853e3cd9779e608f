"""The LoRA adapter: its files and tensors, PEFT's reading of them, and attaching it to a base."""
