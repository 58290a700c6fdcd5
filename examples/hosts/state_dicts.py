"""A recipe on state dicts in memory: a LoRA, moved and baked into a model of another base."""

import prolora


def bake_moved(lora, source, target, strength=1.0):
    """All three are {name: tensor}, of torch or numpy; the result is like `target`."""
    moved = prolora.transfer(lora, source, target)
    return prolora.bake(moved, target, strengths=[strength]).tensors
