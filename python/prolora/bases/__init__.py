"""Base models as {module name: weight}, read lazily."""

from ..architectures.layouts import (
    Correspondence,
    Layout,
    find_correspondence,
    identify_layout,
    known_layouts,
    load_layout,
)
from .base import Base, check_finite
from .opening import BaseLike, open_base, open_pair

__all__ = [
    "Base",
    "BaseLike",
    "Correspondence",
    "Layout",
    "check_finite",
    "find_correspondence",
    "identify_layout",
    "known_layouts",
    "load_layout",
    "open_base",
    "open_pair",
]
