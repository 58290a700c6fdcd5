"""Tables and progress bars for people; everything here only shows what the library computed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..comparison.comparison import Comparison
from ..comparison.module_comparison import ModuleComparison, average_field
from ..comparison.module_map import BlockDecision
from ..comparison.rank_sweep import THRESHOLDS
from ..workflow.group_means import GroupMeans, group_rows
from ..workflow.report import Outcome, Report
from .exits import describe_error

LEGEND = """\
drift: ‖W_t − W_s‖/‖W_s‖; kept: share of the update's energy left on the target;
norm: ratio of norms, target to source; vs copy: distance to the unchanged
update, in units of its norm."""
SUBSPACE_LEGEND = """\
Φ: overlap of the bases' leading subspaces, left and right; above: the lesser of
them over chance, 0 … 1; mixed: share of energy in the update's mixed blocks."""
ANGLE_LEGEND = """\
angle: the median … the largest principal angle between the bases' leading
subspaces, on the side that is farther apart."""


COMPARISON_LEGEND = """\
drift: ‖W_t − W_s‖/‖W_s‖; cosine: ⟨W_s, W_t⟩/(‖W_s‖‖W_t‖); unrelated weights
have drift 1.4 and cosine 0. Φ: overlap of the bases' leading subspaces, left
and right; above: the lesser of them over chance, 0 as unrelated … 1 as equal."""

SWEEP_LEGEND = """\
k: leading columns of both bases; whole: pairs whose bases have at most k columns;
energy: share of Σσ² in these columns; ≥: pairs whose Φ reaches that on both
sides."""


def transfer_legend(report: Report, every_module: bool = False) -> str:
    """What the columns of `transfer_table` mean."""
    if not any(row.measures for row in report.rows("mapped")):
        return LEGEND
    return "\n".join([SUBSPACE_LEGEND, *([ANGLE_LEGEND] if every_module else []), LEGEND])


def format_number(value: float | None, form: str = ".2f") -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None or value != value else format(value, form)


def format_extremes(numbers: Iterable[int]) -> str:
    """The least and the greatest of some numbers; one where they are equal."""
    ordered = sorted(numbers)
    return str(ordered[0]) if ordered[0] == ordered[-1] else f"{ordered[0]}…{ordered[-1]}"


def make_table(title: str) -> Table:
    """An empty table in the house style: narrow enough for 80 columns."""
    return Table(
        title=title,
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        collapse_padding=True,
    )


def transfer_table(report: Report, every_module: bool = False) -> Table:
    """What was mapped: a row for each stage of the model, or for each module.

    A dry run knows ranks only.
    """
    table = make_table(f"method {report.method}: {report.source} → {report.target}")
    table.add_column("module" if every_module else "stage", overflow="fold")
    mapped = report.rows("mapped")
    projected = any(row.measures for row in mapped)
    subspaces = ["Φ l/r", "above", "mixed"] if projected else []
    updates = [] if report.dry_run else ["drift", "kept", "norm", "vs copy"]
    # One row to a module needs no number of them, and 80 columns hold either.
    first = "angle" if every_module and projected else "n"
    for name in (first, *subspaces, *updates, "rank"):
        table.add_column(name, justify="right", no_wrap=True)
    groups = group_rows(mapped, every_module)
    for name, rows in (*groups.items(), ("all", mapped)):
        means = GroupMeans.of(rows)
        table.add_row(
            name,
            _angle_text(means) if first == "angle" else str(means.modules),
            *(_subspace_cells(means) if subspaces else []),
            *(_update_cells(means) if updates else []),
            format_extremes(means.ranks),
            style="bold" if name == "all" else None,
        )
    return table


def _subspace_cells(means: GroupMeans) -> list[str]:
    """What the subspaces of the two bases say about some modules."""
    return [
        f"{format_number(means.phi_left)} {format_number(means.phi_right)}",
        format_number(means.above),
        format_number(means.mixed, ".0%"),
    ]


def _angle_text(means: GroupMeans) -> str:
    """The median and the largest principal angle in degrees."""
    median, largest = means.angle, means.largest_angle
    if median is None or largest is None:
        return format_number(None)
    return f"{math.degrees(median):.0f}…{math.degrees(largest):.0f}°"


def _update_cells(means: GroupMeans) -> list[str]:
    """What became of the updates of some modules."""
    return [
        format_number(means.drift),
        format_number(means.kept, ".0%"),
        format_number(means.norm_ratio),
        format_number(means.copy_distance),
    ]


def reasons_table(report: Report) -> Table | None:
    """Why modules have no place in the output; None where all of them have one."""
    reasons = report.reasons()
    if not reasons:
        return None
    table = make_table("modules that were not mapped")
    for name, justify in (("n", "right"), ("status", "left"), ("why", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for (status, reason), count in sorted(reasons.items(), key=lambda item: -item[1]):
        table.add_row(str(count), status, reason)
    return table


def outcomes_table(outcomes: list[Outcome]) -> Table:
    """Several LoRAs, a row each: what moved, or why nothing did."""
    counts = Counter(outcome.status for outcome in outcomes)
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    table = make_table(f"{len(outcomes)} LoRAs: {summary}")
    table.add_column("LoRA", overflow="fold")
    for name in ("mapped", "skipped", "refused", "kept", "vs copy", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for outcome in outcomes:
        if outcome.report:
            totals = outcome.report.totals
            numbers = [
                str(totals["mapped"]),
                str(totals["skipped"]),
                str(totals["refused"]),
                format_number(totals["energy_surviving"], ".0%"),
                format_number(totals["copy_distance"]),
                format_number(outcome.seconds, ".1f"),
            ]
            table.add_row(_name_outcome(outcome, outcomes), *numbers, outcome.status)
        else:
            style = "red" if outcome.error else "dim"
            name = _name_outcome(outcome, outcomes)
            table.add_row(name, *["–"] * 6, outcome.status, style=style)
    return table


def _name_outcome(outcome: Outcome, outcomes: list[Outcome]) -> str:
    """The LoRA's name; that of the result where a LoRA has one for each expert."""
    several = sum(other.lora == outcome.lora for other in outcomes) > 1
    return outcome.out.name if several else outcome.lora.name


def failure_lines(outcomes: list[Outcome]) -> list[str]:
    """Why LoRAs were not moved, a line each."""
    lines = []
    for outcome in outcomes:
        if outcome.error:
            message, command = describe_error(outcome.error)
            lines += [f"{_name_outcome(outcome, outcomes)}: {message}", *filter(None, [command])]
    return lines


def comparison_table(comparison: Comparison, every_module: bool = False) -> Table:
    """Overlap and drift: a row for each stage of the model, or for each module."""
    table = make_table(f"{comparison.source} against {comparison.target}")
    table.add_column("module" if every_module else "stage", overflow="fold")
    overlaps = any(module.columns_source for module in comparison.modules)
    subspaces = ("k", "Φ l/r", "chance", "above") if overlaps else ()
    pairs = () if every_module else ("pairs",)
    for heading in (*pairs, *subspaces, "drift", "cosine"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = comparison.places()
    if every_module:
        rows = {module.target: [module] for module in comparison.modules}
    for name, modules in (*rows.items(), ("all", comparison.modules)):
        table.add_row(
            name,
            *([str(len(modules))] if pairs else []),
            *(_overlap_cells(modules) if overlaps else []),
            format_number(average_field(modules, "drift")),
            format_number(average_field(modules, "cosine")),
            style="bold" if name == "all" else None,
        )
    return table


def _overlap_cells(modules: list[ModuleComparison]) -> list[str]:
    """Columns, overlap and chance of a part of the model."""
    left, right, above = (average_field(modules, f) for f in ("phi_left", "phi_right", "above"))
    chance = max(average_field(modules, "chance_left"), average_field(modules, "chance_right"))
    return [
        format_extremes([module.columns_source for module in modules]),
        f"{format_number(left)} {format_number(right)}",
        format_number(chance),
        format_number(above),
    ]


def sweep_table(comparison: Comparison) -> Table:
    """The overlap of all pairs against the number of columns."""
    table = make_table(f"rank sweep over {len(comparison.modules)} pairs")
    thresholds = [f"≥ {threshold:g}" for threshold in THRESHOLDS]
    for heading in ("k", "whole", "energy", "Φ l/r", "chance", "above", *thresholds):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in comparison.sweep:
        last = row is comparison.sweep[-1]
        table.add_row(
            "all" if last else str(row.columns),
            str(row.whole),
            format_number(row.energy, ".0%"),
            f"{format_number(row.phi_left)} {format_number(row.phi_right)}",
            format_number(max(row.chance_left, row.chance_right)),
            format_number(row.above),
            *map(str, row.passing.values()),
            style="bold" if last else None,
        )
    return table


def decisions_table(
    decisions: Sequence[BlockDecision], dropped: Sequence[str], every_block: bool = False
) -> Table:
    """Where blocks came from: a row for each stack of blocks, or for each block."""
    title = f"blocks matched by similarity; {len(dropped)} of the source feed none"
    if every_block:
        return _every_decision_table(title, decisions)
    table = make_table(title)
    table.add_column("blocks", no_wrap=True)
    table.add_column("block←from", overflow="fold")
    for heading in ("score", "margin"):
        table.add_column(f"least {heading}", justify="right", no_wrap=True)
    stacks: dict[str, list[BlockDecision]] = {}
    for decision in decisions:
        stacks.setdefault(decision.target.rpartition(".")[0], []).append(decision)
    for name, several in stacks.items():
        table.add_row(
            name.removesuffix(".transformer_blocks"),
            _origins_text(name, several),
            format_number(min(decision.score for decision in several)),
            format_number(min(decision.margin for decision in several)),
        )
    return table


def _every_decision_table(title: str, decisions: Sequence[BlockDecision]) -> Table:
    """A row for each block; its name leaves out `transformer_blocks`, to fit 80 columns."""
    table = make_table(title)
    for heading in ("block", "from", "runner-up"):
        table.add_column(heading, overflow="fold", min_width=16)
    for heading in ("score", "2nd", "margin"):
        table.add_column(heading, justify="right", no_wrap=True)
    for decision in decisions:
        table.add_row(
            *(
                (name or "none").replace(".transformer_blocks.", ".")
                for name in (decision.target, decision.source, decision.runner_up)
            ),
            format_number(decision.score),
            format_number(decision.runner_up_score),
            format_number(decision.margin),
            style=None if decision.source else "yellow",
        )
    return table


def _origins_text(stack: str, decisions: list[BlockDecision]) -> str:
    """`0←0 1←3`, with the source's stack of blocks where it is another."""
    origins = []
    for decision in decisions:
        origin, _, index = (decision.source or "").rpartition(".")
        prefix = "" if origin in ("", stack) else origin.removesuffix(".transformer_blocks") + "."
        origins.append(f"{decision.target.rpartition('.')[2]}←{prefix}{index or 'none'}")
    return " ".join(origins)
