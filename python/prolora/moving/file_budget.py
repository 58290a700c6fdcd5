"""A LoRA cut to the size of a file: its columns are spent where they hold most energy."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from .. import adapters
from ..adapters import Adapter, Group
from ..core.lowrank import LowRank
from ..core.parallel import map_on_threads
from ..core.recompression import product_energies
from ..errors import OutputError
from ..reports.module_report import ModuleReport
from .options import FormatLike, Output, read_dtype
from .out_rank import parse_size_limit

# Bytes: more than a transfer adds to the header of a file.
ADDED_HEADER = 2048


@dataclass(frozen=True)
class OutputForm:
    """The form in which the result of a transfer is written."""

    format: FormatLike | None = None  # the format that it must fit; None asks for none
    dtype: torch.dtype | None = None  # of the factors; None keeps the LoRA's
    limit: int | None = None  # bytes of the file; None sets no bound
    overwrite: bool = field(default=False, compare=False)  # changes nothing of the result

    @classmethod
    def of(cls, options: Output) -> OutputForm:
        """Reads what the options ask for."""
        return cls(options.format, read_dtype(options.dtype), parse_size_limit(options.out_rank))

    def check(self, outline: Adapter) -> None:
        """Refuses what the format cannot hold, or the size, before anything is moved.

        Args:
            outline: the modules of the result; only shapes count.

        Raises:
            UnsupportedFormat: the format has no name for a module.
            OutputError: with one column a module it is still too large.
        """
        if self.format is not None:
            adapters.check_format(outline, self.format)
        if self.limit is not None and (outline.updates or outline.vectors):
            groups = self._groups(outline)
            least = self._size(outline, groups, [1] * len(groups))
            if least > self.limit:
                raise self._too_small(least + ADDED_HEADER)

    def fit(self, adapter: Adapter) -> Adapter:
        """Returns the adapter with as many columns as fit.

        Columns are taken in the order of their energy per byte, over all modules together. Each
        module (FLUX's fused weights as one) keeps its first column in any case; beyond those, no
        column that is left out has more energy per byte than one that is kept. The same object
        comes back where nothing is cut.

        Raises:
            OutputError: with one column a module it is still too large.
        """
        if self.limit is None or not (adapter.updates or adapter.vectors):
            return adapter
        if self._file_size(adapter) <= self.limit:
            return adapter
        groups = self._groups(adapter)
        order = _by_energy_per_byte(groups)

        def size(picks: int) -> int:
            return self._size(adapter, groups, _count_columns(order[:picks], len(groups)))

        # The bytes beside the factors depend on the ranks too, so `size` asks the writer. The
        # result fits even if the size does not rise with every pick: the search ends on one that
        # was measured.
        picks = bisect_right(range(len(order) + 1), self.limit, key=size) - 1
        if picks < 0:
            raise self._too_small(size(0))
        counts = _count_columns(order[:picks], len(groups))
        pieces = map_on_threads(_cut_group, list(zip(groups, counts, strict=True)))
        cut = {name: update for parts in pieces for name, update in parts.items()}
        return adapter.with_updates({name: cut[name] for name in adapter.updates})

    def _groups(self, adapter: Adapter) -> list[Group]:
        adapter, format = adapters.resolve_format(adapter, self._format)
        return adapters.group_modules(adapter, adapters.check_format(adapter, format))

    @property
    def _format(self) -> str:
        return "auto" if self.format is None else self.format

    def _file_size(self, adapter: Adapter) -> int:
        return adapters.adapter_file_size(adapter, format=self._format, dtype=self.dtype)

    def _size(self, adapter: Adapter, groups: list[Group], counts: list[int]) -> int:
        """Returns the bytes of the file for a number of columns by group."""
        updates: dict[str, LowRank] = {}
        zero = torch.zeros(1, 1)
        for group, rank in zip(groups, counts, strict=True):
            down = zero.expand(rank, group.shape[1])  # one for all, as in a cut group
            for name, part in group.parts.items():
                updates[name] = LowRank(zero.expand(part.shape[0], rank), down)
        updates = {name: updates[name] for name in adapter.updates}
        return self._file_size(adapter.with_updates(updates))

    def _too_small(self, least: int) -> OutputError:
        return OutputError(
            f"out_rank: {self.limit} bytes are too few for this LoRA, which takes "
            f"{math.ceil(least / 1000)}kB with one column in every module"
        )


def _by_energy_per_byte(groups: list[Group]) -> list[int]:
    """Sorts all columns but each group's first by energy per byte.

    Returns their groups.
    """
    if not groups:
        return []  # biases and norms alone
    further = map_on_threads(_column_energies, groups)
    owners = torch.repeat_interleave(torch.tensor([len(columns) for columns in further]))
    order: list[int] = owners[torch.cat(further).argsort(descending=True, stable=True)].tolist()
    return order


def _column_energies(group: Group) -> torch.Tensor:
    """Returns the energy per number of a group's columns but the first, descending."""
    update = group.update()
    return product_energies(update.up, update.down)[1:] / sum(group.shape)


def _count_columns(picks: list[int], groups: int) -> list[int]:
    """Columns of every group: its first, and those picked."""
    picked = Counter(picks)
    return [1 + picked[i] for i in range(groups)]


def _cut_group(piece: tuple[Group, int]) -> dict[str, LowRank]:
    """Cuts the parts of a group to so many columns, if they had more."""
    group, rank = piece
    if rank == group.rank:
        return group.parts
    return group.split(group.update().truncate(rank=rank))


def describe_cuts(
    rows: Iterable[ModuleReport], before: Adapter, after: Adapter
) -> tuple[ModuleReport, ...]:
    """Updates the rows of modules that were cut, among a report's rows."""
    if after is before:
        return tuple(rows)
    return tuple(_describe_cut(row, before, after) for row in rows)


def _describe_cut(row: ModuleReport, before: Adapter, after: Adapter) -> ModuleReport:
    if row.status != "mapped" or row.target not in before.updates:
        return row
    update, smaller = before.updates[row.target], after.updates[row.target]
    return row if smaller is update else row.cut(update, smaller)
