"""The stages of a truncated SVD, told from the Python frames that lead to a call of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# (file, start of the function's name) -> stage. Of the frames inside prolora, from the innermost
# outwards, the first that matches counts; an empty stage is a helper, which counts for its caller.
RULES = [
    ("solvers", "estimate_skew", ""),
    ("solvers", "try_solver", ""),
    ("solvers", "", "eigensolver"),
    ("panel_qr", "", "panel"),
    ("panels", "", "panel"),
    ("krylov", "_orthonormal_panel", "panel"),
    ("krylov", "_complete_panel", "panel"),
    ("krylov", "_orthogonalise", "orthogonalisation"),
    ("block_basis", "", "krylov"),
    ("refinement", "", "refinement"),
    ("bounds", "", "refinement"),
    ("cut", "", "refinement"),
    ("factors", "", "refinement"),
    ("dense", "", "dense"),
    ("gram", "", "gram"),
    ("krylov", "", "krylov"),
    ("basis", "", "scaling and norms"),
]


def stage_of(frame: Any) -> str:
    """The stage that a frame, or what called it, belongs to; "other" outside of prolora."""
    products = False
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "prolora" in path.parts:
            products |= path.stem == "products"
            for file, start, stage in RULES:
                if path.stem == file and frame.f_code.co_name.startswith(start):
                    if products and stage in ("krylov", "orthogonalisation"):
                        return "products with W"
                    if stage:
                        return stage
                    break
        frame = frame.f_back
    return "other"
