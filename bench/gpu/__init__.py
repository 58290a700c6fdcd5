"""The check of a machine with a GPU, in five calls: see bench/gpu.sh."""
