"""The jobs: one public verb a file, paths in, results out. Knows LoRAs, base models and reports."""
