"""Data-free probing: moves a LoRA to a base whose weights have other coordinates."""

from .gate import Gate
from .recording.trajectories import Call
from .report import BlockReport, ProbeReport
from .run import ProbeTransfer, fit_lora
from .settings import FitSettings

__all__ = ["BlockReport", "Call", "FitSettings", "Gate", "ProbeReport", "ProbeTransfer", "fit_lora"]
