"""Collections of LoRAs, many bases, many machines: plan, migrate, status."""
