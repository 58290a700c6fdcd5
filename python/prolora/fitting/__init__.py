"""Fits of LoRAs to running models."""

from .gate import Gate
from .probe_report import ProbeReport
from .probes import Asking
from .run import Fitted, fit_sides
from .settings import FitSettings
from .sides import NO_PROMPT, Call, FitSide, Image

__all__ = [
    "NO_PROMPT",
    "Asking",
    "Call",
    "FitSettings",
    "FitSide",
    "Fitted",
    "Gate",
    "Image",
    "ProbeReport",
    "fit_sides",
]
