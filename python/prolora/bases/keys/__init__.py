"""What the keys of a checkpoint mean: the canonical name, rows and scale of every weight."""
