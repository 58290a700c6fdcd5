"""The copy, damped where the target has drifted: our extension, without any SVD.

A fine-tune changes a weight along few directions and leaves the rest alone. An update that reads or
writes those directions meets features that are no longer what it was trained on; elsewhere it keeps
its meaning. So each direction is weakened by how much of the weight drifted along it:

    ΔW_t = (I + κ_l D Dᵀ)⁻¹ ΔW (I + κ_r Dᵀ D)⁻¹,   D = W_t − W_s,
    κ_l = κ m / ‖W_s‖²,  κ_r = κ n / ‖W_s‖².

With W_t = W_s this is the copy. Drift spread evenly over all directions weakens the whole update
by about 1/(1 + κ (‖D‖/‖W_s‖)²)² where m = n. Nothing depends on a sign or an order of singular
vectors, and the rank stays r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linalg.lowrank import LowRank


def damped(delta: LowRank, source: Tensor, target: Tensor, kappa: float | Tensor) -> LowRank:
    """The update of a stack, damped along the drift of its weights.

    Args:
        delta: the source's updates, up [..., m, r] and down [..., r, n], scale included.
        source: W_s [..., m, n].
        target: W_t, likewise.
        kappa: κ ≥ 0, one number or one for each matrix [...]; 0 copies.

    Returns:
        The updates of the target, of the same rank and dtype. Flops ≈ 2mn·min(m, n) per matrix
        for the Gram matrix and min(m, n)³ for its factorisation.
    """
    work = torch.promote_types(delta.up.dtype, torch.float32)
    ours = source.to(work)
    drift = target.to(work) - ours
    m, n = drift.shape[-2:]
    kappa = torch.as_tensor(kappa, dtype=work, device=drift.device)
    # A source near zero would ask for endless damping; I + ρ DᵀD must stay definite in rounding.
    least = drift.square().sum((-2, -1)) * kappa * max(m, n) * torch.finfo(work).eps * 64
    norm = torch.maximum(ours.square().sum((-2, -1)), least).clamp_min(torch.finfo(work).tiny)
    rate = kappa / norm
    up, down = delta.up.to(work), delta.down.to(work).mT  # [..., m, r], [..., n, r]
    tall = drift if m >= n else drift.mT
    gram = tall.mT @ tall  # DᵀD on the short side
    left, right = (_long, _short) if m >= n else (_short, _long)
    up = left(up, tall, gram, rate * m)
    down = right(down, tall, gram, rate * n)
    return LowRank(up, down.mT).to(delta.up.dtype)


def _short(x: Tensor, tall: Tensor, gram: Tensor, rate: Tensor) -> Tensor:
    """(I + ρ DᵀD)⁻¹ x on the short side: x [..., d, r]."""
    return torch.cholesky_solve(x, _factor(gram, rate))


def _long(x: Tensor, tall: Tensor, gram: Tensor, rate: Tensor) -> Tensor:
    """(I + ρ DDᵀ)⁻¹ x = x − ρ D (I + ρ DᵀD)⁻¹ Dᵀx on the long side (Woodbury): x [..., l, r]."""
    inner = torch.cholesky_solve(tall.mT @ x, _factor(gram, rate))
    return x - rate[..., None, None] * (tall @ inner)


def _factor(gram: Tensor, rate: Tensor) -> Tensor:
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor: Tensor = torch.linalg.cholesky(eye + rate[..., None, None] * gram)
    return factor
