"""The fast path of training and decoding: fused LoRA layers, packed attention, norms, loss."""
