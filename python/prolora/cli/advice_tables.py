"""The tables of `prolora advise`: drift by depth, expected shares, measured shares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from ..comparison.expectation import WANTS, Expectation
from ..probe.strength import STRENGTHS, Measurement
from ..workflow.advice import Advice
from ..workflow.lora_fit import StackDrift
from .tables import format_number, make_table

BARS = "▁▂▃▄▅▆▇█"

STACKS_LEGEND = """\
drift: ‖W_t − W_s‖/‖W_s‖; by depth: a bar for each block, the tallest for the largest drift;
strangers: blocks with weights that have nothing in common with their partners."""
EXPECTED_LEGEND = """\
share of what a LoRA trained on the target gives: 1 is as good, 0 is useless, below 0 is harm; in
brackets where 80 % of the LoRAs lay that were measured on pairs of bases like this one."""
MEASURED_LEGEND = """\
share of the wanted change of the prediction that is reached at each strength, in brackets 80 % over
trajectories; the wanted change is what the LoRA does to the source."""

SHOWN = STRENGTHS[1:]
"""The strengths that 80 columns have room for."""

WANTED = {"look": "in the target's look", "own": "the LoRA's own images"}


def draw_bars(values: Sequence[float], largest: float) -> str:
    """A bar for each value, in eighths of the largest."""
    if not largest > 0:
        return BARS[0] * len(values)
    return "".join(BARS[min(7, int(8 * value / largest))] for value in values)


def stacks_table(advice: Advice) -> Table:
    """Which blocks moved: a row for each stack of blocks."""
    stacks = advice.stacks()
    largest = max((drift for stack in stacks for drift in stack.drifts), default=0.0)
    table = make_table(f"{advice.comparison.source} → {advice.comparison.target}")
    table.add_column("part", overflow="fold")
    table.add_column("drift", justify="right", no_wrap=True)
    table.add_column("by depth", overflow="fold")
    table.add_column("cosine", justify="right", no_wrap=True)
    if _has_strangers(advice):
        table.add_column("strangers", overflow="fold")
    if advice.lora:
        table.add_column("LoRA's energy", justify="right", no_wrap=True)
    for stack in stacks:
        table.add_row(*_stack_cells(stack, largest, advice))
    return table


def _stack_cells(stack: StackDrift, largest: float, advice: Advice) -> Iterable[str]:
    yield stack.name
    yield format_number(stack.drift)
    yield draw_bars(stack.drifts, largest)
    yield format_number(stack.cosine)
    if _has_strangers(advice):
        names = [name.replace("transformer_blocks.", "") for name in stack.strangers]
        more = f", and {len(names) - 4} more" if len(names) > 4 else ""
        yield ", ".join(names[:4]) + more
    if advice.lora:
        yield format_number(stack.energy, ".0%")


def _has_strangers(advice: Advice) -> bool:
    """Whether some weights are strangers; between unrelated bases all of them are."""
    return advice.verdict.related and any(stack.strangers for stack in advice.stacks())


def expected_table(expected: Sequence[Expectation]) -> Table:
    """What each method is expected to give."""
    wants = [want for want in WANTS if any(e.want == want for e in expected)]
    table = make_table("expected")
    table.add_column("method", no_wrap=True)
    for want in wants:
        table.add_column(WANTED[want], justify="right", no_wrap=True)
    cells = {(e.method, e.want): f"{e.share:.2f} [{e.low:.2f}, {e.high:.2f}]" for e in expected}
    for method in dict.fromkeys(e.method for e in expected):
        table.add_row(method, *(cells.get((method, want), "–") for want in wants))
    return table


def measured_table(measurement: Measurement) -> Table:
    """What was measured: a row for each way to move the LoRA."""
    table = make_table("measured")
    table.add_column("method", no_wrap=True)
    for strength in SHOWN:
        table.add_column(f"{strength:g}", justify="right", no_wrap=True)
    table.add_column("best at", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    for name, way in measurement.candidates.items():
        low, high = way.share_interval
        table.add_row(
            name,
            *(_share_text(way.shares[strength]) for strength in SHOWN),
            f"{way.strength:.2f}",
            f"{way.share:.2f} [{low:.2f}, {high:.2f}]",
        )
    return table


def _share_text(share: float) -> str:
    """A share; how far below −1 the harm is matters to nobody, and needs room."""
    return "< −1" if share < -1 else f"{share:.2f}"
