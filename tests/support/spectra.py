"""Weights with known singular subspaces, for tests."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prolora import Basis, LowRank, truncated_svd


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers, the same each time."""
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_update(m: int, n: int, r: int, seed: int = 0, batch: Sequence[int] = ()) -> LowRank:
    """An update of rank r in float64."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(*batch, m, r, dtype=torch.float64, generator=generator)
    return LowRank(up, torch.randn(*batch, r, n, dtype=torch.float64, generator=generator))


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


def spiked(d: int, n: int, spikes: int, seed: int = 0) -> Tensor:
    """The singular values of a random d × n matrix, with `spikes` values above them."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(d, n, dtype=torch.float64, generator=generator)
    bulk = torch.linalg.svdvals(noise / n**0.5)
    return torch.cat([torch.linspace(6, 3, spikes, dtype=torch.float64), bulk[spikes:]])


def clusters(d: int, size: int, width: float) -> Tensor:
    """Groups of `size` values that lie within `width` of each other."""
    jitter = torch.rand(d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = 0.8 ** (torch.arange(d) // size)
    return (levels * (1 + width * jitter)).sort(descending=True)[0]


def steps(d: int, k: int) -> Tensor:
    """k equal values above the others, which are equal too."""
    return torch.tensor([4.0] * k + [1.0] * (d - k), dtype=torch.float64)


def rank_above(d: int, k: int) -> Tensor:
    """A rank that is a little above k."""
    return torch.linspace(2, 1, k + 22, dtype=torch.float64)


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


def lapack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and Vᵀ in float64."""
    return torch.linalg.svd(weight.double(), full_matrices=False)


def true_error(exact: Sequence[Tensor], basis: Basis) -> float:
    """The largest sine of a basis to U and V of `exact`, or how far it is from orthonormal."""
    k, (u, _, vt) = int(basis.rank), exact
    wrong = 0.0
    for right, found in ((u[:, :k], basis.U[:, :k]), (vt.mT[:, :k], basis.V[:, :k])):
        found = found.double()
        skew = torch.linalg.matrix_norm(found.mT @ found - torch.eye(k).double(), 2) if k else 0.0
        wrong = max(wrong, sine(right, torch.linalg.qr(found)[0]), float(skew))
    return wrong


def basis_of(columns: Tensor, rank: Sequence[int] | None = None) -> Basis:
    """Bases [b, m, m] with given columns on both sides, of which `rank` [b] are in use."""
    b, m, k = columns.shape
    ranks = torch.full((b,), k) if rank is None else torch.tensor(rank)
    used = columns * (torch.arange(k) < ranks[:, None])[:, None]
    eye = torch.eye(m, dtype=columns.dtype).expand(b, m, m)
    return replace(truncated_svd(eye, min(k, 2)), U=used, V=used, rank=ranks)
