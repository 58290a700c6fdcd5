"""The commands that take few options, and the way in."""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from ..bases import open_base
from ..comparison import comparison
from ..core.ops import operators
from ..errors import LowCoverage, ProLoRAError
from ..files.writing import check_writable
from ..version import __version__
from ..workflow import inspection
from . import basis, heatmap, inspect_table, tables
from .common import (
    CacheOption,
    DeviceOption,
    JsonOption,
    MatchOption,
    MemoryOption,
    NoCacheOption,
    QuietOption,
    RankOption,
    SourceOption,
    TargetOption,
    cache_folder,
    memory_limit,
    parse_rank,
)
from .demo import run_demo
from .transfer import AUTO_METHOD, Method, show_report, transfer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Move a LoRA to another base model, without training and without data.",
    pretty_exceptions_enable=False,
)
app.command()(transfer)
app.add_typer(basis.app, name="basis")
out = Console()
err = Console(stderr=True)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A LoRA or a base model.")],
    as_json: JsonOption = False,
) -> None:
    """Say what a file is, from its header alone."""
    found = inspection.inspect(file)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        for part in inspect_table.description_parts(found):
            out.print(part, highlight=False)


@app.command()
def compare(
    source: SourceOption,
    target: TargetOption,
    rank: RankOption = str(comparison.OVERLAP_RANK),
    match: MatchOption = "name",
    quick: Annotated[
        bool, typer.Option("--quick", help="The verdict alone: no overlaps, no decompositions.")
    ] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="A table of the overlaps at fewer columns, too.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the overlaps into this PNG file (needs Pillow).")
    ] = None,
    device: DeviceOption = "cpu",
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    max_memory: MemoryOption = "",
    modules: Annotated[bool, typer.Option("--modules", help="A table row per block.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say whether a LoRA can move between two bases, from their weights alone."""
    operators.require(device)
    old, new = open_base(source), open_base(target)
    if quick and (sweep or plot is not None):
        asked = "--sweep tells" if sweep else "--plot draws"
        raise ValueError(f"{asked} overlaps, which --quick leaves out: give one of them")
    if plot is not None:
        heatmap.check_pillow()
        check_writable(plot, [*old.files, *new.files])
    with tables.progress_bar("compare", not (quiet or as_json) and err.is_terminal) as progress:
        found = comparison.compare(
            old,
            new,
            rank=None if quick else parse_rank(rank),
            match=match,
            device=device,
            cache=cache_folder(cache, no_cache),
            max_memory=memory_limit(max_memory),
            progress=progress,
        )
    if plot is not None:
        heatmap.save_heatmap(found, plot)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
        return
    if not quiet:
        if found.decisions:
            out.print(tables.decisions_table(found.decisions, found.dropped_blocks, modules))
        out.print(tables.comparison_table(found))
        out.print(f"[dim]{tables.COMPARISON_LEGEND}[/dim]", highlight=False)
        if sweep:
            out.print(tables.sweep_table(found))
            out.print(f"[dim]{tables.SWEEP_LEGEND}[/dim]", highlight=False)
    for sentence in found.sentences():
        out.print(sentence, highlight=False)
    out.print(f"Modules were paired by: {found.match}.", highlight=False)
    if plot is not None:
        out.print(f"wrote {plot}", highlight=False, soft_wrap=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(
        "prolora-demo"
    ),
    lora: Annotated[str, typer.Option(help="A shipped LoRA.")] = "thick",
    target: Annotated[str, typer.Option(help="A shipped target base.")] = "pruned",
    method: Annotated[Method, typer.Option(help="How to move it.")] = AUTO_METHOD,
    seed: Annotated[int, typer.Option(help="Of the noise the images start from.")] = 0,
) -> None:
    """Move a shipped LoRA between two small shipped models, and draw what it does."""
    shown = err.is_terminal
    with tables.progress_bar("demo", shown) as progress:
        report, paths = run_demo(
            output, lora=lora, target=target, method=method.value, seed=seed, progress=progress
        )
    show_report(report)
    for path in paths:
        out.print(f"wrote {path}", highlight=False, soft_wrap=True)


@app.command()
def info(as_json: JsonOption = False) -> None:
    """Say what this installation can do."""
    count, why = operators.cuda_status()
    facts = {
        "prolora": __version__,
        "torch": torch.__version__,
        "cpu threads": torch.get_num_threads(),
        "built with CUDA kernels": operators.built_with_cuda(),
        "usable GPUs": count,
        "why no GPU": why or None,
        "torch sees a GPU": torch.cuda.is_available(),
    }
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        for name, value in facts.items():
            if value is not None:
                out.print(f"[bold]{name}[/bold]: {value}", highlight=False)


def main() -> None:
    """Runs the command line; what prolora refuses becomes one message and exit code 2."""
    # Leave by the front door when told to stop, so that temporary files are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        app(standalone_mode=True)
    except LowCoverage as error:
        err.print(f"[bold red]LowCoverage:[/bold red] {error}", highlight=False, soft_wrap=True)
        sys.exit(3)
    except (ProLoRAError, ValueError, RuntimeError) as error:
        name = type(error).__name__
        err.print(f"[bold red]{name}:[/bold red] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)
