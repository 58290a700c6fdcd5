"""Projection of many updates: grouped by shape, in chunks that fit into a given memory."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .basis import Basis, stack_bases
from .exceptions import ProLoRAError, TooLittleMemory
from .grouping import group_by
from .inputs import Update, check_related, read_weights
from .lowrank import LowRank
from .methods import MethodLike, find_method
from .precision import in_full_precision
from .projection import DEFAULT_RANK, find_bases, move_by_bases, move_without_bases
from .projectors import AnyBasis
from .rank_rule import Rank, read_rank
from .svd.stacks import chunk_size
from .validation import refuse_vmap
from .verdict import AUTO
from .working_memory import PER_COLUMN, bytes_of_factorisation

Item = TypeVar("Item")


@dataclass(frozen=True)
class Stack(Generic[Item]):
    """Pairs of weights of one shape, each with its update.

    Attributes:
        items: what identifies each pair, for example its name.
        updates: of each pair, [m, n].
        source: subspaces of the source weights, a stack [b, m, n] in the order of `items`.
        target: those of the target weights.
        columns: at most so many columns of factors are moved in one call, all items together.
    """

    items: Sequence[Item]
    updates: Sequence[Tensor | LowRank]
    source: AnyBasis
    target: AnyBasis
    columns: int | None = None


Move = Callable[[list[Item], "Tensor | LowRank", AnyBasis, AnyBasis], object]


def move_stacks(
    stacks: Iterable[Stack[Item]],
    move: Move[Item],
    progress: Callable[[int, Item], object] | None = None,
) -> None:
    """Moves the updates of several stacks; updates of one rank are moved in one call.

    `transfer` and `project_many` share this loop. They differ in where the subspaces come from
    (`stacks`) and in what they measure (`move`).

    Args:
        stacks: read one after the other, so that the subspaces of only one are in memory.
        move: called with some items of a stack, their updates [b, m, n] and their subspaces.
        progress: called after each stack with the number of items so far and the last item.
    """
    done = 0
    for stack in stacks:
        _move_stack(stack, move)
        done, last = done + len(stack.items), stack.items[-1]
        del stack  # before the next one is read
        if progress:
            progress(done, last)


def _move_stack(stack: Stack[Item], move: Move[Item]) -> None:
    for places in _group_equal_forms(stack.updates, stack.columns):
        updates = stack_updates([stack.updates[i] for i in places])
        source, target = stack.source.take(places), stack.target.take(places)
        move([stack.items[i] for i in places], updates, source, target)


def _group_equal_forms(
    updates: Sequence[Tensor | LowRank], columns: int | None
) -> Iterator[list[int]]:
    """Yields the indices of updates that can be stacked, about equally many in each group."""

    def form(i: int) -> tuple[Any, ...]:
        update = updates[i]
        rank = update.rank if isinstance(update, LowRank) else 0
        return rank, update.dtype, update.device

    for (rank, *_), alike in group_by(range(len(updates)), form).items():
        most = len(alike) if columns is None else max(1, columns // max(1, rank))
        groups = -(-len(alike) // most)
        size = -(-len(alike) // groups)
        for i in range(0, len(alike), size):
            yield alike[i : i + size]


def stack_updates(updates: Sequence[Tensor | LowRank]) -> Tensor | LowRank:
    """Stacks updates of one form, [m, n] each, to [b, m, n]."""
    if isinstance(updates[0], Tensor):
        return torch.stack([x for x in updates if isinstance(x, Tensor)])
    pairs = [x for x in updates if isinstance(x, LowRank)]
    return LowRank(torch.stack([x.up for x in pairs]), torch.stack([x.down for x in pairs]))


@refuse_vmap("project_many")
@in_full_precision
def project_many(
    deltas: Mapping[str, Any],
    W_srcs: Mapping[str, Any],
    W_tgts: Mapping[str, Any],
    *,
    rank: Rank = DEFAULT_RANK,
    method: MethodLike = "prolora",
    max_bytes: int | None = None,
) -> dict[str, Any]:
    """Moves many updates, for example all modules of a LoRA: `project` for each name, but faster.

    Weights of one shape are factorised together, and only as many as `max_bytes` allows.

        moved = project_many({"to_q": (up, down)}, source, target, max_bytes=2 << 30)

    `source` and `target` are dicts or lazy mappings; examples/by_hand.py reads them from two files.

    Args:
        deltas: name -> update, in any form that `project` accepts.
        W_srcs: name -> source weight, as in `project`. Names without an update are ignored. A lazy
            mapping (collections.abc.Mapping, or any class with keys() and [name]) is read with
            `W_srcs[name]` when the weight is needed, and the weight is released afterwards.
        W_tgts: name -> target weight, likewise.
        rank: as in `project`.
        method: as in `project`. "auto" decides for each name.
        max_bytes: bound on the memory that is used in addition to the largest pair of weights, the
            updates and the results. None sets no bound: as many pairs are in memory as there are
            threads, or 2 MB of small ones.

    Returns:
        name -> result, in the order of `deltas`. Each one is what `project` returns: the subspaces
        have the same number of columns, and before rounding to the dtype of the update the relative
        difference is at most 1e-5. The scale is in the factors: write them to a file without alpha,
        or with an alpha of their rank.

    Raises:
        KeyError: a name of `deltas` is missing in `W_srcs` or `W_tgts`. No weight has been read.
        TypeError: `W_srcs` or `W_tgts` has no keys().
        TooLittleMemory: `max_bytes` is too small for a pair. No weight has been read.
        ProLoRAError: an error of `project`, with the name in front.
    """
    rank = read_rank(rank)
    chosen = find_method("copy" if method == AUTO else method)
    _check_names(deltas, W_srcs, "W_srcs")
    _check_names(deltas, W_tgts, "W_tgts")
    updates: dict[str, Update] = {}
    for name, delta in deltas.items():
        with _name_in_errors(name):
            updates[name] = Update.read(delta)
    if max_bytes is not None and chosen.needs_bases:
        for name, update in updates.items():
            _check_memory(name, update.matrix, rank, max_bytes)

    def read_pair(name: str) -> Pair:
        with _name_in_errors(name):
            weights = read_weights(W_srcs[name], W_tgts[name], updates[name].value)
            if method == AUTO:
                check_related(*weights)
        return weights

    results: dict[str, Any] = dict.fromkeys(updates)
    if not chosen.needs_bases:
        for name, update in updates.items():
            weights = read_pair(name)
            with _name_in_errors(name):
                results[name] = update.restore(move_without_bases(update.matrix, chosen, weights))
        return results

    def move(names: list[str], stack: Tensor | LowRank, source: AnyBasis, target: AnyBasis) -> None:
        moved = move_by_bases(stack, chosen, source, target)
        for i, name in enumerate(names):
            one = moved[i] if isinstance(moved, Tensor) else LowRank(moved.up[i], moved.down[i])
            results[name] = updates[name].restore(one)

    matrices = {name: update.matrix for name, update in updates.items()}
    for shape, names in group_by(matrices, lambda name: matrices[name].shape).items():
        if len(shape) == 2:
            move_stacks(_find_stacks(names, matrices, read_pair, rank, max_bytes), move)
            continue
        for name in names:  # a stack by itself
            bases = find_bases(read_pair(name), rank, shape, explicit=True)
            moved = move_by_bases(matrices[name], chosen, *bases)
            results[name] = updates[name].restore(moved)
    return results


def _check_names(deltas: Mapping[str, Any], weights: Mapping[str, Any], argument: str) -> None:
    if not hasattr(weights, "keys"):
        raise TypeError(
            f"{argument} is a {type(weights).__name__}, not a mapping of names to weights: it "
            "needs keys() and [name]; see collections.abc.Mapping"
        )
    known = set(weights.keys())  # `in` would read the weight from some lazy mappings
    missing = [name for name in deltas if name not in known]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        similar = difflib.get_close_matches(missing[0], map(str, known), n=1, cutoff=0.8)
        hint = f"; one of its names is {similar[0]!r}" if similar else ""
        raise KeyError(f"{argument} has no {missing[0]!r}{more}{hint}")


@contextmanager
def _name_in_errors(name: str) -> Iterator[None]:
    """Puts a name in front of the message of an error."""
    try:
        yield
    except ProLoRAError as error:
        raise type(error)(f"{name}: {error}") from error


Pair = tuple[Tensor | Basis, Tensor | Basis]


def _find_stacks(
    names: Sequence[str],
    updates: Mapping[str, Tensor | LowRank],
    read_pair: Callable[[str], Pair],
    rank: Rank,
    max_bytes: int | None,
) -> Iterator[Stack[str]]:
    """Yields the pairs of one shape in chunks, each with its subspaces.

    All source weights of a chunk have one dtype and device, and so have all target weights.
    """
    chunk: dict[str, Pair] = {}
    most, form = 1, None
    for name in names:
        pair = read_pair(name)
        own_form = [_describe(weight) for weight in pair]
        if chunk and (len(chunk) == most or own_form != form):
            yield _factorise(chunk, updates, rank)
            chunk = {}
        if not chunk:
            form, most = own_form, _count_pairs(pair, updates[name], rank, max_bytes)
        chunk[name] = pair
        del pair  # or it would be in memory together with the next one
    if chunk:
        yield _factorise(chunk, updates, rank)


def _describe(weight: Tensor | Basis) -> tuple[Any, ...]:
    tensor = weight if isinstance(weight, Tensor) else weight.U
    return type(weight), tensor.dtype, tensor.device


def _factorise(
    chunk: dict[str, Pair], updates: Mapping[str, Tensor | LowRank], rank: Rank
) -> Stack[str]:
    """Computes the subspaces of a chunk and empties it, which releases the weights."""
    names = list(chunk)
    source, target = (_stack([chunk[name][i] for name in names]) for i in (0, 1))
    chunk.clear()
    some = [updates[name] for name in names]
    explicit = any(update.device.type != "cpu" for update in some)
    shape = torch.Size((len(names), *some[0].shape))
    bases = find_bases((source, target), rank, shape, explicit=explicit)
    return Stack(names, some, *bases)


def _stack(weights: Sequence[Tensor | Basis]) -> Tensor | Basis:
    tensors = [weight for weight in weights if isinstance(weight, Tensor)]
    if len(tensors) == 1:
        return tensors[0][None]  # without a copy
    return torch.stack(tensors) if tensors else stack_bases(list(weights))  # type: ignore[arg-type]


def _count_pairs(pair: Pair, update: Tensor | LowRank, rank: Rank, max_bytes: int | None) -> int:
    """Counts the pairs that are worked on together.

    On a CPU as many as keep all threads busy, with several small matrices for each thread.
    """
    weight = next((weight for weight in pair if isinstance(weight, Tensor)), update)
    most = max(1, chunk_size(torch.Size(update.shape), weight.device))
    if weight.device.type == "cpu":
        most = max(most, -(-torch.get_num_threads() // 2))
    if max_bytes is None:
        return most
    while most > 1 and _bytes_of_chunk(update, rank, most) > max_bytes:
        most -= 1
    return most


def _check_memory(name: str, update: Tensor | LowRank, rank: Rank, max_bytes: int) -> None:
    least = _bytes_of_chunk(update, rank, 1)
    if least > max_bytes:
        m, n = update.shape[-2:]
        raise TooLittleMemory(
            f"max_bytes={max_bytes:,} is too little for {name} [{m}, {n}]: to factorise its two "
            f"weights needs {least:,} on {torch.get_num_threads()} threads"
        )


def _bytes_of_chunk(update: Tensor | LowRank, rank: Rank, count: int) -> int:
    """Estimates the memory for `count` pairs, beyond one pair of weights and the results."""
    m, n = update.shape[-2:]
    d, b = min(m, n), update.shape[:-2].numel()
    copies = 2 * 4 * m * n if count * b > 1 else 0  # weights are stacked
    # Each side: rows of both projectors; for weights that are not square, the weight and the
    # Cholesky factor of its Gram matrix in float64 (`RowSpace`).
    sides = 2 * (4 * (m + n) * d + (8 * m * n + 8 * d * d if m != n else 0))
    moved = PER_COLUMN * (m + n) * update.rank if isinstance(update, LowRank) else 24 * m * n
    parallel = min(2 * count * b, torch.get_num_threads())
    return count * b * (copies + sides + moved) + parallel * bytes_of_factorisation((m, n), rank)
