"""Leading triplets that hold a share of the energy, if a few columns of a large weight do.

A Krylov iteration needs the number of columns. It is estimated first, then counted among the values
of a slightly larger run.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .krylov import krylov_triplets, suits_krylov
from .solvers import random_probes
from .triplets import Triplets
from .tuning import TUNING

# Fewer rows are reduced as fast as a Krylov iteration converges.
LEAST_ROWS = 1024
# Columns of the sketch that the number is guessed from: 1 % of the time of a dense solver. If they
# hold less than this share of the energy, many more are needed.
SKETCH, SKETCH_SHARE = 32, 0.82
# Sums of the energy closer to the share than this are not certain in float32.
TIE = 1e-6


def energy_triplets(
    w: Tensor, norm: Tensor, share: float, tol: float, seed: int
) -> Triplets | None:
    """Computes the fewest leading triplets of one matrix that hold a share of the energy.

    w: [1, d, n], float32, d ≤ n, on a CPU; norm: [1], ‖w‖_F. None if many columns are needed, or if
    the result is not proven to `tol`.
    """
    d = w.shape[1]
    if d < LEAST_ROWS or not float(norm[0]) > 0:
        return None
    guess = guess_columns(w, float(norm[0]) ** 2, share)
    if guess is None:
        return None
    for k in (guess + guess // 8 + 4, 2 * guess + 4):
        if not suits_krylov(k, d):
            return None
        parts = krylov_triplets(w, norm, k, tol, seed)
        if not parts:
            return None
        held = parts[0][1].s[0].square().cumsum(0) / norm[0].square()
        count = int((held < share).sum()) + 1
        if count > k:
            continue
        if bool(((held - share).abs() < TIE).any()):
            return None
        if count < k:
            parts = krylov_triplets(w, norm, count, tol, seed)
        return parts[0][1] if parts else None
    return None


def guess_columns(w: Tensor, energy: float, share: float) -> int | None:
    """Guesses how many leading triplets of one matrix hold a share of ‖w‖² = `energy`.

    From the largest values in the span of a few random images of wwᵀ, which are continued by a
    power law. None if these few hold too little. A wrong guess costs time.

    w: [1, d, n].
    """
    matrix = w[0]
    probes = random_probes(w.shape[1], SKETCH, w.dtype, w.device)
    basis = torch.linalg.qr(matrix @ (matrix.mT @ probes))[0]
    values = torch.linalg.svdvals((basis.mT @ matrix).double()).square().tolist()
    if sum(values) < SKETCH_SHARE * energy:
        return None
    first, last = SKETCH // 8, SKETCH // 2  # the later ones are too small in a sketch
    fall = math.log(max(values[last], 1e-300) / max(values[first], 1e-300))
    power = fall / math.log(last / first)
    rest, k = energy, 0
    while rest > (1 - share) * energy and k * TUNING.krylov_share < w.shape[1]:
        rest -= values[k] if k < last else values[last] * (k / last) ** power
        k += 1
    return k
