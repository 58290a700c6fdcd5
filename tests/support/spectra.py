"""Weights with known singular subspaces, for tests."""

import torch
from torch import Tensor


def orthonormal(m: int, k: int, generator: torch.Generator) -> Tensor:
    """A random m × k matrix with orthonormal columns, float64."""
    return torch.linalg.qr(torch.randn(m, k, dtype=torch.float64, generator=generator))[0]


def planted(m: int, n: int, values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """W = U diag(values) Vᵀ in float64, and the U [m, d] and V [n, d] it was made of."""
    generator = torch.Generator().manual_seed(seed)
    d = len(values)
    u, v = orthonormal(m, d, generator), orthonormal(n, d, generator)
    return u * values.double() @ v.mT, u, v


def power_law(d: int, exponent: float) -> Tensor:
    """σ_i = i^-exponent, as the weights of diffusion models roughly have."""
    return torch.arange(1, d + 1, dtype=torch.float64) ** -exponent


def weights(m: int, n: int, seed: int, exponent: float = 0.5) -> Tensor:
    """A float32 weight with a power-law spectrum."""
    return planted(m, n, power_law(min(m, n), exponent), seed)[0].float()


def related(weight: Tensor, drift: float, seed: int) -> Tensor:
    """The weight moved by `drift` of its norm in a random direction."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return (weight.double() + drift * weight.double().norm() * noise / noise.norm()).to(
        weight.dtype
    )


def sine(x: Tensor, y: Tensor) -> float:
    """Sine of the largest principal angle between two orthonormal bases of equal width."""
    x, y = x.double(), y.double()
    return float(torch.linalg.matrix_norm(y - x @ (x.mT @ y), 2)) if x.numel() else 0.0
