"""Losses of PixelLLM's training (section 12), as pure functions of tensors on any device.

Everything is computed in float32, whatever precision the model ran in. A loss over nothing is 0 with zero gradients.
"""
