"""Names, shapes and spellings of model families, as data: no tensors, no user files."""
