"""Base models as {module name: weight}, read lazily."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Base as Base
    from .base import check_finite as check_finite
    from .opening import BaseLike as BaseLike
    from .opening import open_base as open_base
    from .opening import open_pair as open_pair


def __getattr__(name: str) -> Any:
    """Loads a name when it is requested: headers are read without torch."""
    home = ".base" if name in ("Base", "check_finite") else ".opening"
    globals()[name] = value = getattr(import_module(home, __name__), name)
    return value
