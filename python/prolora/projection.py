"""ProLoRA itself on tensors: an update of one weight becomes the update of another.

Every method is a pair of one-sided maps, so it acts on the thin factors alone (METHOD §1):
ΔW_t = Σ_i L_i(up) · R_i(down), where L_i and R_i chain the projectors of source and target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from .errors import NonFiniteWeights, ShapeMismatch
from .linalg import recompression
from .linalg.arrays import like, to_tensor
from .linalg.basis import Basis, truncated_svd
from .linalg.choice import Rank
from .linalg.lowrank import LowRank
from .linalg.precision import is_finite, working_dtype
from .linalg.subspaces import Similarity, basis_similarity

DEFAULT_RANK: Rank = 0.99
"""The rank rule where the caller gives none: the columns that hold 99 % of a weight's energy.

The paper does not say how it chooses k. A share of energy means the same at every width, where a
fixed k = 320 is the whole space of a 320-wide layer and a tenth of a 3072-wide one; of the rules
tried in docs/evidence.md this one recovers most, since it drops least.
"""

Parts = tuple[Tensor, ...]
Side = Callable[[Tensor, Tensor, Tensor], Parts]


def _prolora(x: Tensor, source: Tensor, target: Tensor) -> Parts:
    inside, outside = ops.split_project(source, x)
    return ops.split_project(target, inside)[0], ops.split_project(target, outside)[1]


def _subspace(x: Tensor, source: Tensor, target: Tensor) -> Parts:
    return (ops.split_project(target, ops.split_project(source, x)[0])[0],)


def _lora_x(x: Tensor, source: Tensor, target: Tensor) -> Parts:
    return (ops.split_project(target, x)[0],)


def _blocks(x: Tensor, source: Tensor, target: Tensor) -> Parts:
    # The four blocks factor: Σ_ab (P_t^a P_s^a) ΔW (Q_s^b Q_t^b) = L ΔW R. The rank stays r.
    inside, outside = _prolora(x, source, target)
    return (inside + outside,)


def _copy(x: Tensor, source: Tensor, target: Tensor) -> Parts:
    return (x,)


METHODS: dict[str, Side] = {
    "prolora": _prolora,  # the paper: range to range, complement to complement
    "subspace": _subspace,  # the paper's ablation without the complement
    "lora-x": _lora_x,  # LoRA-X eq. 3: the target's range alone
    "copy": _copy,  # the update unchanged: the baseline
    "blocks": _blocks,  # our extension: the mixed blocks are mapped as well
}
"""What each method does to one side: x [..., m, r] with U_s [..., m, k], U_t [..., m, k'].

The parts a method returns are mutually orthogonal (range and complement of one target basis).
"""


@dataclass(frozen=True)
class ProjectionInfo:
    """What a projection kept and lost; every field is [...], one value per matrix, float64.

    Attributes:
        similarity: Φ left and right, with chance levels.
        rank_source: columns of the source basis.
        rank_target: columns of the target basis.
        range_energy: share of ‖ΔW_s‖² in the source's range on both sides.
        null_energy: … in the complement on both sides.
        range_null_energy: … written to the range, read from the complement (a mixed block).
        null_range_energy: … written to the complement, read from the range (the other one).
        surviving_energy: ‖ΔW_t‖² / ‖ΔW_s‖².
        norm_ratio: ‖ΔW_t‖ / ‖ΔW_s‖.
        copy_distance: ‖ΔW_t − ΔW_s‖ / ‖ΔW_s‖: 0 where the method does what copying does.
        bound: the larger of the two bases' bounds on the sine of the largest principal angle.
        ok: both bases met their tolerance.
    """

    similarity: Similarity
    rank_source: Tensor
    rank_target: Tensor
    range_energy: Tensor
    null_energy: Tensor
    range_null_energy: Tensor
    null_range_energy: Tensor
    surviving_energy: Tensor
    norm_ratio: Tensor
    copy_distance: Tensor
    bound: Tensor
    ok: Tensor


def project(
    delta: Any,
    W_src: Any,
    W_tgt: Any,
    *,
    rank: Rank = DEFAULT_RANK,
    method: str = "prolora",
    return_info: bool = False,
) -> Any:
    """Moves the update of one weight to another weight of the same shape.

    With `method="prolora"` (arXiv 2506.04244, eq. 1-3; METHOD §1):
    ΔW_t = P_t P_s ΔW Q_s Q_t + P_t⊥ P_s⊥ ΔW Q_s⊥ Q_t⊥, where P = UUᵀ, Q = VVᵀ of the leading
    singular subspaces and ⊥ their complements.

    Args:
        delta: the update of the source, scale included: an array [m, n]; a stack [b, m, n]; a
            convolution [out, in, kh, kw], treated as out × (in·kh·kw); a LowRank, or a pair
            (up [..., m, r], down [..., r, n]). torch, numpy and cupy arrays alike.
        W_src: the source weight, of delta's shape, or its Basis.
        W_tgt: the target weight, likewise.
        rank: columns of the subspaces (int), or the share of energy they hold (float in (0, 1));
            ignored for a Basis.
        method: a name of `METHODS`.
        return_info: also return a ProjectionInfo.

    Returns:
        The update of the target: dense for dense input, LowRank (rank ≤ 2r) for factors; in
        delta's dtype and on its device, computed in float32 or better. Inputs are not changed.

    Raises:
        ShapeMismatch: delta, W_src and W_tgt do not have one shape.
        NonFiniteWeights: NaN or Inf in any of them.
        ValueError: an unknown method or a rank that makes no sense.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
    if isinstance(delta, tuple | list):
        delta = LowRank(*(to_tensor(factor) for factor in delta))
    update = delta if isinstance(delta, LowRank) else to_tensor(delta)
    _check_finite(update)
    conv = isinstance(update, Tensor) and update.ndim == 4
    source = _basis(W_src, rank, update.shape, "W_src", conv)
    target = _basis(W_tgt, rank, update.shape, "W_tgt", conv)
    moved: Any
    if isinstance(update, LowRank):
        moved, info = project_factors(update, source, target, method)
    else:
        flat = update.flatten(1) if conv else update
        dense, info = _project_dense(flat, source, target, method)
        moved = like(dense.to(update.dtype).reshape(update.shape), delta)
    return (moved, info) if return_info else moved


def project_factors(
    delta: LowRank, source: Basis, target: Basis, method: str, similar: Similarity | None = None
) -> tuple[LowRank, ProjectionInfo]:
    """`project` on factors and bases that exist, with its account; shapes [..., m, r], [..., r, n].

    Nothing of size m×n is formed: flops ≈ 12(m + n)kr per matrix. The overlap of the two bases,
    2(m + n)k² flops, may be known already: `similar`.
    """
    work = working_dtype(delta.dtype)
    source, target = source.to(work).to(delta.device), target.to(work).to(delta.device)
    up, down = delta.up.to(work), delta.down.to(work).mT  # [..., m, r], [..., n, r]
    side = METHODS[method]
    left, right = side(up, source.U, target.U), side(down, source.V, target.V)
    moved = LowRank(torch.cat(left, -1), torch.cat(right, -1).mT)
    info = _account(LowRank(up, down.mT), moved, source, target, similar)
    return moved.to(delta.dtype), info


def recompress_parts(delta: LowRank, method: str, tolerance: float = 1e-6) -> list[LowRank]:
    """The moved update of a stack at the smallest exact rank, matrix by matrix.

    Args:
        delta: what `project_factors` returned, [b, m, R] and [b, R, n].
        method: the method that made it; its parts are orthogonal, so their SVDs merge.
        tolerance: singular values below this share of the largest are rounding and are cut.

    Returns:
        One LowRank per matrix, singular values descending, balanced factors.
    """
    halves = 2 if method == "prolora" else 1
    ups, downs = delta.up.chunk(halves, -1), delta.down.chunk(halves, -2)
    svds = [recompression.product_svd(u, d) for u, d in zip(ups, downs, strict=True)]
    u, s, v = recompression.merge_orthogonal(svds)
    up, down = recompression.balanced(u, s, v)
    keep = (s > tolerance * s[..., :1]).sum(-1).clamp_min(1).tolist()
    return [
        LowRank(up[i, :, :k].contiguous(), down[i, :k].contiguous()) for i, k in enumerate(keep)
    ]


def _project_dense(
    delta: Tensor, source: Basis, target: Basis, method: str
) -> tuple[Tensor, ProjectionInfo]:
    """The same for a dense update [..., m, n], which is already as large as its result."""
    work = working_dtype(delta.dtype)
    source, target = source.to(work).to(delta.device), target.to(work).to(delta.device)
    x = delta.to(work)
    side = METHODS[method]
    moved = torch.zeros_like(x)
    for i, part in enumerate(side(x, source.U, target.U)):
        moved = moved + side(part.mT.contiguous(), source.V, target.V)[i].mT
    eye = torch.eye(x.shape[-1], dtype=work, device=x.device).expand(*x.shape[:-2], -1, -1)
    return moved, _account(LowRank(x, eye), LowRank(moved, eye), source, target)


def _account(
    delta: LowRank, moved: LowRank, source: Basis, target: Basis, similar: Similarity | None = None
) -> ProjectionInfo:
    """What was kept and lost, from r×r Gram matrices in float64: ‖XY‖² = tr((XᵀX)(YYᵀ))."""
    left = [part.double() for part in ops.split_project(source.U, delta.up)]
    right = [part.double() for part in ops.split_project(source.V, delta.down.mT)]
    grams_left, grams_right = ([x.mT @ x for x in side] for side in (left, right))
    before = delta.norm().square()
    after = moved.norm().square()
    safe = torch.where(before > 0, before, 1.0)

    def share(i: int, j: int) -> Tensor:
        return (grams_left[i] * grams_right[j]).sum((-2, -1)).clamp_min(0) / safe

    cross = (moved.up.double().mT @ delta.up.double()) * (
        moved.down.double() @ delta.down.double().mT
    )
    distance = (after + before - 2 * cross.sum((-2, -1))).clamp_min(0)
    return ProjectionInfo(
        similarity=similar or basis_similarity(source, target),
        rank_source=source.rank,
        rank_target=target.rank,
        range_energy=share(0, 0),
        null_energy=share(1, 1),
        range_null_energy=share(0, 1),
        null_range_energy=share(1, 0),
        surviving_energy=after / safe,
        norm_ratio=(after / safe).sqrt(),
        copy_distance=(distance / safe).sqrt(),
        bound=torch.maximum(source.bound, target.bound),
        ok=source.ok & target.ok,
    )


def _basis(weight: Any, rank: Rank, shape: torch.Size, name: str, conv: bool) -> Basis:
    """The basis of a weight that must have the update's shape."""
    if isinstance(weight, Basis):
        flat = torch.Size((shape[0], shape[1:].numel())) if conv else shape
        if weight.shape != flat:
            raise ShapeMismatch(f"{name} is a basis of {list(weight.shape)}, delta {list(shape)}")
        return weight
    tensor = to_tensor(weight)
    if tensor.ndim == 4 and len(shape) == 2:  # factors of a convolution
        tensor = tensor.flatten(1)
    if tensor.shape != shape:
        raise ShapeMismatch(
            f"{name} is {list(tensor.shape)} but delta {list(shape)}: no published data-free "
            "method maps between different shapes"
        )
    _refuse_non_finite(name, tensor)
    return truncated_svd(tensor.flatten(1) if conv else tensor, rank)


def _check_finite(update: Tensor | LowRank) -> None:
    tensors = {"delta": update} if isinstance(update, Tensor) else {
        "delta.up": update.up, "delta.down": update.down}  # fmt: skip
    for name, tensor in tensors.items():
        _refuse_non_finite(name, tensor)


def _refuse_non_finite(name: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise NonFiniteWeights(f"NaN or Inf in {name}")
