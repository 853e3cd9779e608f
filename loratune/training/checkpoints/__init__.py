"""Checkpoints kept, and runs that go on from them."""
