"""The nodes in ComfyUI's V3 interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import ComfyExtension, io, ui

from .declaration import CATEGORY, Field, Node

_TYPES = {"STRING": io.String, "MODEL": io.Model, "CLIP": io.Clip}


def _make_input(field: Field) -> Any:
    known = {"tooltip": field.tooltip}
    if field.default is not None:
        known["default"] = field.default
    if field.kind == "combo":
        return io.Combo.Input(field.name, options=list(field.options()), **known)
    if field.kind == "float":
        least, greatest = field.limits
        return io.Float.Input(field.name, min=least, max=greatest, step=0.01, **known)
    if field.kind == "string":
        return io.String.Input(field.name, **known)
    return _TYPES[field.kind].Input(field.name, **known)


def _make_class(node: Node) -> type:
    class Generated(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> Any:
            return io.Schema(
                node_id=node.name,
                display_name=node.title,
                category=CATEGORY,
                description=node.description,
                inputs=[_make_input(field) for field in node.inputs],
                outputs=[_TYPES[kind].Output(display_name=name) for kind, name in node.outputs],
                is_output_node=True,
            )

        @classmethod
        def fingerprint_inputs(cls, **values: Any) -> str:
            return node.fingerprint(**values)

        @classmethod
        def execute(cls, **values: Any) -> Any:
            results = node.run(**values)
            report = node.show(results)
            shown = None if report is None else ui.PreviewText(report)
            return io.NodeOutput(*results, ui=shown)

    Generated.__name__ = Generated.__qualname__ = node.name
    return Generated


def make_extension(nodes: Sequence[Node]) -> Any:
    """What `comfy_entrypoint` returns."""

    class Extension(ComfyExtension):
        async def get_node_list(self) -> list[type]:
            return [_make_class(node) for node in nodes]

    return Extension()
