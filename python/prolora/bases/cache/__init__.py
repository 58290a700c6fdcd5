"""Subspaces of base models kept on disk, with an index of contents."""
