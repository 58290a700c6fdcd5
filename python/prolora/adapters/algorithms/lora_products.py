"""ΔW of each kind of update as a product, before any scale.

The equations are LyCORIS' (its forward pass in training), float64 throughout.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...core.lowrank import LowRank
from .truncation import (
    MAX_RANK,
    TruncatedUpdate,
    truncate_dense,
    truncate_kronecker,
    truncate_product,
)

Tensors = Mapping[str, Tensor]


def factor_update(
    algorithm: str,
    tensors: Tensors,
    rank: int = MAX_RANK,
    stored: torch.dtype = torch.float32,
) -> TruncatedUpdate:
    """Returns ΔW of a module as a product, without its scale.

    Args:
        algorithm: "lora", "locon", "tucker", "loha", "lokr" or "full".
        tensors: role -> float32 tensor, shapes as checked by `algorithms.derive_form`.
        rank: the most columns of what is no product of two thin factors in the file.
        stored: the dtype that the file has them in.
    """
    if algorithm == "loha":
        # r₁·r₂ columns save nothing where a side of ΔW is shorter, and little near that.
        first, second = (_hadamard_half(tensors, i) for i in (1, 2))
        shortest = min(first[0].shape[0], first[1].shape[1])
        columns = first[0].shape[1] * second[0].shape[1]
        if columns >= shortest or (rank < MAX_RANK < columns and 4 * columns > shortest):
            return truncate_dense(dense_update(algorithm, tensors), rank)
        return truncate_product(_khatri_rao(first, second), rank)
    if algorithm == "lokr":
        return truncate_kronecker(_kronecker_half(tensors, "lokr_w1"), _second_half(tensors), rank)
    if algorithm == "full":
        stored = torch.float32 if stored == torch.float64 else stored
        return truncate_dense(tensors["diff"].flatten(1), rank, stored)
    return TruncatedUpdate(lora_product(tensors))


def dense_update(algorithm: str, tensors: Tensors) -> Tensor:
    """Returns ΔW [m, n] in full, float64, without its scale."""
    if algorithm == "lokr":
        return torch.kron(_kronecker_half(tensors, "lokr_w1"), _second_half(tensors))
    if algorithm == "full":
        return tensors["diff"].double().flatten(1)
    if algorithm == "loha":
        (up1, down1), (up2, down2) = (_hadamard_half(tensors, i) for i in (1, 2))
        return (up1 @ down1) * (up2 @ down2)
    product = lora_product(tensors)
    return product.up.double() @ product.down.double()


def measure_rows(algorithm: str, tensors: Tensors) -> Tensor:
    """Measures the norms of the rows of ΔW [m], float64, without its scale."""
    if algorithm == "lokr":
        first, second = _kronecker_half(tensors, "lokr_w1"), _second_half(tensors)
        return torch.kron(first.square().sum(1), second.square().sum(1)).sqrt()
    return dense_update(algorithm, tensors).square().sum(1).sqrt()


def lora_product(tensors: Tensors) -> LowRank:
    """Returns up·down, or with a Tucker core up·(mid ×₂ down) of the same rank."""
    up, down = tensors["up"].flatten(1), tensors["down"]
    if "mid" not in tensors:
        return LowRank(up, down.flatten(1))
    work = torch.promote_types(down.dtype, torch.float32)
    core = torch.einsum("rs...,si->ri...", tensors["mid"].double(), down.flatten(1).double())
    return LowRank(up.to(work), core.flatten(1).to(work))


def _khatri_rao(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> LowRank:
    """Returns (up₁·down₁) ∘ (up₂·down₂) as one product of r₁·r₂ columns."""
    up = torch.einsum("mi,mj->mij", first[0], second[0]).flatten(1)
    down = torch.einsum("in,jn->ijn", first[1], second[1]).flatten(0, 1)
    return LowRank(up, down)


def _hadamard_half(tensors: Tensors, number: int) -> tuple[Tensor, Tensor]:
    """Returns one factor of the elementwise product, as up [m, r] and down [r, n]."""
    a, b = (tensors[f"hada_w{number}_{side}"].double() for side in "ab")
    core = tensors.get(f"hada_t{number}")
    if core is None:
        return a, b
    return a.mT, torch.einsum("ij...,jn->in...", core.double(), b).flatten(1)


def _kronecker_half(tensors: Tensors, half: str) -> Tensor:
    if half in tensors:
        return tensors[half].double()
    return tensors[f"{half}_a"].double() @ tensors[f"{half}_b"].double().flatten(1)


def _second_half(tensors: Tensors) -> Tensor:
    """Returns w₂ as a matrix [c, d·k], so that kron(w₁, w₂) has ΔW's columns."""
    core = tensors.get("lokr_t2")
    if core is None:
        return _kronecker_half(tensors, "lokr_w2").flatten(1)
    a, b = tensors["lokr_w2_a"].double(), tensors["lokr_w2_b"].double()
    return torch.einsum("ij...,ip,jr->pr...", core.double(), a, b).flatten(1)
