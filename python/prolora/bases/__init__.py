"""Base models as {module name: weight}, read lazily."""

from .base import Base, check_finite
from .layout import Correspondence, Layout, correspondence, identify, known, load
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
