"""Tensor keys and module paths of LoRA files <-> canonical module names."""
