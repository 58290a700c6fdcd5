"""Kinds of update (LoRA, LoHa, LoKr, DoRA, OFT, …): their shapes and what they multiply to."""
