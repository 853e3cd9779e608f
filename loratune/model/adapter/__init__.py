"""The LoRA adapter: its files and tensors, PEFT's view of them, and how it is attached to a base."""
