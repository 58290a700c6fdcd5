"""Base models as {module name: weight}, read lazily."""

from .base import Base, check_finite
from .opening import BaseLike, open_base, open_pair

__all__ = ["Base", "BaseLike", "check_finite", "open_base", "open_pair"]
