"""LoRA files <-> `Adapter`."""

from .adapter import Adapter
from .formats.groups import Group, group_modules, resolve_format
from .naming import BaseNames
from .reading import outline_adapter, read_adapter
from .writing import (
    adapter_file_size,
    check_format,
    describe_peft_config,
    encode_state_dict,
    write_adapter,
)

__all__ = [
    "Adapter",
    "BaseNames",
    "Group",
    "adapter_file_size",
    "check_format",
    "describe_peft_config",
    "encode_state_dict",
    "group_modules",
    "outline_adapter",
    "read_adapter",
    "resolve_format",
    "write_adapter",
]
