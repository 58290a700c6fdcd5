"""How alike two subspaces are: overlap with its chance level, and principal angles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeMismatch
from .arrays import like, to_tensor
from .basis import Basis, truncated_svd
from .choice import Rank
from .overlaps import basis_tables


@dataclass(frozen=True)
class Similarity:
    """Overlap Φ of the leading subspaces of two weights, 0 … 1, for one pair or a stack of pairs.

    Φ = ‖U_sᵀU_t‖_F² / min(k_s, k_t): 1 where one subspace contains the other. Two unrelated bases
    reach the chance level max(k_s, k_t)/dimension, and two bases of the whole space always reach 1.

    Attributes:
        left: [...], of the left subspaces (what the module writes).
        right: [...], of the right subspaces (what the module reads).
        chance_left: [...], what unrelated weights would score on the left.
        chance_right: [...], and on the right.
    """

    left: Tensor
    right: Tensor
    chance_left: Tensor
    chance_right: Tensor

    @property
    def above_left(self) -> Tensor:
        """(Φ − chance)/(1 − chance): 0 as unrelated, 1 as equal, NaN where chance is 1."""
        return _above(self.left, self.chance_left)

    @property
    def above_right(self) -> Tensor:
        """The same on the right."""
        return _above(self.right, self.chance_right)


def _above(phi: Tensor, chance: Tensor) -> Tensor:
    undefined = chance >= 1
    share = (phi - chance) / torch.where(undefined, 1.0, 1 - chance)
    return torch.where(undefined, torch.full_like(share, torch.nan), share)


def basis_similarity(source: Basis, target: Basis) -> Similarity:
    """`similarity` of two bases that exist already."""
    if source.shape != target.shape:
        raise ShapeMismatch(
            f"source {list(source.shape)} and target {list(target.shape)} differ: subspaces of "
            "different spaces cannot be compared"
        )
    m, n = source.shape[-2:]
    fewest = torch.minimum(source.rank, target.rank).clamp_min(1).double()
    most = torch.maximum(source.rank, target.rank).double()
    left, right = (table.blocks.sum((-2, -1)) for table in basis_tables(source, target))
    return Similarity(
        left=left / fewest,
        right=right / fewest,
        chance_left=most / m,
        chance_right=most / n,
    )


def similarity(W_src: Any, W_tgt: Any, *, rank: Rank) -> Similarity:
    """Subspace similarity Φ of two weights (or stacks), with chance levels.

    Args:
        W_src: [..., m, n] weight, or its Basis.
        W_tgt: the same shape.
        rank: columns, or share of energy, as `truncated_svd` takes it; ignored for a Basis.

    Raises:
        ShapeMismatch: the shapes differ.
    """
    source, target = (w if isinstance(w, Basis) else truncated_svd(w, rank) for w in (W_src, W_tgt))
    return basis_similarity(source, target)


def principal_angles(X: Any, Y: Any) -> Any:
    """Principal angles between the column spaces of X and Y, ascending, in radians.

    Cosines cannot tell angles below √eps from zero, so angles under 45° come from sines: the
    singular values of Y − X(XᵀY) (Björck & Golub 1973). Everything runs in float64.

    Args:
        X: [..., m, p], full column rank; made orthonormal here.
        Y: [..., m, q].

    Returns:
        [..., min(p, q)] in float64, as the kind of array X is.

    Raises:
        ShapeMismatch: X and Y live in different spaces.
    """
    x, y = to_tensor(X).double(), to_tensor(Y).double()
    if x.ndim < 2 or y.ndim < 2 or x.shape[:-1] != y.shape[:-1]:
        raise ShapeMismatch(
            f"X {list(x.shape)} and Y {list(y.shape)} must be [..., m, p] and [..., m, q]"
        )
    if x.shape[-1] < y.shape[-1]:
        x, y = y, x
    x, y = torch.linalg.qr(x)[0], torch.linalg.qr(y)[0]
    inner = x.mT @ y
    cosines = torch.linalg.svdvals(inner).clamp(0, 1)
    sines = torch.linalg.svdvals(y - x @ inner).flip(-1).clamp(0, 1)
    angles = torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())
    return like(angles, X)


def angle_quantiles(source: Basis, target: Basis, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Quantiles of the principal angles between two bases of one weight each, left and right.

    The angles are those of `principal_angles`, by half the work, since bases are orthonormal: the
    squared sines are the eigenvalues of EᵀE with E = Y − X(XᵀY), in float64. What float32 bases
    leave of it is about 1e-7.

    Args:
        source: a basis of one matrix [m, n].
        target: likewise.
        shares: between 0 (the smallest angle) and 1 (the largest).

    Returns:
        Radians, float64, [len(shares)] each.
    """
    found = []
    for x, y in ((source.U, target.U), (source.V, target.V)):
        x, y = x.double(), y.double()
        if x.shape[-1] < y.shape[-1]:
            x, y = y, x
        rest = y - x @ (x.mT @ y)
        sines = torch.linalg.eigvalsh(rest.mT @ rest).clamp(0, 1).sqrt()
        angles = sines.asin()
        found.append(angles.quantile(torch.tensor(shares, dtype=angles.dtype, device=x.device)))
    return found[0], found[1]
