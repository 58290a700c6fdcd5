"""Data-free probing: moves a LoRA to a base whose weights have other coordinates."""

from .fit_numbers import ProbeReport
from .gate import Gate
from .recording.trajectories import Call
from .recording.translation import Guidance, Translation
from .run import ProbeTransfer, Samplers, fit_to_models
from .settings import FitSettings

__all__ = [
    "Call",
    "FitSettings",
    "Gate",
    "Guidance",
    "ProbeReport",
    "ProbeTransfer",
    "Samplers",
    "Translation",
    "fit_to_models",
]
