"""LoRA files <-> `Adapter`."""

from .adapter import Adapter
from .reading import read
from .writing import write

__all__ = ["Adapter", "read", "write"]
