"""What a transfer would do, from headers alone."""

from __future__ import annotations

from typing import Any

import torch

from .. import adapters
from ..adapters.adapter import Adapter
from ..bases import open_base
from . import probe_transfer
from .assembly import (
    blank_report,
    describe_summed_module,
    list_summed_modules,
    outline_result,
    place_vectors_of,
)
from .file_budget import OutputForm
from .move_updates import describe_unchanged
from .options import PROBE, Options
from .plan import sum_dropped_blocks
from .report import Report
from .transfer import plan_transfer


def plan_report(
    lora: Any,
    source: Any,
    target: Any,
    *,
    format: str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Report:
    """What `transfer` would map, skip and refuse: no weight is read and nothing is factored.

    Ranks and energies are those of a LoRA's own factors; what first has to be made one (DoRA, LoHa,
    full differences …) counts with the rank the file states and no energy.

    The similarity threshold needs weights, so modules it would skip still count as mapped here.
    Matching by similarity needs them too: it alone reads them.

    Args:
        lora: as `transfer` takes it.
        source: likewise.
        target: likewise.
        format: one the result must fit; None asks for none.
        dtype: of its factors, likewise; counts where `out_rank` is a size.
        **options: see `options.Options`.

    Raises:
        ProLoRAError: what `transfer` refuses before it looks at weights.
    """
    chosen = Options(**options)
    source, target = open_base(source), open_base(target)
    if chosen.method == PROBE:
        probe_transfer.check_probing(source, target, chosen)
    adapter = lora if isinstance(lora, Adapter) else adapters.outline_adapter(lora, source.shapes)
    if chosen.method == PROBE:
        report = probe_transfer.build_probe_report(
            probe_transfer.outline_probing(adapter, source, target, chosen), source, target, chosen
        )
        report.dry_run = True
        return report
    plan = plan_transfer(adapter, source, target, chosen)
    whole = sum_dropped_blocks(adapter, plan)
    output = OutputForm.of(chosen, format, dtype)
    if output != OutputForm():
        output.check(outline_result(whole, plan, source, target, chosen))
    report = blank_report(adapter, plan, source, target, chosen)
    report.dry_run = True
    for pair in plan.pairs:
        row = describe_unchanged(whole, pair.source, pair.target, "would be projected")
        report.modules.append(describe_summed_module(row, adapter, plan))
    for name in plan.passed:
        report.modules.append(describe_unchanged(adapter, name, name, "text encoder, carried over"))
    report.modules += list_summed_modules(
        adapter, plan, {pair.source: pair.target for pair in plan.pairs}
    )
    vectors = place_vectors_of(adapter, plan, source, target, chosen)
    report.vectors, report.left_out = len(vectors.vectors), report.left_out | vectors.left_out
    return report
