"""Data-free probing: a LoRA for a base that shares no coordinates with the one it was made on."""

from .gate import Gate
from .probe import BlockReport, Options, ProbeReport, ProbeTransfer, transfer

__all__ = ["BlockReport", "Gate", "Options", "ProbeReport", "ProbeTransfer", "transfer"]
