"""Data-free probing: a LoRA for a base that shares no coordinates with the one it was made on."""

from .gate import Gate
from .run import BlockReport, FitSettings, ProbeReport, ProbeTransfer, fit_lora
from .trajectories import Call

__all__ = ["BlockReport", "Call", "FitSettings", "Gate", "ProbeReport", "ProbeTransfer", "fit_lora"]
