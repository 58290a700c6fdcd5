"""What a file is, whether it fits, what is wrong with it; writes no LoRA."""
