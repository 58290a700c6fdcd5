"""prolora's nodes for ComfyUI: move a LoRA to another base model, without training.

A ComfyUI with the V3 interface takes `comfy_entrypoint`, an older one `NODE_CLASS_MAPPINGS`.
"""

from .nodes import NODES

WEB_DIRECTORY = "web"
"""Where ComfyUI finds the script that shows reports on the nodes."""

try:
    from .v3 import make_extension

    async def comfy_entrypoint():
        """What ComfyUI calls to learn of the nodes."""
        return make_extension(NODES)

except ImportError:
    from .v1 import make_mappings

    NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = make_mappings(NODES)
