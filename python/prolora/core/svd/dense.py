"""Leading singular triplets by dense factorisation in float64: the lower rungs of the ladder."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arrays import to_tensor
from ..precision import EPS
from ..rank_rule import Rank, count_columns
from .products import lower_gram, multiply_narrow
from .triplets import Triplets, residual_and_angle, rounding_error

# Below this σ_k/σ_1 the eigenvalues of the Gram matrix lose σ_k to rounding (√(d·eps) ≈ 1e-6).
GRAM_RANGE = 1e-5


def dense_triplets(w: Tensor, norm: Tensor, rank: Rank) -> Triplets:
    """Eigenvectors of wwᵀ where they resolve the spectrum down to σ_k, LAPACK's SVD elsewhere.

    Args:
        w: [b, d, n], d ≤ n.
        norm: [b], ‖w‖_F.
        rank: the columns to return, as a rule.
    """
    eigenvalues, vectors = eigh_stack(lower_gram(w))
    short, s = vectors.flip(-1), eigenvalues.flip(-1).clamp_min(0).sqrt()  # [b, d, d], [b, d]
    count = _count_columns(s, rank, w.shape[-2:])
    last = s.gather(-1, (count - 1).clamp_min(0)[:, None]).squeeze(-1)
    fallen = (last < GRAM_RANGE * s[:, 0]) & (s[:, 0] > 0)
    right: dict[int, Tensor] = {}
    for i in fallen.nonzero().flatten().tolist():
        short[i], s[i], vt = torch.linalg.svd(w[i], full_matrices=False)
        right[i] = vt.mT
    if right:
        count = _count_columns(s, rank, w.shape[-2:])
    k = max(1, int(count.max())) if len(w) else 1
    used = torch.arange(k, device=w.device) < count[:, None]
    short, kept = short[..., :k] * used[:, None], s[:, :k] * used
    long = multiply_narrow(w.mT, short) / torch.where(kept > 0, kept, 1.0)[:, None]
    left = torch.zeros_like(kept)
    for i, vectors in right.items():
        long[i] = vectors[:, :k] * used[i]
        left[i] = torch.linalg.vector_norm(w[i].mT @ short[i] - long[i] * kept[i], dim=0)
    following = torch.cat([s, s.new_zeros(len(w), 1)], -1).gather(-1, count[:, None]).squeeze(-1)
    # The eigenvalues of the Gram matrix err relative to ‖w‖², so their roots by a root.
    error = rounding_error(w, norm)
    blurred = (following.square() + error * norm).sqrt()
    ceiling = torch.where(fallen, following + error, blurred)
    ceiling = torch.where(count >= w.shape[-2], torch.zeros_like(ceiling), ceiling)
    residual, angle = residual_and_angle(w, short, long, kept, count, ceiling, left, error)
    rungs = tuple("svd-f64" if i in right else "gram-f64" for i in range(len(w)))
    return Triplets(short, long, kept, count, following, residual, angle, rungs)


def eigh_stack(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh of a stack [..., d, d], through CuPy's batched solver on a GPU.

    torch loops over the matrices on a GPU; CuPy, where it is installed, hands the stack to
    cuSOLVER as one. Both read the lower triangle.
    """
    if symmetric.is_cuda and symmetric.ndim > 2 and len(symmetric) > 1:
        try:
            import cupy
        except ImportError:
            pass
        else:
            stream = torch.cuda.current_stream(symmetric.device).cuda_stream
            with cupy.cuda.Device(symmetric.device.index), cupy.cuda.ExternalStream(stream):
                found = cupy.linalg.eigh(cupy.from_dlpack(symmetric.contiguous()), UPLO="L")
                values, vectors = (to_tensor(x) for x in found)
            return values, vectors
    values, vectors = torch.linalg.eigh(symmetric)
    return values, vectors


def _count_columns(s: Tensor, rank: Rank, shape: torch.Size) -> Tensor:
    """How many columns the rule asks for, at most the numerical rank: int64 [b]."""
    numerical = (s > max(shape) * EPS * s[:, :1]).sum(-1)
    return torch.minimum(count_columns(s, rank), numerical)
