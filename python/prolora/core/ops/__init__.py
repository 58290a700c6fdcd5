"""The native ops as torch operators, one file an op or a group of ops."""
