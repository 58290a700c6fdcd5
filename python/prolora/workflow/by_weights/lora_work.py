"""One LoRA among those that are moved together: its updates, its results and its time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...adapters.adapter import Adapter
from ...adapters.unread import open_adapter
from ...core.lowrank import LowRank
from ...core.methods import Method, find_method
from ...core.precision import is_finite
from ...errors import NonFiniteWeights, ProLoRAError
from ..module_report import ModuleReport
from ..options import TransferOptions
from ..out_rank import cut_rank
from ..plan import ModulePlan, Pair

LORA_FAILURES = (ProLoRAError, OSError, ArithmeticError, MemoryError, RuntimeError)
"""Errors that end the LoRA in which they happen and no other of the same call."""

# Bytes in memory for each number of a LoRA: float32 before the move, twice the rank after it.
BYTES_A_NUMBER = 12

Moved = tuple[Pair, LowRank | None, ModuleReport]
"""A pair, the update of its target (None where the pair was skipped), and the row of the report."""


class Clock:
    """Adds up wall seconds by stage."""

    def __init__(self) -> None:
        """Starts with no stage."""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Times the body and adds it to the stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started)

    def add(self, stage: str, seconds: float) -> None:
        """Adds seconds to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


@dataclass
class LoraWork:
    """One LoRA among those that are moved together.

    Attributes:
        adapter: what is moved.
        plan: where it goes.
        options: how it is moved, with method, strength and damping decided.
        clock: the time that was spent on this LoRA, with its share of what is done for several.
        moved: the results, in the order in which they were made.
        error: why it was given up; the others go on.
        own_ranks: module -> the rank it has in the LoRA, where that is not the rank in `adapter`:
            updates of dropped blocks were added to it.
    """

    adapter: Adapter
    plan: ModulePlan
    options: TransferOptions
    clock: Clock = field(default_factory=Clock)
    moved: list[Moved] = field(default_factory=list)
    error: Exception | None = None
    own_ranks: Mapping[str, int] = field(default_factory=dict)

    @property
    def method(self) -> Method:
        """The method, once that is decided."""
        return find_method(self.options.method)

    def result_bytes(self) -> int:
        """Bytes that the moved updates take in memory, at most."""
        factor = 1 if self.options.chosen is None else self.options.chosen.rank_factor
        updates = (self.adapter.updates[pair.source] for pair in self.plan.pairs)
        return sum(4 * factor * (x.up.numel() + x.down.numel()) for x in updates)

    def largest_rank(self, modules: Sequence[str]) -> int:
        """Of its updates of these modules of the source; 0 where it has none."""
        updates = (self.adapter.updates.get(name) for name in modules)
        return max((update.rank for update in updates if update is not None), default=0)

    def add(self, make: Callable[[], Sequence[Moved]]) -> None:
        """Makes results and finishes them; an error ends this LoRA.

        Args:
            make: gives updates before their strength and output rank.
        """
        try:
            self.moved += [self._finish(*result) for result in make()]
        except LORA_FAILURES as error:
            self.error = error

    def _finish(self, pair: Pair, update: LowRank | None, row: ModuleReport) -> Moved:
        """The update at its strength and output rank, on the CPU, and its row.

        Raises:
            NonFiniteWeights: the update overflows.
        """
        if update is None:
            return pair, None, row
        options = self.options
        row = row.at_strength(options.factor)
        if options.factor != 1:
            update = LowRank(update.up * options.factor, update.down)
        update = update.to("cpu")
        rank = self.own_ranks.get(row.source, row.rank_in)
        smaller = cut_rank(update, options.out_rank, rank)
        if smaller is not update:
            row, update = row.cut(update, smaller), smaller
        if not (is_finite(update.up) and is_finite(update.down)):
            raise NonFiniteWeights(f"the moved update of {row.source} is not finite")
        return pair, update, replace(row, rank_out=update.rank)


@contextmanager
def share_time(works: Sequence[LoraWork], stage: str) -> Iterator[None]:
    """Times what is done for several LoRAs at once, and gives each its share."""
    started = time.perf_counter()
    yield
    share = (time.perf_counter() - started) / len(works)
    for work in works:
        work.clock.add(stage, share)


def estimate_bytes(lora: Path) -> int:
    """About how much memory a LoRA takes on its way; 0 for what cannot be read anyway."""
    try:
        headers = open_adapter(lora).headers.values()
    except LORA_FAILURES:
        return 0
    return BYTES_A_NUMBER * sum(math.prod(header.shape) for header in headers)
