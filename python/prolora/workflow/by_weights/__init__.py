"""A LoRA moved by the weights of the two bases alone; no model runs."""
