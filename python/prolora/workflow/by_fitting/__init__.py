"""LoRAs fitted to the running models of whole pipelines."""
