"""Other ways to merge LoRAs, as their papers define them: dense, in float64, a module at a time.

Each takes the updates ΔW_k [m, n] of a module and gives one matrix [m, n].
"""

from __future__ import annotations

import torch
from torch import Tensor


def ties(deltas: list[Tensor], density: float) -> Tensor:
    """TIES (Yadav et al. 2023): the largest entries, a sign by majority, the mean of those."""
    least = [d.abs().flatten().quantile(1 - density) if density < 1 else 0.0 for d in deltas]
    kept = torch.stack([d * (d.abs() >= x) for d, x in zip(deltas, least, strict=True)])
    agree = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
    return (kept * agree).sum(0) / agree.sum(0).clamp_min(1)


def knots(deltas: list[Tensor], density: float) -> Tensor:
    """KnOTS (Stoica et al. 2024): TIES of the parts' right factors in the basis that they share."""
    u, s, vt = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
    rank = int((s > 1e-9 * s[0]).sum())
    parts = (s[:rank, None] * vt[:rank]).split([delta.shape[1] for delta in deltas], 1)
    return u[:, :rank] @ ties(list(parts), density)


def dare(deltas: list[Tensor], keep: float) -> Tensor:
    """DARE (Yu et al. 2023): entries dropped at random, the rest scaled up; then the sum."""
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(d.shape, generator=generator) < keep for d in deltas]
    return torch.stack([d * m / keep for d, m in zip(deltas, masks, strict=True)]).sum(0)


def tsv(deltas: list[Tensor]) -> Tensor:
    """TSV-Merge (Gargiulo et al. 2024): singular vectors of all parts made orthonormal together."""
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    ranks = [int((s > 1e-6 * s[0]).sum()) for _, s, _ in parts]
    pieces = [(u[:, :r], s[:r], v[:r].mT) for (u, s, v), r in zip(parts, ranks, strict=True)]
    u, s, v = zip(*pieces, strict=True)
    return _polar(torch.cat(u, 1)) * torch.cat(s) @ _polar(torch.cat(v, 1)).mT


def ssr(deltas: list[Tensor], inputs: list[Tensor], ridge: float = 1e-4) -> Tensor:
    """SSR-Merge (Wei et al. 2026): least squares on what each LoRA's own run reads.

    Args:
        deltas: the updates.
        inputs: Σ xxᵀ [n, n] over what the module reads when the model runs with each LoRA.
        ridge: of the mean eigenvalue.
    """
    _, s, vt = torch.linalg.svd(torch.cat(deltas, 0), full_matrices=False)
    right = vt[s > 1e-9 * s[0]].mT
    grams = torch.stack([right.mT @ c @ right / c.trace() for c in inputs])
    gram = grams.sum(0)
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    wanted = (torch.stack(deltas) @ right @ grams).sum(0)
    return torch.linalg.solve(gram, wanted.mT).mT @ right.mT


def cut(delta: Tensor, rank: int) -> Tensor:
    """The closest matrix of that rank."""
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def _polar(columns: Tensor) -> Tensor:
    """The orthonormal columns that are closest."""
    u, _, vt = torch.linalg.svd(columns, full_matrices=False)
    return u @ vt
