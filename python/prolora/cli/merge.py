"""`prolora merge`: several LoRAs as one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, cast

import typer

from ..bases import open_base
from ..errors import InvalidOption
from ..files.store import check_free
from ..making.bake import bake
from ..making.merge import merge as merge_loras
from ..making.merge_options import MergeOptions
from .console import answer, out, progress_bar
from .flags import base_option, split_bases
from .options import OutputFlags, expand_options
from .tables import show_words
from .transfer import (
    STDOUT,
    LoraArguments,
    check_output_given,
    check_outputs,
    print_made_lora,
    spell_flags,
)


@dataclass
class MergedBases:
    """The base of the result, or the one to bake into."""

    target: Annotated[
        str | None,
        base_option("Base model that all were trained on; needed for DoRA, GLoRA and OFT."),
    ] = None
    into: Annotated[
        str | None,
        base_option(
            "Bake the LoRAs into a copy of this base model; -o names the new model, and --dtype "
            "another type for all of it."
        ),
    ] = None
    stochastic: Annotated[
        int | None,
        typer.Option(
            metavar="SEED",
            help="Round --into at random, which keeps more of a LoRA in float8, with more noise.",
        ),
    ] = None


@expand_options("dry_run", "card")
def merge(
    loras: LoraArguments,
    merging: MergeOptions,
    bases: MergedBases,
    output: OutputFlags,
) -> None:
    """Merge several LoRAs of one base into one, or bake them into it."""
    check_output_given(output)
    if bases.into is not None:
        return bake_all(loras, merging, bases, output)
    if bases.stochastic is not None:
        raise InvalidOption("--stochastic rounds a model that is baked: give --into BASE, too")
    if bases.target is None:
        loras, words = split_bases(loras, 1)
        bases.target = words[0] if words else None
    target = None if bases.target is None else open_base(bases.target)
    check_outputs(loras[:1], output, merging, [*loras[1:], *(target.files if target else [])])
    with progress_bar("merge", output.show_tables) as progress:
        options = replace(merging, progress=progress)
        report = merge_loras(loras, target, options, out=output.output).report
    print_made_lora(loras[0], report, output, merging.overwrite)


def bake_all(
    loras: list[Path], merging: MergeOptions, bases: MergedBases, output: OutputFlags
) -> None:
    """Bakes LoRAs into a model, and tells what survived."""
    if bases.target is not None:
        raise InvalidOption("--into makes a model as its base is, and takes no --target")
    if output.report not in (None, STDOUT):
        check_free(output.report, overwrite=merging.overwrite)
    with progress_bar("bake", output.show_tables) as progress:
        options = replace(merging, progress=progress)
        folder = cast(str, bases.into), cast(Path, output.output)
        report = bake(loras, *folder, options, stochastic=bases.stochastic)
    if not output.show_tables:
        answer.write(report.to_dict())
    else:
        show_words(out, report.in_words())
    if output.report not in (None, STDOUT):
        report.save(output.report, overwrite=merging.overwrite, spell=spell_flags)
