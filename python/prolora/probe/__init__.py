"""Data-free probing: a LoRA for a base that shares no coordinates with the one it was made on."""

from .gate import Gate
from .run import BlockReport, Options, ProbeReport, ProbeTransfer, transfer
from .trajectories import Call

__all__ = ["BlockReport", "Call", "Gate", "Options", "ProbeReport", "ProbeTransfer", "transfer"]
