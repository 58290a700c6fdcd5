"""Two base models and no LoRA: how far apart they are, and which block is which."""
