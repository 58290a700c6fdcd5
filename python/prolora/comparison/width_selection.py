"""A narrower target whose weights are rows and columns of the source's: found by the weights alone.

Where a student was made by leaving out channels, W_t = W_s[rows, columns], and an update B·A of W_s
becomes B[rows]·A[:, columns]. Where one side of a weight is known, `match_rows` gives the other.
What is known spreads from the modules that have one side of equal width (the embedding of the
image's channels, the projection of the text): a residual stream has one selection for all modules
that read or write it, and so has every head and feed-forward layer for its two neighbours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..architectures.modules import find_block, have_equal_shapes, is_in_text_encoder
from ..bases import Base
from ..bases.base import Progress
from ..bases.weights import DerivedWeight, Origin, Weight
from ..core.lowrank import LowRank
from ..core.validation import DeviceLike
from .width_matching import ROW_TOLERANCE, UNKNOWN, complete_by_order, match_rows

MAX_RESIDUAL = 0.5
"""The largest ‖W_t − W_s[rows, columns]‖/‖W_t‖ of a selection.

Students are trained after they were cut. On a fine-tuned UNet that was cut to three quarters of its
channels (drift 0.20) 296 of 301 weights were matched and no row of them wrong; 0.5 leaves room."""

# Of rows this small, relative to the others, noise may be all there is.
_SMALL_ROW = 0.1

# Rows that are looked at first, the share of them that must be matched, and the selections that
# are tried for a side.
_SAMPLE, _SHARE, _TRIES = 16, 0.5, 6
_PASSES = 12
_BLOCK_ENTRIES = 1 << 22

Widths = tuple[int, int]
"""A side of a weight: its width on the source and on the target."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The rows and columns of a source's weight that a target's weight has.

    Attributes:
        rows: indices [m'] below m.
        columns: indices [n'] below n; of channels where the weight is that of a convolution.
        shape: (m, n) of the source's weight.
        residual: ‖W_t − W_s[rows, columns]‖/‖W_t‖.
    """

    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]
    residual: float

    def take(self, weight: Tensor) -> Tensor:
        """The selected part of a weight [m, n, ...], in its dtype."""
        if weight.dtype.itemsize == 1:  # torch selects from no float8
            return self.take(weight.view(torch.uint8)).view(weight.dtype)
        return weight.index_select(0, self.rows).index_select(1, self.columns)

    def take_update(self, update: LowRank) -> LowRank:
        """The selected part of an update: up [m, r], down [r, n·kh·kw]."""
        down = update.down.reshape(update.rank, self.shape[1], -1)
        down = down.index_select(1, self.columns).flatten(1)
        return LowRank(update.up.index_select(0, self.rows), down)

    def describe(self) -> str:
        """For reports."""
        (m, n), rows, columns = self.shape, len(self.rows), len(self.columns)
        return (
            f"sliced to {rows} of {m} rows and {columns} of {n} columns, residual "
            f"{self.residual:.2%}"
        )


@dataclass(frozen=True)
class SelectedWeight(DerivedWeight):
    """Rows and columns of a weight that has not been read yet."""

    stored: Weight
    selection: Selection

    @property
    def origin(self) -> Origin | None:
        """The stored weight and what is taken of it."""
        stored = self.stored.origin
        indices = torch.cat([self.selection.rows, self.selection.columns]).numpy().tobytes()
        digest = hashlib.sha256(indices).hexdigest()[:16]
        return stored and stored.then(f"selection {len(self.selection.rows)} {digest}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the selected part."""
        return len(self.selection.rows), len(self.selection.columns), *self.stored.shape[2:]

    def read(self) -> Tensor:
        """The selected part."""
        return self.selection.take(self.stored.read())


def select_base(base: Base, selections: Mapping[str, Selection]) -> Base:
    """A base whose weights of the named modules are the selected parts; the base if there are none.

    Args:
        base: the source.
        selections: source module -> selection.
    """
    if not selections:
        return base
    selected = {n: SelectedWeight(base.weights[n], chosen) for n, chosen in selections.items()}
    return replace(base, weights={**base.weights, **selected})


def select_narrower(
    source: Base,
    target: Base,
    table: Mapping[str, str],
    wanted: Mapping[str, str],
    device: DeviceLike,
) -> tuple[Base, dict[str, Selection]]:
    """The source with its weights cut as those of a narrower target were, where that is known.

    Args:
        source: the wider base.
        target: the narrower one.
        table: target module -> source module, of all modules that have a partner.
        wanted: the part of the table that matters.
        device: where to compute; None means the CPU.

    Returns:
        The source, and source module -> selection. A weight that has a partner of its own shape
        stays as it is.
    """
    whole = {
        origin
        for module, origin in wanted.items()
        if have_equal_shapes(source.shapes[origin], target.shapes[module])
    }
    others = [pair for pair in wanted.items() if pair[1] not in whole]
    found = WidthFinder(source, target, device).find(others, table)
    selections = {origin: selection for (_, origin), selection in found.items()}
    return select_base(source, selections), selections


@dataclass
class _KnownWidths:
    """A selection along one side, as far as it is known: indices [l], and how often it fitted."""

    indices: Tensor
    hits: int = 1


@dataclass(eq=False)
class WidthFinder:
    """Finds the selections of a pair of bases; what was found serves the next modules.

    Attributes:
        source: the wider base.
        target: the narrower one.
        device: where to compute; None means the CPU.
        progress: called as progress(done, total, target module).
    """

    source: Base
    target: Base
    device: DeviceLike = None
    progress: Progress | None = None
    _found: dict[tuple[str, str], Selection | None] = field(default_factory=dict)
    _pool: dict[Widths, list[_KnownWidths]] = field(default_factory=dict)
    _started: bool = False

    def find(
        self, pairs: Iterable[tuple[str, str]], table: Mapping[str, str]
    ) -> dict[tuple[str, str], Selection]:
        """The selections of pairs of modules whose shapes differ.

        Args:
            pairs: (target module, source module).
            table: the same for all modules of the bases that have a partner: embeddings and
                convolutions outside the blocks are where the search starts.

        Returns:
            Pair -> selection, for those that are one; every other pair is none, or cannot be told.
        """
        wanted = [pair for pair in pairs if self.may_be(*pair)]
        if not wanted:
            return {}
        if not self._started:
            self._started = True
            outside = [
                pair
                for pair in table.items()
                if self.may_be(*pair)
                and not find_block(pair[0])
                and not is_in_text_encoder(pair[0])
            ]
            self._solve_all(outside)
        self._solve_all(wanted)
        return {pair: found for pair in wanted if (found := self._found.get(pair)) is not None}

    def may_be(self, module: str, origin: str) -> bool:
        """Whether the target's weight can be a part of the source's, by their shapes."""
        ours, theirs = self.source.shapes[origin], self.target.shapes[module]
        if have_equal_shapes(ours, theirs) or len(ours) < 2 or len(theirs) < 2:
            return False
        kernels = [shape[2:] for shape in (ours, theirs)]
        equal = kernels[0] == kernels[1] or all(set(kernel) <= {1} for kernel in kernels)
        return equal and 0 < theirs[0] <= ours[0] and 0 < theirs[1] <= ours[1]

    def _solve_all(self, pairs: list[tuple[str, str]]) -> None:
        """Solves what can be solved, as long as anything new is learnt."""
        for _ in range(_PASSES):
            left = [pair for pair in pairs if pair not in self._found]
            before = self._count_known()
            for done, pair in enumerate(left, 1):
                self._solve_pair(*pair)
                if self.progress:
                    self.progress(done, len(left), pair[0])
            if not left or self._count_known() == before:
                return

    def _count_known(self) -> int:
        entries = (entry for known in self._pool.values() for entry in known)
        return len(self._found) + sum(int((entry.indices >= 0).sum()) for entry in entries)

    def _solve_pair(self, module: str, origin: str) -> None:
        """Looks for the selection of a pair; notes it, or that what looks like one fits badly."""
        ours, theirs = self.source.shapes[origin], self.target.shapes[module]
        sides = ((ours[0], theirs[0]), (ours[1], theirs[1]))
        tries = self._list_tries(sides)
        if not tries:
            return
        wide, narrow = self._read(self.source, origin), self._read(self.target, module)
        for axis, entry in tries:
            solved = _solve_side(wide, narrow, axis, entry.indices)
            if solved is None:
                continue
            entry.hits += 1
            rows, columns = (
                self._learn(side, indices) for side, indices in zip(sides, solved, strict=True)
            )
            if bool((rows >= 0).all()) and bool((columns >= 0).all()):
                residual = _measure_residual(wide, narrow, rows, columns)
                found = Selection(rows, columns, (ours[0], ours[1]), residual)
                self._found[module, origin] = found if residual <= MAX_RESIDUAL else None
            return

    def _list_tries(self, sides: tuple[Widths, Widths]) -> list[tuple[int, _KnownWidths]]:
        """(axis, what may be selected along it), the most proven first."""
        tries: list[tuple[int, _KnownWidths]] = []
        for axis in (1, 0):
            wide, narrow = sides[axis]
            if wide == narrow:
                return [(axis, _KnownWidths(torch.arange(wide)))]
            tries += [(axis, entry) for entry in self._pool.get(sides[axis], [])]
        return sorted(tries, key=lambda item: -item[1].hits)[:_TRIES]

    def _read(self, base: Base, module: str) -> Tensor:
        """A weight as float32 [m, n, k]."""
        weight = base.read(module).to(self.device, torch.float32)
        return weight.reshape(*weight.shape[:2], -1)

    def _learn(self, side: Widths, indices: Tensor) -> Tensor:
        """Notes a selection along a side; what earlier ones know of the same one completes it."""
        if side[0] == side[1]:
            return indices
        for entry in self._pool.setdefault(side, []):
            both = (entry.indices >= 0) & (indices >= 0)
            alike = bool((entry.indices == indices)[both].all())
            if alike and int(both.sum()) >= _SHARE * len(indices):
                merged = torch.where(indices >= 0, indices, entry.indices)
                known = merged[merged >= 0]
                if len(known.unique()) == len(known):
                    entry.indices = complete_by_order(merged, side[0])
                    return entry.indices
        self._pool[side].append(_KnownWidths(complete_by_order(indices, side[0])))
        return self._pool[side][-1].indices


def _solve_side(
    wide: Tensor, narrow: Tensor, axis: int, indices: Tensor
) -> tuple[Tensor, Tensor] | None:
    """(rows, columns) of a selection of which one side is known; None where it is none.

    Args:
        wide: the source's weight [m, n, k].
        narrow: the target's [m', n', k].
        axis: 0 where the rows are known, 1 where the columns are.
        indices: what is known, with `UNKNOWN` in it.
    """
    if axis == 0:
        solved = _solve_side(wide.transpose(0, 1), narrow.transpose(0, 1), 1, indices)
        return solved and (solved[1], solved[0])
    known = (indices >= 0).nonzero().squeeze(1)
    if len(known) < _SHARE * len(indices):
        return None
    ours = wide.index_select(1, indices[known].to(wide.device)).flatten(1)
    theirs = narrow.index_select(1, known.to(narrow.device)).flatten(1)
    sample = theirs[:: max(1, len(theirs) // _SAMPLE)]
    if not _is_matched(match_rows(ours, sample)):
        return None
    rows = match_rows(ours, theirs)
    if not _is_matched(rows):
        return None
    if len(known) < len(indices):
        there = (rows >= 0).nonzero().squeeze(1)
        ours = wide.index_select(0, rows[there].to(wide.device)).transpose(0, 1).flatten(1)
        theirs = narrow.index_select(0, there.to(narrow.device)).transpose(0, 1).flatten(1)
        columns = match_rows(ours, theirs)
        if bool(((columns != indices) & (columns >= 0) & (indices >= 0)).any()):
            return None
        indices = torch.where(indices >= 0, indices, columns)
    return rows, indices


def _is_matched(match: Tensor) -> bool:
    """Whether enough of the rows have a match."""
    return int((match != UNKNOWN).sum()) >= _SHARE * len(match)


def _measure_residual(wide: Tensor, narrow: Tensor, rows: Tensor, columns: Tensor) -> float:
    """‖W_t − W_s[rows, columns]‖/‖W_t‖, a few rows at a time; infinite where a row is another one.

    One wrong row or column among thousands hardly shows in the norm of the whole.
    """
    rows, columns = rows.to(wide.device), columns.to(wide.device)
    size = max(1, _BLOCK_ENTRIES // max(1, wide[0].numel()))
    along_rows, along_columns = [], torch.zeros(2, len(columns), dtype=torch.float64)
    for start in range(0, len(rows), size):
        part = narrow[start : start + size]
        chosen = wide[rows[start : start + size]].index_select(1, columns)
        squares = torch.stack([part - chosen, part]).square_().sum(3).double().cpu()
        along_rows.append(squares.sum(2))
        along_columns += squares.sum(1)
    for difference, norm in (torch.cat(along_rows, 1), along_columns):
        limit = ROW_TOLERANCE**2 * norm.clamp_min(_SMALL_ROW**2 * norm.mean())
        if bool((difference > limit).any()):
            return float("inf")
    difference, norm = along_columns.sum(1).tolist()
    return float((difference / norm) ** 0.5) if norm > 0 else 0.0
