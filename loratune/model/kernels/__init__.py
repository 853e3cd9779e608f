"""The fast path of training and decoding: fused products, packed attention, norms, the loss."""
