"""Constants that decide how long a factorisation takes, and no bound."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """Sizes and shares from which on a solver is faster.

    bench/svd_table.py chose the constants for a CPU, one at a time, and bench/gpu_model.py those
    for a GPU, not a card. A wrong one costs time: a bound holds for any.
    """

    # The solver gram-f32: below so many rows the eigensolver in float64 costs no more than the
    # repair of float32.
    gram_rows: int = 384
    # How many vectors on each side of the cut are repaired in float64: an eighth of those kept,
    # between these limits, and more where the values lie close together: so many, or one for so
    # many rows.
    least_guard: int = 16
    usual_guard: int = 32
    most_guard: int = 128
    rows_per_guard: int = 12

    # Own eigensolver: beyond this share of the vectors a dense solver takes no longer.
    eigensolver_share: float = 0.75

    # Leading pairs: the width of a block, the blocks after which the spectrum is judged, and how
    # many are spent at most: so many, or one for so many rows.
    head_width: int = 16
    head_first_blocks: int = 3
    head_most_blocks: int = 8
    rows_per_head_block: int = 128

    # Krylov pays where few columns of a large matrix are wanted: k ≤ d/8.
    krylov_rows: int = 768
    krylov_share: int = 8
    # A basis beyond this share of the space costs more than factorising it.
    largest_basis: float = 0.6
    # A basis of about this many times k is needed; from the first on it pays to look.
    usual_basis: int = 4
    first_look: float = 3.25
    # By so much the logarithm of the angle falls as the basis grows by k.
    usual_slope: float = 6.0
    # From this look at convergence on, the distance to the next one doubles.
    early_looks: int = 3
    # The refinement reduces the estimated error of the iteration by about this factor. The second
    # value is used on a GPU, where no card has measured the first.
    refinement_gain: int = 12
    refinement_gain_gpu: int = 40
    # A matrix of so many bytes stays in a CPU's cache between products.
    cached_bytes: int = 16 << 20
    # A product with a narrow block takes this much longer a flop than one with a whole matrix.
    narrow_cost: float = 1.3
    # A basis of about this many columns shows the first eigenvalue. Below so many times the mean
    # one the spectrum is flat, and a few columns converge no sooner than all; above so many times
    # the mean of the rest, it is taken out first.
    first_size: int = 48
    flat_ratio: float = 5.0
    outlier_ratio: float = 5e4

    # Matrices are worked on together up to this many bytes in float64: on a CPU, and on a GPU up
    # to this share of its memory, but at least and at most so much, and never more than this share
    # of what is free. By halves, so that the same call takes the same stacks (and so gives the
    # same bits) until memory is scarce. The eigensolver's time is linear in the number of matrices
    # from a few on: twice as much saves 5 % at most, half as much costs 12 %.
    cpu_stack_bytes: int = 2 << 20
    gpu_share_of_total: float = 1 / 4
    gpu_least_bytes: int = 1 << 30
    gpu_most_bytes: int = 8 << 30
    gpu_share_of_free: float = 1 / 2


TUNING = Tuning()
