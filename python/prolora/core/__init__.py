"""The mathematics of prolora: tensors in, tensors out.

    project(delta, W_src, W_tgt)          moves an update to another weight of the same shape
    project_many(deltas, W_srcs, W_tgts)  moves the updates of a whole LoRA, by name
    truncated_svd(W, rank)                leading singular vectors, with a bound on their error
    principal_angles(X, Y)                angles between the column spaces of two matrices
    similarity(W_src, W_tgt, rank=k)      overlap of the leading subspaces of two weights
    LowRank(up, down)                     an update up @ down
    Basis                                 what `truncated_svd` returns

Errors are in `prolora.core.exceptions`; all are a ProLoRAError, which is a ValueError.

`reference.py` defines what these compute, in 60 lines of dense float64. `svd/` has the solvers;
`ops/` and csrc/ops.h have the compiled operators, which are optional. The folder needs only torch
and imports nothing from the rest of prolora, so it can be copied into another package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .basis import Basis, truncated_svd
    from .grouped import project_many
    from .lowrank import LowRank
    from .projection import project
    from .subspaces import principal_angles, similarity

_HOMES = {
    "project": "projection",
    "project_many": "grouped",
    "truncated_svd": "basis",
    "principal_angles": "subspaces",
    "similarity": "subspaces",
    "LowRank": "lowrank",
    "Basis": "basis",
}
__all__ = [
    "Basis",
    "LowRank",
    "principal_angles",
    "project",
    "project_many",
    "similarity",
    "truncated_svd",
]


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used: other modules of this folder are read without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
