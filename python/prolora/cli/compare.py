"""`prolora compare`: two bases, without a LoRA."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from ..comparison import comparison
from ..comparison.block_matching import resolve_match
from ..workflow import tables
from ..workflow.output_paths import check_beside
from . import heatmap
from .console import out, progress_bar
from .options import (
    Bases,
    JsonOption,
    MatchOption,
    ModulesOption,
    OverwriteOption,
    QuietOption,
    RankOption,
    Resources,
    SaveMatchOption,
    expand_options,
    parse_path,
    parse_rank,
)
from .outputs import check_match_file, save_match
from .tables import show_tables


@dataclass
class MeasureOptions:
    """What is measured."""

    panel: ClassVar[str] = "Measures"
    rank: RankOption = str(comparison.OVERLAP_RANK)
    match: MatchOption = "auto"
    quick: Annotated[
        bool, typer.Option("--quick", help="The verdict alone: no overlaps, no decompositions.")
    ] = False
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Also show the overlaps at fewer columns.")
    ] = False

    def check(self, plot: Path | None) -> None:
        """Raises ValueError where --quick leaves out what another option shows."""
        if self.quick and (self.sweep or plot is not None):
            other = "--sweep shows" if self.sweep else "--plot draws"
            raise ValueError(f"{other} overlaps, which --quick leaves out: give one of them")


@dataclass
class ShowOptions:
    """What is shown."""

    panel: ClassVar[str] = "Output"
    plot: Annotated[
        Path | None,
        typer.Option(
            parser=parse_path,
            metavar="FILE",
            help="Draw the overlaps into this PNG file (needs matplotlib).",
        ),
    ] = None
    save_match: SaveMatchOption = None
    overwrite: OverwriteOption = False
    modules: ModulesOption = False
    as_json: JsonOption = False
    quiet: QuietOption = False


@expand_options
def compare(
    bases: Bases, measures: MeasureOptions, shown: ShowOptions, resources: Resources
) -> None:
    """Say whether a LoRA can move between two bases, from their weights alone."""
    resources.check_device()
    measures.check(shown.plot)
    source, target = bases.open()
    if shown.plot is not None:
        heatmap.check_matplotlib()
        check_beside(shown.plot, "picture", [*source.files, *target.files], shown.overwrite)
    if shown.save_match is not None:
        check_match_file(shown.save_match, [*source.files, *target.files], shown.overwrite)
    with progress_bar("compare", not (shown.quiet or shown.as_json)) as progress:
        match = resolve_match(
            measures.match,
            source,
            target,
            device=resources.device,
            cache=resources.find_cache(),
            max_memory=resources.max_bytes,
            progress=progress,
        )
        if shown.save_match is not None:
            save_match(shown.save_match, source, target, match)
        result = comparison.compare(
            source,
            target,
            rank=None if measures.quick else parse_rank(measures.rank),
            match=match,
            device=resources.device,
            cache=resources.find_cache(),
            max_memory=resources.max_bytes,
            progress=progress,
        )
    if shown.plot is not None:
        heatmap.save_heatmap(result, shown.plot)
    if shown.as_json:
        print(json.dumps(result.to_dict(), indent=1))
        return
    if not shown.quiet:
        show_comparison(result, measures.sweep, shown.modules)
    for sentence in result.sentences():
        out.print(sentence)
    out.print(f"Modules were paired by: {result.match}.")
    if shown.plot is not None:
        out.print_line(f"wrote {shown.plot}")
    if shown.save_match is not None:
        out.print_line(f"wrote {shown.save_match}")


def show_comparison(result: comparison.Comparison, sweep: bool, every_module: bool) -> None:
    """The tables of a comparison."""
    found = [tables.tabulate_comparison(result, every_module)]
    if result.decisions:
        dropped = result.dropped_blocks
        found.insert(0, tables.tabulate_decisions(result.decisions, dropped, every_module))
    show_tables(out, [*found, *([tables.tabulate_sweep(result)] if sweep else [])])
