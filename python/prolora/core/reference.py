"""The same mathematics in float64 and dense form: what the library must equal, a few lines each.

Read this to know what prolora computes; read `projection` and `svd` to know how it does so without
ever forming these matrices. Nothing here is fast, and nothing here is used at run time.
"""

from __future__ import annotations

import torch
from torch import Tensor


def leading_vectors(weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """U [m, k] and V [n, k] of the thin SVD of weight [m, n]."""
    u, _, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    return u[..., :k], vt.mT[..., :k]


def columns_for_energy(weight: Tensor, energy: float) -> int:
    """The smallest k whose σ_1² + … + σ_k² is at least `energy` of Σσ²."""
    squares = torch.linalg.svdvals(weight.double()).square()
    return int((squares.cumsum(-1) < energy * squares.sum()).sum()) + 1


def range_projector(basis: Tensor) -> Tensor:
    """UUᵀ [m, m] of an orthonormal U [m, k]."""
    return basis @ basis.mT


def complement_projector(basis: Tensor) -> Tensor:
    """I − UUᵀ [m, m]."""
    return torch.eye(basis.shape[-2], dtype=basis.dtype) - range_projector(basis)


def subspace_overlap(source: Tensor, target: Tensor) -> Tensor:
    """‖U_sᵀU_t‖_F²."""
    return (source.mT @ target).square().sum((-2, -1))


def project_pair(us: Tensor, ut: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x [r, m] inside us above outside us, and these inside ut above outside ut: [2r, m]."""
    inside, outside = x @ range_projector(us), x @ complement_projector(us)
    moved = torch.cat([inside @ range_projector(ut), outside @ complement_projector(ut)], -2)
    return torch.cat([inside, outside], -2), moved


def split_blocks(delta: Tensor, weight: Tensor, k: int) -> dict[str, Tensor]:
    """The four blocks of an update in the bases of its own weight: they sum to the update."""
    u, v = leading_vectors(weight, k)
    delta = delta.double()
    return {
        "range": range_projector(u) @ delta @ range_projector(v),
        "null": complement_projector(u) @ delta @ complement_projector(v),
        "range_null": range_projector(u) @ delta @ complement_projector(v),
        "null_range": complement_projector(u) @ delta @ range_projector(v),
    }


def project_dense(
    delta: Tensor, W_src: Tensor, W_tgt: Tensor, k_src: int, k_tgt: int, method: str
) -> Tensor:
    """ΔW_t [m, n] of docs/method.md §1, term by term as the papers print it."""
    delta = delta.double()
    if method == "copy":
        return delta
    u, v = leading_vectors(W_tgt, k_tgt)
    inside_left, inside_right = range_projector(u), range_projector(v)
    outside_left, outside_right = complement_projector(u), complement_projector(v)
    part = split_blocks(delta, W_src, k_src)
    within = inside_left @ part["range"] @ inside_right
    without = outside_left @ part["null"] @ outside_right
    return within + without
