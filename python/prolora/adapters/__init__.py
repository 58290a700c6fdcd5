"""LoRA files <-> `Adapter`."""

from .adapter import Adapter
from .reading import outline, read
from .writing import check_format, write

__all__ = ["Adapter", "check_format", "outline", "read", "write"]
