"""Base models as {module name: weight}, read lazily."""

from ..architectures.layouts import Correspondence, Layout, correspondence, identify, known, load
from .base import Base, check_finite
from .opening import Source, open_base

__all__ = [
    "Base",
    "Correspondence",
    "Layout",
    "Source",
    "check_finite",
    "correspondence",
    "identify",
    "known",
    "load",
    "open_base",
]
