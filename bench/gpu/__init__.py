"""The check of a machine with a GPU, in four calls: see bench/gpu.sh."""
