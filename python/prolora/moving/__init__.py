"""LoRAs moved by the weights alone."""
