"""Tensors to and from files: no model, no jit."""
