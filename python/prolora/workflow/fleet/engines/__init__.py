"""What runs a migration: this process, or a cluster."""
