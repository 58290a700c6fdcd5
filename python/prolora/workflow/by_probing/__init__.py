"""A LoRA fitted to the running models of the target (method "probe")."""
