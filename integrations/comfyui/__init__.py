"""prolora's nodes for ComfyUI: move a LoRA to another base model, without training."""

import importlib.util
import sys

if importlib.util.find_spec("prolora") is None:
    raise ImportError(
        f"prolora is not installed for the Python that runs ComfyUI ({sys.executable}); the pack's "
        "README.md says how to install it"
    )

from .host import serve_pages
from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

WEB_DIRECTORY = "web"
"""Where ComfyUI finds the script that shows reports on the nodes."""

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]

serve_pages()
