"""Mathematics on stacks of matrices. Knows torch and the native ops, nothing of LoRA files."""
