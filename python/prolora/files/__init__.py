"""Bytes on disk, checked before they are used and written whole; nothing of LoRA."""
