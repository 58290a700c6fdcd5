"""ProLoRA itself on tensors: an update of one weight becomes the update of another.

A method that projects is a pair of one-sided maps, so it acts on the thin factors alone:
ΔW_t = Σ_i L_i(up) · R_i(down), where L_i and R_i chain the projectors of source and target
(docs/method.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import recompression
from .affinity import Affinity
from .arrays import Array, MatrixLike, find_other_array, to_kind_of, to_tensor
from .basis import CONVOLUTION, Basis, stack_bases, truncated_svd
from .exceptions import NonFiniteWeights, ShapeMismatch, UnrelatedBases, UnsupportedTensor
from .lowrank import LowRank
from .methods import METHODS, Method, MethodLike, Parts, Side, find_method
from .precision import in_full_precision, is_finite, working_dtype
from .projection_info import Grams, ProjectionInfo, measure_projection
from .projectors import AnyBasis, Projector, Projectors, find_projectors
from .rank_rule import Rank, read_rank
from .similarity import Similarity
from .svd.stacks import is_on_host
from .validation import check_operand, refuse_vmap, without_gradient
from .verdict import AUTO, judge_pairs

DEFAULT_RANK: Rank = 0.99
"""The rank rule where the caller gives none: the columns that hold 99 % of a weight's energy.

The paper does not say how it chooses k. A share of energy means the same at every width, where a
fixed k = 320 is the whole space of a 320-wide layer and a tenth of a 3072-wide one; of the rules
tried in docs/evidence.md this one recovers most, since it drops least.
"""

# Singular values of a moved update below this share of its largest are rounding.
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
    delta: Any,
    W_src: MatrixLike | Basis,
    W_tgt: MatrixLike | Basis,
    *,
    rank: Rank = DEFAULT_RANK,
    method: MethodLike = "prolora",
    return_info: bool = False,
) -> Any:
    """Moves the update of one weight to another weight of the same shape.

    With `method="prolora"` (arXiv 2506.04244, eq. 1-3): ΔW_t = P_t P_s ΔW Q_s Q_t + P_t⊥ P_s⊥ ΔW
    Q_s⊥ Q_t⊥, where P = UUᵀ, Q = VVᵀ of the leading singular subspaces and ⊥ their complements.
    `METHODS` describes the other methods.

    Args:
        delta: the update of the source, scale included: an array [m, n]; a stack [b, m, n]; one
            convolution of four or five axes, [out, in, …], treated as out × rest; a LowRank, or a
            pair (up [..., m, r], down [..., r, n]), whose order is not checked where r = m = n; the
            pair of a convolution, (up [out, r, 1, …], down [r, in, …]). Flatten a Conv1d's update.
            torch, numpy, cupy and jax arrays.
        W_src: the source weight, of delta's shape, or its Basis; [m, n] for a stack too.
        W_tgt: the target weight, likewise.
        rank: columns of the subspaces (int), or the share of energy they hold (float in (0, 1));
            ignored for a Basis.
        method: a name of `METHODS`, or "auto": "copy", and a refusal where the two weights (of a
            stack, all of its matrices together) have nothing in common; or a `Method` or a function
            of your own, called with a LowRank, W_src and W_tgt, that returns (up, down).
        return_info: also return a `ProjectionInfo`. It describes the update in the bases of both
            weights, so they are factorised for it, whatever the method needs. A function of your
            own, or a `Method` with one, has none.

    Returns:
        The update of the target as delta came: dense or factors (rank ≤ 2r), a LowRank for torch's
        and a pair for other arrays and for a convolution. In delta's dtype and on its device,
        computed in float32 or better. Inputs are not changed.

    Raises:
        ShapeMismatch: delta, W_src and W_tgt do not have one shape.
        NonFiniteWeights: NaN or Inf in any of them.
        UnsupportedTensor, UnsupportedDevice: a tensor that is sparse, complex, without data, not of
            floating point, or on a device other than cpu and cuda.
        UnrelatedBases: method "auto", and the weights have nothing in common.
        ValueError: an unknown method, a rank that makes no sense, or "auto" with a Basis.
        NoDerivative: a weight was computed from what requires a gradient, or has a tangent. A leaf
            is detached, as a module's weight may be: it gets no gradient. Derivatives with respect
            to delta are right.
    """
    rank = read_rank(rank)
    chosen = find_method("copy" if method == AUTO else method)
    if chosen.rule and return_info:
        raise ValueError(f"`return_info` describes the methods of METHODS, not {chosen.name}")
    foreign, kernel = None, tuple[int, ...]()
    if isinstance(delta, tuple | list):
        foreign = find_other_array(delta)
        delta, kernel = _read_pair(delta)
    update = delta if isinstance(delta, LowRank) else to_tensor(delta, "delta")
    _check_update(update)
    weights = _read_weights(W_src, W_tgt, update)
    if method == AUTO:
        _check_related(*weights)
    if isinstance(update, Tensor) and not (return_info or chosen.needs_bases or chosen.rule):
        return to_kind_of(update.clone(), delta)
    moved, info = _move(update, chosen, weights, rank, return_info)
    result: Any
    if isinstance(moved, LowRank):
        result = moved.to(update.dtype)
        if kernel:
            ones = [1] * (len(kernel) - 1)
            result = result.up.unflatten(-1, [-1, *ones]), result.down.unflatten(-1, kernel)
        if foreign is not None:
            result = tuple(to_kind_of(factor, foreign) for factor in result)
    else:
        result = to_kind_of(moved.to(update.dtype).reshape(update.shape), delta)
    return (result, info) if return_info else result


def _move(
    update: Tensor | LowRank,
    method: Method,
    weights: tuple[Tensor | Basis, Tensor | Basis],
    rank: Rank,
    measure: bool,
) -> tuple[Tensor | LowRank, ProjectionInfo | None]:
    """Returns the moved update as it came, dense or factors, with its account if `measure`."""
    flat = update
    if isinstance(flat, Tensor) and flat.ndim in CONVOLUTION:
        flat = flat.flatten(1)
    if not (measure or method.needs_bases):
        factors = flat if isinstance(flat, LowRank) else _identity_factors(flat)
        moved = apply_rule(method, factors, *weights) if method.rule else factors
        parts = (moved.up.mT,), (moved.down,)
        return (_join_parts if isinstance(flat, LowRank) else _multiply_parts)(*parts), None
    # A row space refers to the weights, and stays on their device.
    explicit = measure or flat.device.type != "cpu"
    source, target = _find_bases(weights, rank, flat.shape, explicit=explicit)
    if method is METHODS["prolora"] and not measure:
        if isinstance(source, Projectors) and isinstance(target, Projectors):
            return _move_by_projectors(flat, source, target), None
    factors = flat if isinstance(flat, LowRank) else _identity_factors(flat)
    sides = _split_sides(factors, source, target)
    up, down = (method.split(side) for side in sides)
    info = None
    if measure:
        grams = Grams.of(sides[0], up), Grams.of(sides[1], down)
        info = measure_projection(sides, grams, (source, target))
    if up[0].ndim > len(flat.shape):  # projectors are of stacks, also for one weight
        up, down = (tuple(part.squeeze(0) for part in parts) for parts in (up, down))
        info = info.squeeze() if info else None
    join = _join_parts if isinstance(flat, LowRank) else _multiply_parts
    return join(up, down), info


def _find_bases(
    weights: tuple[Tensor | Basis, Tensor | Basis], rank: Rank, shape: torch.Size, explicit: bool
) -> tuple[AnyBasis, AnyBasis]:
    """Returns both weights as bases or projectors, for an update of shape [m, n] or [b, m, n].

    On a GPU they are bases, on a CPU projectors of stacks. Two bases stay what they are.
    """
    b = shape[:-2].numel()
    given = [w for w in weights if isinstance(w, Basis)]
    tensors = [w for w in weights if isinstance(w, Tensor)]
    if len(given) == 2 or any(not is_on_host(w) for w in tensors):
        bases = [w if isinstance(w, Basis) else truncated_svd(w, rank) for w in weights]
        if len(bases[0].shape) != len(bases[1].shape):  # one weight and a stack of them
            bases = [x if len(x.shape) == 3 else stack_bases([x] * b) for x in bases]
        return bases[0], bases[1]
    found = find_projectors(
        [w.reshape(-1, *w.shape[-2:]) for w in tensors], rank, explicit=explicit
    )
    pair = [Projectors.of_basis(w) if isinstance(w, Basis) else found.pop(0) for w in weights]
    return pair[0].expand(b), pair[1].expand(b)


def apply_rule(method: Method, delta: LowRank, source: Any, target: Any) -> LowRank:
    """Applies a rule to an update; the result has its dtype and device.

    Raises:
        ShapeMismatch: it has another shape.
        UnsupportedTensor: it is no pair.
    """
    assert method.rule is not None
    returned: Any = method.rule(delta, source, target)
    if isinstance(returned, Tensor):
        raise UnsupportedTensor(f"{method.name} returned one array; return factors, (up, down)")
    if not isinstance(returned, Iterable):
        raise UnsupportedTensor(f"{method.name} returned {returned!r:.80}, not (up, down)")
    moved, _ = _read_pair([*returned], f"what {method.name} returned")
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
    """Runs `project` for factors and existing bases, with its account.

    The factors are [..., m, r] and [..., r, n]. Several updates of every weight may go at once,
    [..., l, m, r] and [..., l, r, n].

    Nothing of size m×n is formed: flops ≈ 12(m + n)kr per matrix. The overlap of the two bases, 2(m
    + n)k² flops, may be known already: `similar`.
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
    """Moved updates as parts of their factors, with an account."""

    up: Parts  # the parts as rows, [..., r, m]; mutually orthogonal
    down: Parts  # the parts as rows, [..., r, n]; mutually orthogonal
    left: Grams  # inner products of `up`
    right: Grams  # inner products of `down`
    info: ProjectionInfo  # what was kept and lost
    dtype: torch.dtype  # of the updates that came in

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
    """Factors a dense update with an identity, in the dtype to work in."""
    flat = update.flatten(1) if update.ndim in CONVOLUTION else update
    x = flat.to(working_dtype(flat.dtype))
    m, n = x.shape[-2:]
    eye = torch.eye(min(m, n), dtype=x.dtype, device=x.device).expand(*x.shape[:-2], -1, -1)
    return LowRank(eye, x) if m < n else LowRank(x, eye)


def _read_weights(
    W_src: Any, W_tgt: Any, update: Tensor | LowRank
) -> tuple[Tensor | Basis, Tensor | Basis]:
    """Reads both weights as matrices or stacks [..., m, n] of the update's shape."""
    shape = update.shape
    source, target = (
        w if isinstance(w, Basis) else _read_operand(w, name)
        for name, w in (("W_src", W_src), ("W_tgt", W_tgt))
    )
    if len(shape) == 2 and source.shape != target.shape and len(source.shape) in CONVOLUTION:
        raise ShapeMismatch(f"W_src is {list(source.shape)} but W_tgt {list(target.shape)}")
    if isinstance(update, LowRank) and shape[-2:] != source.shape[-2:]:
        if source.shape[-2:] == (update.down.shape[-2], update.up.shape[-1]):
            raise ShapeMismatch("up @ down is not of W_src's shape; are they in the other order?")
    return _read_weight(source, shape, "W_src"), _read_weight(target, shape, "W_tgt")


def _read_operand(weight: MatrixLike, name: str) -> Tensor:
    tensor = to_tensor(weight, name)
    check_operand(name, tensor)
    return without_gradient("project", name, tensor)


def _read_weight(weight: Tensor | Basis, shape: torch.Size, name: str) -> Tensor | Basis:
    """Reads a weight, a convolution flattened, if it has the update's shape."""
    conv = len(shape) in CONVOLUTION
    given = weight.shape
    if len(shape) == 3 and len(given) == 2:  # of one weight
        shape = torch.Size(shape[1:])
    if len(shape) == len(given) == 3 and shape[0] != given[0] and shape[1:] == given[1:]:
        raise ShapeMismatch(f"{name}: {shape[0]} updates but {given[0]} weights; give as many")
    if isinstance(weight, Basis):
        flat = torch.Size((shape[0], shape[1:].numel())) if conv else shape
        if weight.shape != flat:
            raise ShapeMismatch(f"{name} is a basis of {list(weight.shape)}, delta {list(shape)}")
        return weight
    if weight.ndim in CONVOLUTION and len(shape) == 2:  # factors of a convolution
        weight = weight.flatten(1)
    if weight.shape != shape:
        raise ShapeMismatch(
            f"{name} is {list(weight.shape)} but delta {list(shape)}: no published data-free "
            "method maps between different shapes"
        )
    _refuse_non_finite(name, weight)
    return weight.flatten(1) if conv else weight


def _check_related(source: Tensor | Basis, target: Tensor | Basis) -> None:
    """Refuses weights [..., m, n] that have nothing in common.

    Raises:
        UnrelatedBases: they have nothing in common.
        ValueError: one is a Basis.
    """
    if isinstance(source, Basis) or isinstance(target, Basis):
        raise ValueError(f"method {AUTO!r} needs the weights themselves, not their Basis")
    sides = [w.reshape(-1, *w.shape[-2:]) for w in (source, target.to(source.device))]
    if len({len(side) for side in sides}) > 1:  # one weight against a stack
        sides = torch.broadcast_tensors(*sides)
    if not len(sides[0]):
        return
    verdict = judge_pairs(Affinity.of(*pair) for pair in zip(*sides, strict=True))
    if not verdict.related:
        raise UnrelatedBases(f"{verdict.sentence()} method='copy' copies it anyway")


def _read_pair(factors: Sequence[Any], name: str = "delta") -> tuple[LowRank, tuple[int, ...]]:
    """Reads a pair (up, down), and the axes [in, …] of a convolution, flattened."""
    tensors = [to_tensor(factor, f"factor {i} of {name}") for i, factor in enumerate(factors)]
    if len(tensors) != 2:
        raise ShapeMismatch(f"{name} is a pair (up, down), not {len(tensors)} arrays")
    up, down = tensors
    if up.ndim == down.ndim and up.ndim in CONVOLUTION and {*up.shape[2:]} == {1}:
        return LowRank(up.flatten(1), down.flatten(1)), tuple(down.shape[1:])
    return LowRank(up, down), ()


def _check_update(update: Tensor | LowRank) -> None:
    tensors = (
        {"delta": update}
        if isinstance(update, Tensor)
        else {"delta.up": update.up, "delta.down": update.down}
    )
    for name, tensor in tensors.items():
        check_operand(name, tensor)
        if tensor.ndim < 2:
            raise ShapeMismatch(
                f"{name} is {list(tensor.shape)}, and a bias has no singular subspaces; copy it"
            )
        _refuse_non_finite(name, tensor)


def _refuse_non_finite(name: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise NonFiniteWeights(f"NaN or Inf in {name}")
