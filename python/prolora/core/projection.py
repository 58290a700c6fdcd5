"""Projection of the update of one weight onto the subspaces of another (arXiv 2506.04244).

A method that projects is a sum of one-sided maps, so it acts on the thin factors:
ΔW_t = Σ_i L_i(up) · R_i(down), where L_i and R_i are products of projectors of the source and of
the target (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import recompression
from .arrays import Array, MatrixLike, SupportsDLPack
from .basis import Basis, stack_bases, truncated_svd
from .exceptions import ShapeMismatch, UnsupportedTensor
from .inputs import Update, check_related, read_pair, read_weights
from .lowrank import LowRank
from .methods import METHODS, Method, MethodLike, Parts, Side, find_method
from .precision import in_full_precision, working_dtype
from .projection_info import Grams, ProjectionInfo, measure_projection
from .projectors import AnyBasis, Projector, Projectors, find_projectors
from .rank_rule import Rank, read_rank
from .subspaces import Similarity
from .svd.stacks import is_on_host
from .validation import refuse_vmap
from .verdict import AUTO

DEFAULT_RANK: Rank = 0.99
"""The default number of columns: as many as hold 99 % of a weight's energy Σσ².

The paper does not say how it chooses k. A share of the energy means the same at every width; a
fixed k = 320 is the whole space of a layer of width 320 and a tenth of one of width 3072. Of the
rules in docs/evidence.md this one recovers most, because it discards least.
"""

# Singular values of a moved update below this share of the largest one are rounding errors.
ROUNDING = 1e-6

Factors = LowRank | tuple[Tensor, Tensor] | list[Tensor]


@overload
def project(
    delta: Factors,
    W_src: MatrixLike | Basis,
    W_tgt: MatrixLike | Basis,
    *,
    rank: Rank = ...,
    method: MethodLike = ...,
    return_info: Literal[False] = ...,
) -> LowRank: ...


@overload
def project(
    delta: tuple[Array, Array],
    W_src: MatrixLike | Basis,
    W_tgt: MatrixLike | Basis,
    *,
    rank: Rank = ...,
    method: MethodLike = ...,
    return_info: Literal[False] = ...,
) -> tuple[Array, Array]: ...


@overload
def project(
    delta: Array,
    W_src: MatrixLike | Basis,
    W_tgt: MatrixLike | Basis,
    *,
    rank: Rank = ...,
    method: MethodLike = ...,
    return_info: Literal[False] = ...,
) -> Array: ...


@overload
def project(
    delta: Any,
    W_src: MatrixLike | Basis,
    W_tgt: MatrixLike | Basis,
    *,
    rank: Rank = ...,
    method: MethodLike = ...,
    return_info: Literal[True],
) -> tuple[Any, ProjectionInfo]: ...


@refuse_vmap("project")
@in_full_precision
def project(
    delta: MatrixLike | LowRank | Sequence[MatrixLike],
    W_src: MatrixLike | Basis,
    W_tgt: MatrixLike | Basis,
    *,
    rank: Rank = DEFAULT_RANK,
    method: MethodLike = "prolora",
    return_info: bool = False,
) -> SupportsDLPack | LowRank | tuple[Any, Any]:
    """Moves the update of one weight to another weight of the same shape.

    With `method="prolora"` (arXiv 2506.04244, eq. 1-3): ΔW_t = P_t P_s ΔW Q_s Q_t + P_t⊥ P_s⊥ ΔW
    Q_s⊥ Q_t⊥, where P = UUᵀ and Q = VVᵀ project onto the leading singular subspaces of the source
    (s) and of the target (t), and ⊥ onto their complements. `method="copy"` returns the update as
    it is; `method="auto"` does, too, but only if the two weights are related.

        moved = project((up, down), W_src, W_tgt)   # the factors of a LoRA, up times alpha / rank
        moved.up, moved.down                        # the factors of the result, rank ≤ 2r

    Args:
        delta: the update of the source weight, scale included. An array [m, n] or a stack [b, m,
            n]; one convolution with four or five axes, [out, in, …], treated as [out, in · …]; a
            LowRank; a pair (up [..., m, r], down [..., r, n]); or the pair of a convolution, (up
            [out, r, 1, …], down [r, in, …]). Arrays are those of torch, numpy, cupy or jax. If r =
            m = n, the order of a pair cannot be checked. Three axes are a stack: flatten the update
            of a Conv1d to [out, in · k]. A transposed convolution has [in, out, …]: give
            `delta.transpose(0, 1)`, and the weights likewise. The scale of a LoRA is alpha / rank;
            multiply `up` by it.
        W_src: the source weight, with delta's shape, or its Basis. For a stack, [m, n] is one
            weight with several updates.
        W_tgt: the target weight, likewise.
        rank: number of columns (int) of the subspaces, or the share of the energy Σσ² that they
            contain (float in (0, 1)); 0.99 by default. Ignored for a Basis.
        method: a name of `METHODS`; or "auto", which copies the update if the two weights are
            related (in a stack: all pairs taken together) and raises UnrelatedBases otherwise; or a
            `Method`; or a function (LowRank, W_src, W_tgt) -> (up, down).
        return_info: return (result, `ProjectionInfo`). The info describes the update in the
            subspaces of both weights, so these are computed for any method; its `shape` says how
            the axes of delta were read. Not available for a function or for a `Method` with one.

    Returns:
        The update of the target weight in the form of delta: dense, or factors of rank 2r at most.
        Factors are a LowRank; for other arrays than torch's, and for a convolution, a pair (up,
        down). The dtype and the device are delta's. The computation is in float32 or float64;
        rounding the result to float16 adds an error of about 2e-4. Inputs are not changed.

    Raises:
        ShapeMismatch: the shapes of delta, W_src and W_tgt do not match. A transposed square weight
            cannot be detected.
        NonFiniteWeights: NaN or Inf in one of them.
        UnsupportedTensor, UnsupportedDevice: a tensor that is sparse, complex, without data or not
            of floating point, or on a device other than cpu and cuda.
        UnrelatedBases: the method is "auto" and the weights are not related.
        ValueError: unknown method, invalid rank, or "auto" with a Basis.
        NoDerivative: a weight is part of an autograd graph or has a tangent. A leaf, for example
            the weight of a module, is detached: it gets no gradient. Derivatives with respect to
            delta are correct.
    """
    rank = read_rank(rank)
    chosen = find_method("copy" if method == AUTO else method)
    if chosen.rule and return_info:
        raise ValueError(f"`return_info` describes the methods of METHODS, not {chosen.name}")
    update = Update.read(delta)
    weights = read_weights(W_src, W_tgt, update.value)
    if method == AUTO:
        check_related(*weights)
    if not (return_info or chosen.needs_bases):
        return update.restore(move_without_bases(update.matrix, chosen, weights))
    # A row space refers to the weights, and stays on their device.
    explicit = return_info or update.value.device.type != "cpu"
    bases = find_bases(weights, rank, update.matrix.shape, explicit=explicit)
    if not return_info:
        return update.restore(move_by_bases(update.matrix, chosen, *bases))
    moved, info = _move_and_measure(update.matrix, chosen, *bases)
    return update.restore(moved), info


def find_bases(
    weights: tuple[Tensor | Basis, Tensor | Basis], rank: Rank, shape: torch.Size, explicit: bool
) -> tuple[AnyBasis, AnyBasis]:
    """Computes the subspaces of both weights, for an update of shape [m, n] or [b, m, n].

    Returns:
        Two bases for weights on a GPU or if both are a Basis already, else two stacks of
        projectors, of one matrix for [m, n]. `explicit` as in `find_projectors`.
    """
    b = shape[:-2].numel()
    given = [w for w in weights if isinstance(w, Basis)]
    tensors = [w for w in weights if isinstance(w, Tensor)]
    if len(given) == 2 or any(not is_on_host(w) for w in tensors):
        bases = [w if isinstance(w, Basis) else truncated_svd(w, rank) for w in weights]
        if len(bases[0].shape) != len(bases[1].shape):  # one weight and a stack
            bases = [x if len(x.shape) == 3 else stack_bases([x] * b) for x in bases]
        return bases[0], bases[1]
    computed = find_projectors(
        [w.reshape(-1, *w.shape[-2:]) for w in tensors], rank, explicit=explicit
    )
    pair = [Projectors.of_basis(w) if isinstance(w, Basis) else computed.pop(0) for w in weights]
    return pair[0].expand(b), pair[1].expand(b)


def move_by_bases(
    update: Tensor | LowRank, method: Method, source: AnyBasis, target: AnyBasis
) -> Tensor | LowRank:
    """Moves an update [m, n] or a stack [b, m, n] by the subspaces of `find_bases`."""
    if method is METHODS["prolora"] and isinstance(source, Projectors):
        assert isinstance(target, Projectors)
        return _move_by_projectors(update, source, target)
    factors = update if isinstance(update, LowRank) else _identity_factors(update)
    up, down = (method.split(side) for side in _split_sides(factors, source, target))
    return _join(update, up, down)


def _move_and_measure(
    update: Tensor | LowRank, method: Method, source: AnyBasis, target: AnyBasis
) -> tuple[Tensor | LowRank, ProjectionInfo]:
    factors = update if isinstance(update, LowRank) else _identity_factors(update)
    sides = _split_sides(factors, source, target)
    up, down = (method.split(side) for side in sides)
    grams = Grams.of(sides[0], up), Grams.of(sides[1], down)
    info = measure_projection(sides, grams, (source, target))
    is_stack_of_one = up[0].ndim > len(update.shape)
    return _join(update, up, down), info.squeeze() if is_stack_of_one else info


def move_without_bases(
    update: Tensor | LowRank, method: Method, weights: tuple[Tensor | Basis, Tensor | Basis]
) -> Tensor | LowRank:
    """Copies an update, or applies the function of a method to it."""
    if method.rule is None:
        return (
            update.clone() if isinstance(update, Tensor) else LowRank(*(x.clone() for x in update))
        )
    factors = update if isinstance(update, LowRank) else _identity_factors(update)
    moved = apply_rule(method, factors, *weights)
    return moved if isinstance(update, LowRank) else moved.up @ moved.down


def _join(update: Tensor | LowRank, up: Parts, down: Parts) -> Tensor | LowRank:
    """Joins the parts of both factors to an update of the form and shape of `update`."""
    if up[0].ndim > len(update.shape):  # projectors are stacks, for a single weight too
        up, down = (tuple(part.squeeze(0) for part in parts) for parts in (up, down))
    return (_join_parts if isinstance(update, LowRank) else _multiply_parts)(up, down)


def apply_rule(method: Method, delta: LowRank, source: Any, target: Any) -> LowRank:
    """Calls the function of a method; the result has the dtype and device of `delta`.

    Raises:
        ShapeMismatch: the returned factors have another shape.
        UnsupportedTensor: the function did not return a pair.
    """
    assert method.rule is not None
    returned: Any = method.rule(delta, source, target)
    if isinstance(returned, Tensor):
        raise UnsupportedTensor(f"{method.name} returned one array; return factors, (up, down)")
    if not isinstance(returned, Iterable):
        raise UnsupportedTensor(f"{method.name} returned {returned!r:.80}, not (up, down)")
    moved, _ = read_pair([*returned], f"what {method.name} returned")
    moved = moved.to(delta.dtype).to(delta.device)
    if moved.shape != delta.shape:
        raise ShapeMismatch(f"{method.name} returned {list(moved.shape)}, not {list(delta.shape)}")
    return moved


@in_full_precision
def project_factors(
    delta: LowRank,
    source: AnyBasis,
    target: AnyBasis,
    method: str | Method,
    similar: Similarity | None = None,
) -> Projected:
    """Projects factors by existing bases and measures what was kept.

    The cost is about 12(m + n)kr flops per matrix; no matrix [m, n] is formed.

    Args:
        delta: factors [..., m, r] and [..., r, n]; or l updates of every weight, [..., l, m, r] and
            [..., l, r, n].
        source: bases of the source weights.
        target: bases of the target weights, of the same shape.
        method: one that needs bases.
        similar: the overlap of the two bases if it is known, which saves 2(m + n)k² flops.
    """
    sides = _split_sides(delta, source, target)
    up, down = (find_method(method).split(side) for side in sides)
    grams = Grams.of(sides[0], up), Grams.of(sides[1], down)
    info = measure_projection(sides, grams, (source, target), similar)
    return Projected(up, down, *grams, info, delta.dtype)


def _split_sides(delta: LowRank, source: AnyBasis, target: AnyBasis) -> tuple[Side, Side]:
    """Splits the rows of both factors by the subspaces of both weights."""
    work = working_dtype(delta.dtype)
    source, target = source.to(work).to(delta.device), target.to(work).to(delta.device)
    up, down = delta.up.to(work).mT, delta.down.to(work)  # rows of m, rows of n
    if isinstance(source, Basis) and isinstance(target, Basis):
        return Side.of(up, source.U, target.U), Side.of(down, source.V, target.V)
    assert isinstance(source, Projectors) and isinstance(target, Projectors)
    if up.ndim == 2:
        up, down = up[None], down[None]
    left = Side.by_projectors(up, source.left, target.left)
    return left, Side.by_projectors(down, source.right, target.right)


def _move_by_projectors(
    update: Tensor | LowRank, source: Projectors, target: Projectors
) -> Tensor | LowRank:
    """Moves an update [..., m, n] by eq. 1-3 of the paper; errors are relative to its norm."""
    if len(update.shape) == 2:
        stack = update[None] if isinstance(update, Tensor) else LowRank(*(x[None] for x in update))
        moved = _move_by_projectors(stack, source, target)
        return moved[0] if isinstance(moved, Tensor) else LowRank(moved.up[0], moved.down[0])
    work = working_dtype(update.dtype)
    update = update.to(work)
    source, target = (side.to(work).to(update.device) for side in (source, target))
    if isinstance(update, LowRank):
        up = _move_rows(update.up.mT, source.left, target.left)
        down = _move_rows(update.down, source.right, target.right)
        return _join_parts(up, down)
    within, without = _move_rows(update.mT, source.left, target.left)
    within, without = within.mT, without.mT
    within = target.right.inside(source.right.inside(within))
    without = without - source.right.inside(without)
    return within + (without - target.right.inside(without))


def _move_rows(x: Tensor, source: Projector, target: Projector) -> tuple[Tensor, Tensor]:
    """Returns rows x [b, r, m] from range to range, and from complement to complement."""
    inside = source.inside(x)
    outside = x - inside
    return target.inside(inside), outside - target.inside(outside)


@dataclass(frozen=True)
class Projected:
    """Moved updates, as the orthogonal parts of their factors."""

    up: Parts  # the parts as rows, [..., r, m]; mutually orthogonal
    down: Parts  # the parts as rows, [..., r, n]; mutually orthogonal
    left: Grams  # inner products of `up`
    right: Grams  # inner products of `down`
    info: ProjectionInfo
    dtype: torch.dtype  # of the given updates

    def joined(self) -> LowRank:
        """Joins the parts to [..., m, R] and [..., R, n].

        R is r times the number of parts.
        """
        return _join_parts(self.up, self.down).to(self.dtype)

    @in_full_precision
    def recompressed(self) -> list[LowRank]:
        """Returns the updates of a stack, flattened, at the smallest exact rank.

        One LowRank per matrix, with descending singular values and balanced factors.
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
        keep = (s > ROUNDING * s.amax(-1, keepdim=True)).sum(-1).clamp_min(1).tolist()
        chosen = [places[:k] for places, k in zip(order, keep, strict=True)]
        return [
            LowRank(u[i].to(self.dtype).mT.contiguous(), d[i].to(self.dtype))
            for u, d, i in zip(up, down, chosen, strict=True)
        ]


def _join_parts(up: Parts, down: Parts) -> LowRank:
    """Joins parts side by side, [..., m, R] and [..., R, n]."""
    return LowRank(torch.cat(up, -2).mT, torch.cat(down, -2))


def _multiply_parts(up: Parts, down: Parts) -> Tensor:
    """Sums the parts' products, [..., m, n]."""
    products = [u.mT @ d for u, d in zip(up, down, strict=True)]
    return sum(products[1:], products[0])


def _identity_factors(update: Tensor) -> LowRank:
    """Writes a dense update as X · I or I · X, with the smaller identity."""
    x = update.to(working_dtype(update.dtype))
    m, n = x.shape[-2:]
    eye = torch.eye(min(m, n), dtype=x.dtype, device=x.device).expand(*x.shape[:-2], -1, -1)
    return LowRank(eye, x) if m < n else LowRank(x, eye)
