"""Fields of an options object with their texts for people."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, cast


@dataclass(frozen=True)
class Shown:
    """How an option is shown to people."""

    help: str  # what it does and takes, for the command line, Python and forms
    panel: str = ""  # its group; "" keeps it off the command line
    metavar: str = ""  # the name of its value; "" leaves that to its type
    # Does the result depend on it? False for what only says where to compute or what to refuse.
    decides: bool = True
    words: tuple[str, ...] = ()  # the values that it takes, where these are words


def option(default: Any, help: str, /, **shown: Any) -> Any:
    """Makes a field of an options object with its texts (see `Shown`)."""
    return field(default=default, metadata={"shown": Shown(help, **shown)})


def read_shown(field: Field[Any]) -> Shown:
    """Returns the texts of a field that `option` made."""
    return cast(Shown, field.metadata["shown"])


def take_option(kind: type, name: str, default: Any = MISSING, **changed: Any) -> Any:
    """Copies a field of another options object, perhaps with another default.

    `changed` are the fields of `Shown` that differ.
    """
    option = next(option for option in fields(kind) if option.name == name)
    default = option.default if default is MISSING else default
    return field(default=default, metadata={"shown": replace(read_shown(option), **changed)})
