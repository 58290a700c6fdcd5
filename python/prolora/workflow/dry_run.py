"""What a transfer would do, from headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import adapters
from ..adapters.adapter import Adapter
from ..bases import Base, BaseLike, open_base
from ..core.precision import in_full_precision
from .base_check import check_bases
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
    DEFAULT_OPTIONS,
    LoraLike,
    OptionChanges,
    TransferOptions,
    settle_options,
    takes_options,
)
from .plan import Route, sum_dropped_blocks
from .report import Report

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes_options
@in_full_precision
def plan_report(
    lora: LoraLike,
    source: BaseLike,
    target: BaseLike,
    options: TransferOptions = DEFAULT_OPTIONS,
    **changes: Unpack[OptionChanges],
) -> Report:
    """What `transfer` would map, skip and refuse: nothing is factored, and weights are hardly read.

    Ranks and energies are those of a
    LoRA's own factors; what first has to be made one (DoRA, LoHa, full differences …) counts with
    the rank that the file states and no energy.

    The similarity threshold needs weights, so modules that it would skip still count as mapped
    here. Matching by similarity needs them too, and so does a target that is narrower than the
    source: only then they are read.

    Args:
        lora: as `transfer` takes it.
        source: the base that the LoRA was trained on, likewise.
        target: the base to move to, likewise.
        options: how it would be moved.
        **changes: options by name, in place of those.

    Returns:
        A report with the keys of a real one, `dry_run` set.

    Raises:
        ProLoRAError: what `transfer` refuses before it looks at weights.
    """
    options = settle_options(options, changes)
    old, new = open_base(source), open_base(target)
    check_bases(lora, old, new, options)
    return _plan_by_weights(read_outline(lora, old), old, new, options)


def read_outline(lora: LoraLike, source: Base) -> Adapter:
    """The LoRA from its header alone: what first has to be made an update has no values."""
    if isinstance(lora, Adapter):
        return lora
    return adapters.outline_adapter(lora, source.shapes, source.family)


def _plan_by_weights(
    adapter: Adapter, source: Base, target: Base, options: TransferOptions
) -> Report:
    """A row for every module, as the plan has it."""
    plan = plan_transfer(adapter, source, target, options, options.cache)
    whole = measure_sliced(adapter, plan)
    adapter, source = slice_adapter(adapter, plan), slice_source(source, [plan])
    summed = sum_dropped_blocks(adapter, plan)
    route = Route(adapter, plan, source, target, options)
    if (output := OutputForm.of(options)) != OutputForm():
        output.check(outline_result(summed, route))
    rows = outline_rows(adapter, summed, plan)
    check_coverage(rows, options.min_coverage)
    rows = [describe_sliced_module(row, plan, whole) for row in rows]
    return build_report(route, rows, carry_vectors(route), dry_run=True)
