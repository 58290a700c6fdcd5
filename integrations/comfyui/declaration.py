"""How a node is declared here, once for both interfaces of ComfyUI."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Field:
    """An input of a node.

    Attributes:
        name: as the node's function takes it.
        kind: "combo", "float", "string", or the name of a ComfyUI type such as "MODEL".
        tooltip: what it means.
        default: the value at first; None where there is none.
        options: gives the choices of a combo, each time that ComfyUI asks for them.
        limits: least and greatest value of a float.
    """

    name: str
    kind: str
    tooltip: str
    default: Any = None
    options: Callable[[], Sequence[str]] | None = None
    limits: tuple[float, float] = (0.0, 10.0)


@dataclass(frozen=True)
class Node:
    """A node.

    Attributes:
        name: of its class in workflows; never changes.
        title: what the user reads.
        description: in a sentence or two.
        inputs: in order.
        outputs: (ComfyUI type, name) in order. One called "report" is also shown on the node.
        run: called with the inputs by name; returns a value for each output.
        fingerprint: called with the inputs by name: what the result depends on besides them.
    """

    name: str
    title: str
    description: str
    inputs: tuple[Field, ...]
    outputs: tuple[tuple[str, str], ...]
    run: Callable[..., tuple[Any, ...]]
    fingerprint: Callable[..., str]

    def show(self, values: Sequence[Any]) -> str | None:
        """The report among the output values, to be shown on the node."""
        names = [name for _, name in self.outputs]
        return str(values[names.index("report")]) if "report" in names else None


CATEGORY = "loaders/prolora"
