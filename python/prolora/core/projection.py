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

from . import recompression
from .arrays import to_kind_of, to_tensor
from .basis import Basis, truncated_svd
from .errors import NonFiniteWeights, ShapeMismatch
from .lowrank import LowRank
from .ops.rows import project_pair
from .precision import is_finite, working_dtype
from .rank_rule import Rank
from .similarity import Similarity, basis_similarity

DEFAULT_RANK: Rank = 0.99
"""The rank rule where the caller gives none: the columns that hold 99 % of a weight's energy.

The paper does not say how it chooses k. A share of energy means the same at every width, where a
fixed k = 320 is the whole space of a 320-wide layer and a tenth of a 3072-wide one; of the rules
tried in docs/evidence.md this one recovers most, since it drops least.
"""

Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Side:
    """One factor as rows x [..., r, m], taken apart by two bases.

    Attributes:
        x: the rows.
        inside, outside: their parts in the range of the source's basis and in its complement.
        within: what of `inside` lies in the range of the target's basis.
        without: what of `outside` lies in the complement of the target's.
    """

    x: Tensor
    inside: Tensor
    outside: Tensor
    within: Tensor
    without: Tensor

    @classmethod
    def of(cls, x: Tensor, source: Tensor, target: Tensor) -> Side:
        """Rows x [..., r, m] through U_s [..., m, k] and U_t [..., m, k'].

        Rows of several updates of a weight, [..., l, r, m], go through it as one.
        """
        several = x.ndim > source.ndim
        rows = x.flatten(-3, -2) if several else x
        split, moved = project_pair(source, target, rows)
        parts = (*split.chunk(2, -2), *moved.chunk(2, -2))
        if several:
            parts = tuple(part.unflatten(-2, x.shape[-3:-1]) for part in parts)
        return cls(x, *parts)


METHODS: dict[str, Callable[[Side], Parts]] = {
    # the paper: range to range, complement to complement
    "prolora": lambda side: (side.within, side.without),
    # the paper's ablation without the complement
    "subspace": lambda side: (side.within,),
    # LoRA-X eq. 3: the target's range alone, of what was inside and of what was outside
    "lora-x": lambda side: (side.within + (side.outside - side.without),),
    # the update unchanged: the baseline
    "copy": lambda side: (side.x,),
    # our extension: the mixed blocks are mapped as well, and the four blocks factor:
    # Σ_ab (P_t^a P_s^a) ΔW (Q_s^b Q_t^b) = L ΔW R, so the rank stays r
    "blocks": lambda side: (side.within + side.without,),
}
"""What each method makes of one side.

The parts a method returns are mutually orthogonal (range and complement of one target basis).
"""


@dataclass(frozen=True)
class ProjectionInfo:
    """What a projection kept and lost; every field is [...], one value per matrix, float64.

    Where several updates of each weight were moved at once, those that depend on the update are
    [..., l].

    Attributes:
        similarity: Φ left and right, with chance levels.
        rank_source: columns of the source basis.
        rank_target: columns of the target basis.
        range_energy: share of ‖ΔW_s‖² in the source's range on both sides.
        null_energy: … in the complement on both sides.
        range_null_energy: … written to the range, read from the complement (a mixed block).
        null_range_energy: … written to the complement, read from the range (the other one).
        energy: ‖ΔW_s‖².
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
    energy: Tensor
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
    source = _make_basis(W_src, rank, update.shape, "W_src", conv)
    target = _make_basis(W_tgt, rank, update.shape, "W_tgt", conv)
    moved: Any
    if isinstance(update, LowRank):
        found = project_factors(update, source, target, method)
        moved, info = found.joined(), found.info
    else:
        flat = update.flatten(1) if conv else update
        dense, info = _project_dense(flat, source, target, method)
        moved = to_kind_of(dense.to(update.dtype).reshape(update.shape), delta)
    return (moved, info) if return_info else moved


def project_factors(
    delta: LowRank, source: Basis, target: Basis, method: str, similar: Similarity | None = None
) -> Projected:
    """`project` on factors and bases that exist, with its account; shapes [..., m, r], [..., r, n].

    Several updates of every weight may go at once, [..., l, m, r] and [..., l, r, n].

    Nothing of size m×n is formed: flops ≈ 12(m + n)kr per matrix. The overlap of the two bases,
    2(m + n)k² flops, may be known already: `similar`.
    """
    work = working_dtype(delta.dtype)
    source, target = source.to(work).to(delta.device), target.to(work).to(delta.device)
    left = Side.of(delta.up.to(work).mT, source.U, target.U)  # rows of m
    right = Side.of(delta.down.to(work), source.V, target.V)  # rows of n
    up, down = METHODS[method](left), METHODS[method](right)
    grams = Grams.of(left, up), Grams.of(right, down)
    info = _measure_projection(left, right, *grams, source, target, similar)
    return Projected(up, down, *grams, info, delta.dtype)


@dataclass(frozen=True)
class Grams:
    """Inner products of the rows of one factor and of what became of it, in float64.

    They serve the account and the recompression both: either alone would have to form them.

    Attributes:
        x: XXᵀ [..., r, r] of the factor as it came.
        rows: the parts that a method made of it, [..., r, m] each.
        parts: YYᵀ of each part Y.
        cross: YXᵀ of each.
    """

    x: Tensor
    rows: Parts
    parts: Parts
    cross: Parts

    @classmethod
    def of(cls, side: Side, moved: Parts) -> Grams:
        """Of one side."""
        x = side.x.double()
        rows = tuple(part.double() for part in moved)
        return cls(x @ x.mT, rows, tuple(y @ y.mT for y in rows), tuple(y @ x.mT for y in rows))


@dataclass(frozen=True)
class Projected:
    """Moved updates, as the parts that a method made of their factors, and their account.

    Attributes:
        up, down: the parts as rows, [..., r, m] and [..., r, n]; mutually orthogonal on each side.
        left, right: their inner products.
        info: what was kept and lost.
        dtype: of the updates that came in.
    """

    up: Parts
    down: Parts
    left: Grams
    right: Grams
    info: ProjectionInfo
    dtype: torch.dtype

    def joined(self) -> LowRank:
        """The updates as they are, [..., m, R] and [..., R, n] with R = r times the parts."""
        return LowRank(torch.cat(self.up, -2).mT, torch.cat(self.down, -2)).to(self.dtype)

    def recompressed(self, tolerance: float = 1e-6) -> list[LowRank]:
        """The updates of a stack, all its axes flattened, at the smallest exact rank.

        Args:
            tolerance: singular values below this share of the largest are rounding and are cut.

        Returns:
            One LowRank per matrix, singular values descending, balanced factors.
        """
        work = working_dtype(self.dtype)
        parts = []
        for side in zip(
            self.left.rows, self.right.rows, self.left.parts, self.right.parts, strict=True
        ):
            left, right, gram_left, gram_right = (x.flatten(0, -3) for x in side)
            parts.append(
                recompression.factor_product_by_grams(left, right, gram_left, gram_right, work)
            )
        up, s, down, order = recompression.merge_products(parts, work)
        keep = (s > tolerance * s.amax(-1, keepdim=True)).sum(-1).clamp_min(1).tolist()
        chosen = [places[:k] for places, k in zip(order, keep, strict=True)]
        return [
            LowRank(u[i].to(self.dtype).mT.contiguous(), d[i].to(self.dtype))
            for u, d, i in zip(up, down, chosen, strict=True)
        ]


def _project_dense(
    delta: Tensor, source: Basis, target: Basis, method: str
) -> tuple[Tensor, ProjectionInfo]:
    """The same for a dense update [..., m, n], which is already as large as its result."""
    work = working_dtype(delta.dtype)
    source, target = source.to(work).to(delta.device), target.to(work).to(delta.device)
    x = delta.to(work)
    eye = torch.eye(x.shape[-1], dtype=work, device=x.device).expand(*x.shape[:-2], -1, -1)
    left, right = Side.of(x.mT, source.U, target.U), Side.of(eye, source.V, target.V)
    up, down = METHODS[method](left), METHODS[method](right)
    moved = sum((u.mT @ d for u, d in zip(up, down, strict=True)), torch.zeros_like(x))
    grams = Grams.of(left, up), Grams.of(right, down)
    return moved, _measure_projection(left, right, *grams, source, target)


def _measure_projection(
    left: Side,
    right: Side,
    up: Grams,
    down: Grams,
    source: Basis,
    target: Basis,
    similar: Similarity | None = None,
) -> ProjectionInfo:
    """What was kept and lost, from r×r Gram matrices: ‖XᵀY‖² = tr((XXᵀ)(YYᵀ)).

    Distances are differences of large numbers and need float64; shares of the energy do not.
    """
    before = _inner_product(up.x, down.x)
    # Parts are orthogonal to each other on either side, so no product of two counts.
    after = _sum_terms([_inner_product(u, d) for u, d in zip(up.parts, down.parts, strict=True)])
    cross = _sum_terms([_inner_product(u, d) for u, d in zip(up.cross, down.cross, strict=True)])
    distance = (after + before - 2 * cross).clamp_min(0)
    safe = torch.where(before > 0, before, 1.0)
    within, without = (
        [(rows @ rows.mT).double() for rows in part]
        for part in ((left.inside, right.inside), (left.outside, right.outside))
    )

    def share(of_left: Tensor, of_right: Tensor) -> Tensor:
        return _inner_product(of_left, of_right) / safe

    return ProjectionInfo(
        similarity=similar or basis_similarity(source, target),
        rank_source=source.rank,
        rank_target=target.rank,
        range_energy=share(within[0], within[1]),
        null_energy=share(without[0], without[1]),
        range_null_energy=share(within[0], without[1]),
        null_range_energy=share(without[0], within[1]),
        energy=before,
        surviving_energy=after / safe,
        norm_ratio=(after / safe).sqrt(),
        copy_distance=(distance / safe).sqrt(),
        bound=torch.maximum(source.bound, target.bound),
        ok=source.ok & target.ok,
    )


def _inner_product(left: Tensor, right: Tensor) -> Tensor:
    """⟨L, R⟩ [...] of two Gram matrices [..., r, r], which is never negative but for rounding."""
    return (left * right).sum((-2, -1)).clamp_min(0)


def _sum_terms(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum(0)


def _make_basis(weight: Any, rank: Rank, shape: torch.Size, name: str, conv: bool) -> Basis:
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
    tensors = (
        {"delta": update}
        if isinstance(update, Tensor)
        else {"delta.up": update.up, "delta.down": update.down}
    )
    for name, tensor in tensors.items():
        _refuse_non_finite(name, tensor)


def _refuse_non_finite(name: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise NonFiniteWeights(f"NaN or Inf in {name}")
