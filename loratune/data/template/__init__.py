"""The tokenizer's chat template: which one, what it does, and conversations rendered with it."""
