"""The main job: read, pair, project by shape group, write, verify."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import adapters
from .adapters.adapter import Adapter
from .adapters.metadata import rewritten
from .adapters.source import PEFT_WEIGHTS
from .bases import Base, check_finite, open_base
from .bases.cache import BasisCache
from .errors import LowCoverage, NonFiniteWeights
from .linalg.basis import Basis, truncated_svd
from .linalg.lowrank import LowRank
from .options import Options, Progress
from .pairing import Pair, Plan, make_plan
from .projection import project_factors, recompress_parts
from .report import Measures, ModuleReport, Report
from .storage import check_writable
from .version import __version__

# One stack of weights of the storage dtype, in bytes: what is read and projected at a time.
STACK_BYTES = 96 << 20


@dataclass(frozen=True)
class Transfer:
    """A finished transfer, in memory.

    Attributes:
        adapter: the LoRA of the target.
        report: what was kept and lost.
    """

    adapter: Adapter
    report: Report
    inputs: list[Path] = field(default_factory=list, repr=False)

    def save(
        self,
        path: str | PathLike[str],
        *,
        format: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Writes the LoRA: to a temporary file, read back and compared, then renamed.

        Args:
            path: a .safetensors file, or a folder for `format="peft"`.
            format: "auto" (as it came in), "kohya", "diffusers", "peft" or "comfy".
            dtype: of the factors; None means as they came in.

        Raises:
            OutputError: the path cannot be written, or is one of the inputs.
            NonFiniteWeights: a factor overflows in dtype.
        """
        _check_output(path, self.inputs)
        adapters.write(self.adapter, path, format=format, dtype=dtype)


def transfer(
    lora: str | PathLike[str] | Mapping[str, Tensor] | Adapter,
    source: Any,
    target: Any,
    **options: Any,
) -> Transfer:
    """Turns a LoRA of one base model into the LoRA of another, without training and without data.

    Args:
        lora: a .safetensors file, a PEFT folder, a state dict or an Adapter.
        source: the base it was trained on: file, folder, mapping, nn.Module or opened Base.
        target: the base it shall move to, likewise.
        **options: see `options.Options`.

    Raises:
        UnsupportedFormat: a file, key or adapter type that cannot be read exactly.
        ShapeMismatch: an update or a pair of weights that does not fit.
        NonFiniteWeights: NaN or Inf, named. All of these before any SVD runs.
        LowCoverage: fewer modules moved than `min_coverage` asks for.
    """
    chosen = Options(**options)
    clock = Clock()
    with clock("read"):
        adapter = lora if isinstance(lora, Adapter) else adapters.read(lora)
        source, target = open_base(source), open_base(target)
        plan = make_plan(adapter, source, target, chosen.match, chosen.text_encoder)
    _check_coverage(adapter, plan, chosen.min_coverage)
    report = _blank_report(adapter, plan, source, target, chosen)
    updates: dict[str, LowRank] = {}
    if chosen.method == "copy":
        for pair in plan.pairs:
            updates[pair.target] = adapter.updates[pair.source]
            report.modules.append(_copied(adapter, pair.source, pair.target, "copied"))
    else:
        with clock("check"):
            checking = _checking(chosen.progress)
            check_finite(source, sorted({pair.source for pair in plan.pairs}), checking)
            check_finite(target, [pair.target for pair in plan.pairs], checking)
        for pair, update, row in _project_all(adapter, plan, source, target, chosen, clock):
            report.modules.append(row)
            if update is not None:
                updates[pair.target] = update
    for name in plan.passed:
        updates[name] = adapter.updates[name]
        report.modules.append(_copied(adapter, name, name, "text encoder, carried over unchanged"))
    report.seconds = clock.seconds
    if report.coverage < chosen.min_coverage:
        raise LowCoverage(_coverage_text(report, chosen.min_coverage))
    moved = _as_target(adapter, updates, plan, source, target, chosen)
    files = [Path(lora)] if isinstance(lora, str | PathLike) else []
    return Transfer(moved, report, [*files, *source.files, *target.files])


def transfer_file(
    lora: str | PathLike[str],
    source: Any,
    target: Any,
    out: str | PathLike[str],
    *,
    format: str = "auto",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Report:
    """File to file: `transfer`, then `Transfer.save`; the output path is checked before any work.

    Raises:
        OutputError: out cannot be written, or is an input. Also everything `transfer` raises.
    """
    source, target = open_base(source), open_base(target)
    _check_output(out, [Path(lora), *source.files, *target.files])
    done = transfer(lora, source, target, **options)
    progress = options.get("progress")
    if progress:
        moved = len(done.adapter.updates)
        progress(moved, moved, f"writing {Path(out).name}")
    started = time.perf_counter()
    done.save(out, format=format, dtype=dtype)
    done.report.seconds["write"] = time.perf_counter() - started
    return done.report


def plan_report(lora: Any, source: Any, target: Any, **options: Any) -> Report:
    """What `transfer` would map, skip and refuse, from headers alone: no weight is read.

    The similarity threshold needs weights, so modules it would skip still count as mapped here.
    """
    chosen = Options(**options)
    adapter = lora if isinstance(lora, Adapter) else adapters.read(lora)
    source, target = open_base(source), open_base(target)
    plan = make_plan(adapter, source, target, chosen.match, chosen.text_encoder)
    report = _blank_report(adapter, plan, source, target, chosen)
    report.dry_run = True
    for pair in plan.pairs:
        report.modules.append(_copied(adapter, pair.source, pair.target, "would be projected"))
    for name in plan.passed:
        report.modules.append(_copied(adapter, name, name, "text encoder, carried over unchanged"))
    return report


def _check_output(path: str | PathLike[str], inputs: list[Path]) -> None:
    """Refuses an output that cannot be written, or that is an input; a PEFT folder may exist."""
    folder = Path(path)
    check_writable(folder / PEFT_WEIGHTS if folder.is_dir() else folder, inputs)


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


def _checking(progress: Progress | None) -> Progress | None:
    """The caller's callback, told that weights are being looked at and not yet moved."""
    if progress is None:
        return None
    return lambda done, total, name: progress(done, total, f"checking {name}")


def _project_all(
    adapter: Adapter, plan: Plan, source: Base, target: Base, options: Options, clock: Clock
) -> Iterator[tuple[Pair, LowRank | None, ModuleReport]]:
    """Projects every pair, a stack of equal shapes and ranks at a time."""
    subspaces = BasisCache(options.cache).bases if options.cache else truncated_svd
    done, total = 0, len(plan.pairs)
    for stack in _stacks(adapter, plan):
        with clock("read"):
            weights = [
                torch.stack([base.read(name).reshape(pair.shape) for pair, name in named])
                for base, named in (
                    (source, [(pair, pair.source) for pair in stack]),
                    (target, [(pair, pair.target) for pair in stack]),
                )
            ]
        with clock("svd"):
            bases = [subspaces(w.to(options.device), options.rank) for w in weights]
        with clock("project"):
            yield from _project_stack(adapter, stack, bases[0], bases[1], options)
        done += len(stack)
        if options.progress:
            options.progress(done, total, stack[-1].target)


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


def _project_stack(
    adapter: Adapter, stack: list[Pair], source: Basis, target: Basis, options: Options
) -> Iterator[tuple[Pair, LowRank | None, ModuleReport]]:
    """One stack [b, m, n] through projection, gate and recompression."""
    sources = [adapter.updates[pair.source] for pair in stack]
    delta = LowRank(
        torch.stack([update.up for update in sources]).to(options.device),
        torch.stack([update.down for update in sources]).to(options.device),
    )
    moved, info = project_factors(delta, source, target, options.method)
    recompressed = recompress_parts(moved, options.method)
    for i, pair in enumerate(stack):
        rung = "+".join(sorted({source.rungs[i], target.rungs[i]}))
        measures = Measures.of(info, i, rung)
        row = _copied(adapter, pair.source, pair.target, f"projected ({options.method})")
        phi = min(measures.phi_left, measures.phi_right)
        if phi < options.threshold:
            side = "left" if measures.phi_left <= measures.phi_right else "right"
            reason = f"Φ {side} below the threshold {options.threshold:g}"
            yield pair, None, replace(row, target=None, status="skipped", reason=reason,
                                      rank_out=0, measures=measures)  # fmt: skip
            continue
        update = recompressed[i].to("cpu")
        if options.out_rank != "exact":
            whole = update.norm().square().item()
            update = update.truncate(rank=int(options.out_rank))
            kept = update.norm().square().item()
            measures = replace(
                measures,
                rank_cut_energy=max(0.0, 1 - kept / whole) if whole else 0.0,
                norm_ratio=measures.norm_ratio * (kept / whole) ** 0.5 if whole else 0.0,
            )
        if not bool(update.up.isfinite().all() and update.down.isfinite().all()):
            raise NonFiniteWeights(f"the projection of {pair.source} is not finite")
        yield pair, update, replace(row, rank_out=update.rank, measures=measures)


def _blank_report(
    adapter: Adapter, plan: Plan, source: Base, target: Base, options: Options
) -> Report:
    """A report that knows the plan: skipped and refused modules are in it already."""
    report = Report(
        method=options.method, rank_rule=options.rank, threshold=options.threshold,
        match=plan.rule, source=source.name, target=target.name,
    )  # fmt: skip
    for status, reasons in (("skipped", plan.skipped), ("refused", plan.refused)):
        for name, reason in reasons.items():
            row = _copied(adapter, name, None, reason)
            report.modules.append(replace(row, status=status, rank_out=0))
    return report


def _copied(adapter: Adapter, name: str, target: str | None, reason: str) -> ModuleReport:
    """The row of a module that goes over as it is."""
    update = adapter.updates[name]
    return ModuleReport(
        source=name, target=target, status="mapped", reason=reason, shape=tuple(update.shape),
        rank_in=update.rank, rank_out=update.rank, energy=update.norm().square().item(),
    )  # fmt: skip


def _as_target(
    adapter: Adapter, updates: dict[str, LowRank], plan: Plan, source: Base, target: Base,
    options: Options,
) -> Adapter:  # fmt: skip
    """The adapter of the target: its modules, its kernels, its metadata."""
    kernels: dict[str, tuple[int, int]] = {}
    for name in updates:
        shape = target.shapes.get(name, ())
        if len(shape) == 4:
            kernels[name] = (shape[2], shape[3])
    provenance = {
        "version": __version__,
        "method": options.method,
        "rank_rule": str(options.rank),
        "threshold": str(options.threshold),
        "match": plan.rule,
        "source": source.name,
        "target": target.name,
    }
    metadata = rewritten(
        adapter.metadata,
        target_name=target.name,
        target_layout=target.layout,
        provenance=provenance,
    )
    return replace(adapter, updates=updates, kernels=kernels, metadata=metadata)


def _check_coverage(adapter: Adapter, plan: Plan, minimum: float) -> None:
    """Refuses early: the gate can only lower the coverage that names and shapes allow."""
    placed = {pair.source for pair in plan.pairs} | set(plan.passed)
    coverage = len(placed) / max(1, len(adapter.updates))
    if coverage < minimum:
        raise LowCoverage(
            f"{len(placed)} of {len(adapter.updates)} modules find a place on the target "
            f"(coverage {coverage:.2f}), fewer than --min-coverage {minimum:g}; nothing written"
        )


def _coverage_text(report: Report, minimum: float) -> str:
    return (
        f"coverage {report.coverage:.2f} is below --min-coverage {minimum:g} after the threshold "
        f"{report.threshold:g} on Φ; nothing written. Lower --threshold, or try --method copy"
    )
