"""The nodes in ComfyUI's first interface, for versions without V3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .declaration import CATEGORY, Field, Node


def _make_input(field: Field) -> tuple[Any, dict[str, Any]]:
    known: dict[str, Any] = {"tooltip": field.tooltip}
    if field.default is not None:
        known["default"] = field.default
    if field.kind == "combo":
        return list(field.options()), known
    if field.kind == "float":
        least, greatest = field.limits
        return "FLOAT", known | {"min": least, "max": greatest, "step": 0.01}
    return field.kind.upper(), known


def _make_class(node: Node) -> type:
    class Generated:
        CATEGORY = CATEGORY
        DESCRIPTION = node.description
        FUNCTION = "execute"
        OUTPUT_NODE = True
        RETURN_TYPES = tuple(kind for kind, _ in node.outputs)
        RETURN_NAMES = tuple(name for _, name in node.outputs)

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {field.name: _make_input(field) for field in node.inputs}}

        @classmethod
        def IS_CHANGED(cls, **values: Any) -> str:
            return node.fingerprint(**values)

        def execute(self, **values: Any) -> Any:
            results = node.run(**values)
            report = node.show(results)
            shown = {} if report is None else {"text": (report,)}
            return {"ui": shown, "result": tuple(results)}

    Generated.__name__ = Generated.__qualname__ = node.name
    return Generated


def make_mappings(nodes: Sequence[Node]) -> tuple[dict[str, type], dict[str, str]]:
    """NODE_CLASS_MAPPINGS and NODE_DISPLAY_NAME_MAPPINGS."""
    classes = {node.name: _make_class(node) for node in nodes}
    return classes, {node.name: node.title for node in nodes}
