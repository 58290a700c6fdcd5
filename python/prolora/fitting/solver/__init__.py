"""How updates are fitted to the changes that the target should make."""
