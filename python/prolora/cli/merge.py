"""`prolora merge`: several LoRAs as one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ..bases import Base, open_base
from ..errors import InvalidOption
from ..files.store import check_free
from ..making.bake import bake
from ..making.merge import merge as merge_loras
from ..making.merge_options import MergeOptions
from .console import answer, out, progress_bar
from .flags import base_option, split_bases, write_flag
from .options import expand_options, find_cache
from .output_options import OutputFlags
from .tables import show_words
from .transfer import (
    STDOUT,
    LoraArguments,
    check_output_given,
    check_outputs,
    spell_flags,
    tell_made_lora,
)


@dataclass
class MergedBases:
    """The bases of the result and of LoRAs to move first."""

    target: Annotated[
        str | None,
        base_option(
            "Base model of the result; needed where a LoRA has another, and for DoRA, GLoRA "
            "and OFT."
        ),
    ] = None
    source: Annotated[
        list[str],
        base_option(
            "Base model of a LoRA, once for each in their order; those with another than "
            "--target are moved first."
        ),
    ] = field(default_factory=list)
    into: Annotated[
        str | None,
        base_option("Bake the LoRAs into a copy of this base model; -o names the new model."),
    ] = None
    stochastic: Annotated[
        int | None,
        typer.Option(
            metavar="SEED",
            help="Round --into at random, which keeps more of a LoRA in float8, with more noise.",
        ),
    ] = None

    def open(self, loras: list[Path]) -> tuple[list[Path], Base | None, list[Base]]:
        """Opens all, each once; without options they stand behind the LoRAs, the target last."""
        if self.target is None and not self.source:
            loras, words = split_bases(loras, len(loras))
            self.target, self.source = words[-1] if words else None, words[:-1]
        known: dict[str, Base] = {}
        for name in (self.target, *self.source):
            if name is not None and name not in known:
                known[name] = open_base(name)
        target = None if self.target is None else known[self.target]
        return loras, target, [known[name] for name in self.source]


@expand_options("max_memory", "cache", "dry_run", "card")
def merge(
    loras: LoraArguments,
    merging: MergeOptions,
    bases: MergedBases,
    output: OutputFlags,
) -> None:
    """Merge several LoRAs into one, each moved from its own base first if it has another."""
    check_output_given(output)
    if bases.into is not None:
        return bake_all(loras, merging, bases, output)
    loras, target, sources = bases.open(loras)
    files = [file for base in (target, *sources) if base is not None for file in base.files]
    check_outputs(loras[:1], output, merging, [*loras[1:], *files])
    with progress_bar("merge", output.show_tables) as progress:
        known = find_cache(merging, takes_default=bool(sources))
        options = replace(known, progress=progress)
        report = merge_loras(loras, target, sources, options, out=output.output).report
    tell_made_lora(loras[0], report, output, merging.overwrite)


def bake_all(
    loras: list[Path], merging: MergeOptions, bases: MergedBases, output: OutputFlags
) -> None:
    """Bakes LoRAs into a model, and tells what survived."""
    usual = MergeOptions()
    taken = "strengths", "blocks", "overwrite", "progress"
    ignored = {name for name in vars(usual) if getattr(merging, name) != getattr(usual, name)}
    ignored |= {name for name in ("target", "source") if getattr(bases, name)}
    if ignored := ignored - set(taken):
        flags = ", ".join(str(write_flag(name)) for name in sorted(ignored))
        raise InvalidOption(f"--into makes a model as its base is, and takes no {flags}")
    if output.report not in (None, STDOUT):
        check_free(output.report, overwrite=merging.overwrite)
    with progress_bar("bake", output.show_tables) as progress:
        report = bake(
            loras,
            cast(str, bases.into),
            cast(Path, output.output),
            strengths=merging.strengths,
            blocks=cast(Any, merging.blocks),
            stochastic=bases.stochastic,
            overwrite=merging.overwrite,
            progress=progress,
        )
    if not output.show_tables:
        answer.give(report.to_dict())
    else:
        show_words(out, report.in_words())
    if output.report not in (None, STDOUT):
        report.save(output.report, overwrite=merging.overwrite, spell=spell_flags)
