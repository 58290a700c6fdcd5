"""Data-free probing: moves a LoRA to a base whose weights have other coordinates."""

from .gate import Gate
from .recording.trajectories import Call
from .recording.translation import Guidance, Translation
from .report import ProbeReport
from .run import ProbeTransfer, Samplers, fit_to_models
from .settings import FitSettings
from .strength import MeasuredStrength, Measurement, Trajectories, measure_strengths

__all__ = [
    "Call",
    "FitSettings",
    "Gate",
    "Guidance",
    "MeasuredStrength",
    "Measurement",
    "ProbeReport",
    "ProbeTransfer",
    "Samplers",
    "Trajectories",
    "Translation",
    "fit_to_models",
    "measure_strengths",
]
