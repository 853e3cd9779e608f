"""The machine, the base model, its tokenizer and the adapter on it."""
