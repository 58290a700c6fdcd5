"""What a transfer would do, from headers alone."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike

from .. import adapters
from ..adapters.adapter import Adapter
from ..bases import Base, BaseLike, open_base
from ..bases.base import Progress
from ..comparison.contested_blocks import InsertedMode
from ..comparison.module_map import Match
from ..comparison.verdict import DEFAULT_THRESHOLD, LookMode
from ..core.precision import in_full_precision
from ..core.projection import DEFAULT_RANK
from ..core.rank_rule import Rank
from ..probe.settings import Probing
from .base_check import check_bases
from .by_probing.plan import check_probing
from .by_probing.rows import outline_report
from .by_weights.assembly import (
    build_report,
    check_coverage,
    outline_result,
    outline_rows,
)
from .by_weights.file_budget import OutputForm
from .by_weights.pipeline import plan_transfer
from .by_weights.slicing import (
    describe_sliced_module,
    measure_sliced,
    slice_adapter,
    slice_source,
)
from .by_weights.vectors import carry_vectors
from .options import (
    DEFAULT_PROBING,
    DroppedMode,
    DtypeLike,
    FormatLike,
    LoraLike,
    MethodChoice,
    Strength,
    TextEncoderMode,
    TransferOptions,
    VectorsMode,
)
from .out_rank import OutRank
from .plan import Route, sum_dropped_blocks
from .report import Report


@in_full_precision
def plan_report(
    lora: LoraLike,
    source: BaseLike,
    target: BaseLike,
    *,
    method: MethodChoice = "auto",
    rank: Rank = DEFAULT_RANK,
    match: Match = "name",
    threshold: float = DEFAULT_THRESHOLD,
    damping: float | None = None,
    strength: Strength | None = None,
    look: LookMode = "target",
    out_rank: OutRank = "exact",
    dropped: DroppedMode = "skip",
    inserted: InsertedMode = "skip",
    text_encoder: TextEncoderMode = "copy",
    vectors: VectorsMode = "copy",
    min_coverage: float = 0.0,
    again: bool = False,
    format: FormatLike | None = None,
    dtype: DtypeLike | None = None,
    cache: str | PathLike[str] | None = None,
    device: str | None = None,
    max_memory: int | str | None = None,
    probe: Probing = DEFAULT_PROBING,
    progress: Progress | None = None,
) -> Report:
    """What `transfer` would map, skip and refuse: nothing is factored, and weights are hardly read.

    Every argument has the meaning that it has in `transfer`. Ranks and energies are those of a
    LoRA's own factors; what first has to be made one (DoRA, LoHa, full differences …) counts with
    the rank that the file states and no energy.

    The similarity threshold needs weights, so modules that it would skip still count as mapped
    here. Matching by similarity needs them too, and so does a target that is narrower than the
    source: only then they are read.

    Returns:
        A report with the keys of a real one, `dry_run` set.

    Raises:
        ProLoRAError: what `transfer` refuses before it looks at weights.
    """
    options = TransferOptions(
        method=method,
        rank=rank,
        match=match,
        threshold=threshold,
        damping=damping,
        strength=strength,
        look=look,
        out_rank=out_rank,
        dropped=dropped,
        inserted=inserted,
        text_encoder=text_encoder,
        vectors=vectors,
        min_coverage=min_coverage,
        again=again,
        cache=cache,
        device=device,
        max_memory=max_memory,
        probe=probe,
        progress=progress,
    )
    output = OutputForm.of(options, format, dtype)
    old, new = open_base(source), open_base(target)
    check_bases(lora, old, new, options)
    if options.runs_models:
        check_probing(old, new, options)
        report = outline_report(_outline_lora(lora, old), old, new, options)
        check_coverage(report.modules, options.min_coverage)
        return replace(report, dry_run=True)
    return _plan_by_weights(_outline_lora(lora, old), old, new, options, output)


def _outline_lora(lora: LoraLike, source: Base) -> Adapter:
    if isinstance(lora, Adapter):
        return lora
    return adapters.outline_adapter(lora, source.shapes, source.family)


def _plan_by_weights(
    adapter: Adapter, source: Base, target: Base, options: TransferOptions, output: OutputForm
) -> Report:
    """A row for every module, as the plan has it."""
    plan = plan_transfer(adapter, source, target, options, options.cache)
    whole = measure_sliced(adapter, plan)
    adapter, source = slice_adapter(adapter, plan), slice_source(source, [plan])
    summed = sum_dropped_blocks(adapter, plan)
    route = Route(adapter, plan, source, target, options)
    if output != OutputForm():
        output.check(outline_result(summed, route))
    rows = outline_rows(adapter, summed, plan)
    check_coverage(rows, options.min_coverage)
    rows = [describe_sliced_module(row, plan, whole) for row in rows]
    return build_report(route, rows, carry_vectors(route), dry_run=True)
