"""LoRAs that were not moved: converted, extracted, merged, baked."""
