"""LoRA files <-> `Adapter`."""

from .adapter import Adapter
from .groups import Group, grouped
from .reading import outline, read
from .writing import check_format, file_size, write

__all__ = ["Adapter", "Group", "check_format", "file_size", "grouped", "outline", "read", "write"]
