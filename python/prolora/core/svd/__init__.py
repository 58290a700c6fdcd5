"""Leading singular subspaces: the ladder of algorithms behind `truncated_svd`."""
