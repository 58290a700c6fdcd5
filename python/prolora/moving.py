"""Every update from its source module to its target, a stack of equal shapes at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from .adapters.adapter import Adapter
from .bases import Base
from .bases.cache import BasisCache
from .damping import damped
from .errors import NonFiniteWeights
from .linalg.basis import Basis, truncated_svd
from .linalg.lowrank import LowRank
from .options import Options
from .pairing import Pair, Plan
from .projection import project_factors, recompress_parts
from .report import Measures, ModuleReport

# One stack of weights of the storage dtype, in bytes: what is read and projected at a time.
STACK_BYTES = 96 << 20

Moved = tuple[Pair, LowRank | None, ModuleReport]


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
            spent = time.perf_counter() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent


def move_all(
    adapter: Adapter, plan: Plan, source: Base, target: Base, options: Options, clock: Clock
) -> Iterator[Moved]:
    """Every pair, its update on the target (None where it was gated) and its row of the report."""
    done = 0
    for stack in _stacks(adapter, plan):
        if options.method == "copy":
            moved = _copied(adapter, stack)
        else:
            with clock("read"):
                ours = _weights(source, [(pair.source, pair.shape) for pair in stack])
                theirs = _weights(target, [(pair.target, pair.shape) for pair in stack])
            if options.method == "damped":
                with clock("damp"):
                    moved = _damped(adapter, stack, ours, theirs, options)
            else:
                subspaces = BasisCache(options.cache).bases if options.cache else truncated_svd
                with clock("svd"):
                    bases = [subspaces(w.to(options.device), options.rank) for w in (ours, theirs)]
                with clock("project"):
                    moved = _projected(adapter, stack, bases[0], bases[1], options)
        for pair, update, row in moved:
            yield pair, *_finished(update, row, options)
        done += len(stack)
        if options.progress:
            options.progress(done, len(plan.pairs), stack[-1].target)


def _stacks(adapter: Adapter, plan: Plan) -> Iterator[list[Pair]]:
    """The pairs in stacks of one weight shape and one rank, none larger than STACK_BYTES."""
    for shape, pairs in plan.groups().items():
        by_rank: dict[int, list[Pair]] = {}
        for pair in pairs:
            by_rank.setdefault(adapter.updates[pair.source].rank, []).append(pair)
        size = max(1, STACK_BYTES // (4 * shape[0] * shape[1]))
        for equal in by_rank.values():
            for i in range(0, len(equal), size):
                yield equal[i : i + size]


def _weights(base: Base, modules: list[tuple[str, tuple[int, ...]]]) -> Tensor:
    """The weights of a stack [b, m, n], convolutions flattened."""
    return torch.stack([base.read(name).reshape(shape) for name, shape in modules])


def _updates(adapter: Adapter, stack: list[Pair], device: str | None) -> LowRank:
    """The source's updates of a stack, [b, m, r] and [b, r, n]."""
    updates = [adapter.updates[pair.source] for pair in stack]
    return LowRank(
        torch.stack([update.up for update in updates]).to(device),
        torch.stack([update.down for update in updates]).to(device),
    )


def _copied(adapter: Adapter, stack: list[Pair]) -> list[Moved]:
    """The updates as they are."""
    return [
        (pair, adapter.updates[pair.source], carried(adapter, pair.source, pair.target, "copied"))
        for pair in stack
    ]


def _damped(
    adapter: Adapter, stack: list[Pair], source: Tensor, target: Tensor, options: Options
) -> list[Moved]:
    """The updates weakened along the drift of the weights [b, m, n]."""
    delta = _updates(adapter, stack, options.device)
    moved = damped(delta, source.to(options.device), target.to(options.device), options.kappa)
    before, after = delta.norm(), moved.norm()
    rows: list[Moved] = []
    for i, pair in enumerate(stack):
        row = carried(adapter, pair.source, pair.target, "damped")
        ratio = (after[i] / before[i]).item() if before[i] > 0 else 1.0
        away = LowRank(
            torch.cat([moved.up[i], -delta.up[i]], 1), torch.cat([moved.down[i], delta.down[i]], 0)
        ).norm()
        row = replace(
            row, surviving_energy=ratio**2, norm_ratio=ratio,
            copy_distance=(away / before[i]).item() if before[i] > 0 else 0.0,
        )  # fmt: skip
        rows.append((pair, LowRank(moved.up[i], moved.down[i]), row))
    return rows


def _projected(
    adapter: Adapter, stack: list[Pair], source: Basis, target: Basis, options: Options
) -> list[Moved]:
    """The updates through projection, recompression and the gate on Φ."""
    moved, info = project_factors(
        _updates(adapter, stack, options.device), source, target, options.method
    )
    recompressed = recompress_parts(moved, options.method)
    rows: list[Moved] = []
    for i, pair in enumerate(stack):
        measures = Measures.of(info, i, "+".join(sorted({source.rungs[i], target.rungs[i]})))
        row = carried(adapter, pair.source, pair.target, f"projected ({options.method})")
        row = replace(
            row, measures=measures, surviving_energy=info.surviving_energy[i].item(),
            norm_ratio=info.norm_ratio[i].item(), copy_distance=info.copy_distance[i].item(),
        )  # fmt: skip
        side = "left" if measures.phi_left <= measures.phi_right else "right"
        if min(measures.phi_left, measures.phi_right) < options.threshold:
            reason = f"Φ {side} below the threshold {options.threshold:g}"
            gated = replace(row, target=None, status="skipped", reason=reason, rank_out=0)
            rows.append((pair, None, gated))
        else:
            rows.append((pair, recompressed[i], row))
    return rows


def _finished(
    update: LowRank | None, row: ModuleReport, options: Options
) -> tuple[LowRank | None, ModuleReport]:
    """Strength and output rank applied, on the CPU, and accounted for."""
    if update is None:
        return None, row
    row = row.at_strength(options.factor)
    if options.factor != 1:
        update = LowRank(update.up * options.factor, update.down)
    update = update.to("cpu")
    if options.out_rank != "exact" and int(options.out_rank) < update.rank:
        whole = update.norm().square().item()
        update = update.truncate(rank=int(options.out_rank))
        kept = update.norm().square().item() / whole if whole else 1.0
        row = replace(
            row, rank_cut_energy=max(0.0, 1 - kept), norm_ratio=row.norm_ratio * kept**0.5
        )
    if not bool(update.up.isfinite().all() and update.down.isfinite().all()):
        raise NonFiniteWeights(f"the moved update of {row.source} is not finite")
    return update, replace(row, rank_out=update.rank)


def carried(adapter: Adapter, name: str, target: str | None, reason: str) -> ModuleReport:
    """The row of a module that goes over as it is."""
    update = adapter.updates[name]
    return ModuleReport(
        source=name, target=target, status="mapped", reason=reason, shape=tuple(update.shape),
        rank_in=update.rank, rank_out=update.rank, energy=update.norm().square().item(),
    )  # fmt: skip
