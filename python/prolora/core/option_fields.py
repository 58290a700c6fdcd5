"""Fields of an options object that carry what is told of them to people."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True)
class Shown:
    """How an option is told to people.

    Attributes:
        help: what it does and what it takes, in the words of the command line, of Python and of
            whatever shows a form.
        panel: the group that it belongs to; "" keeps it off the command line.
        metavar: what stands for its value; "" leaves that to its type.
        basic: whether the first page of the command line's help has it.
        decides: whether the result depends on it. What says only where to compute, or what to
            refuse, does not.
        words: the values that it takes, where these are words.
    """

    help: str
    panel: str = ""
    metavar: str = ""
    basic: bool = False
    decides: bool = True
    words: tuple[str, ...] = ()


def option(default: Any, help: str, /, **shown: Any) -> Any:
    """A field of an options object, with what is told of it (see `Shown`)."""
    return field(default=default, metadata={"shown": Shown(help, **shown)})


def find_shown(kind: type, name: str) -> Shown:
    """What is told of an option of an options object."""
    by_name = {known.name: known for known in fields(kind)}
    return read_shown(by_name[name])


def read_shown(known: Field[Any]) -> Shown:
    """What is told of a field that `option` made."""
    shown: Shown = known.metadata["shown"]
    return shown


def take_option(kind: type, name: str, default: Any = MISSING, **changed: Any) -> Any:
    """A field as another options object has it.

    Args:
        kind: the other object.
        name: of the field.
        default: another one.
        **changed: fields of `Shown` that differ.
    """
    known = next(known for known in fields(kind) if known.name == name)
    default = known.default if default is MISSING else default
    return field(default=default, metadata={"shown": replace(read_shown(known), **changed)})
