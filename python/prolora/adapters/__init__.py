"""LoRA files <-> `Adapter`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import Adapter as Adapter
    from .file_model import BaseNames as BaseNames
    from .lora import Lora as Lora
    from .reading import outline_adapter as outline_adapter
    from .reading import read_adapter as read_adapter
    from .writing import check_format as check_format
    from .writing import describe_peft_config as describe_peft_config
    from .writing import encode_state_dict as encode_state_dict
    from .writing import find_kept as find_kept
    from .writing import write_adapter as write_adapter

# Loaded when asked for: headers are read without torch.
_HOMES = {
    "adapter": ["Adapter"],
    "lora": ["Lora"],
    "file_model": ["BaseNames"],
    "reading": ["outline_adapter", "read_adapter"],
    "writing": [
        *("check_format", "describe_peft_config"),
        *("encode_state_dict", "find_kept", "write_adapter"),
    ],
}


def __getattr__(name: str) -> Any:
    """Loads a name of the table."""
    for home, names in _HOMES.items():
        if name in names:
            globals()[name] = value = getattr(import_module(f".{home}", __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
