"""`prolora advise`: what to do with a LoRA between two bases, in one screen."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from ..comparison.block_matching import resolve_match
from ..comparison.comparison import OVERLAP_RANK
from ..comparison.module_map import Match
from ..core.option_fields import find_shown, take_option
from ..core.rank_rule import Rank
from ..core.verdict import AUTO
from ..errors import name_options
from ..files.hub import spell_path
from ..files.store import put_text
from ..probe.settings import FitSettings
from ..workflow.advice import SAMPLED, Advice
from ..workflow.advice import advise as find_advice
from ..workflow.advice_options import AdviceOptions
from ..workflow.output_paths import is_page_path, split_lora_name
from .console import answer, out, progress_bar
from .options import (
    Bases,
    ExplainOption,
    JsonOption,
    MatchOption,
    ModulesOption,
    OverwriteOption,
    Prompts,
    QuietOption,
    Resources,
    SaveMatchOption,
    expand_options,
    parse_rank,
    path_argument,
    path_option,
    write_flag,
)
from .outputs import check_match_file, check_report, read_command, save_match
from .tables import show_tables, show_words

LoraArgument = Annotated[
    Path | None, path_argument("A LoRA file, PEFT folder or hub id.", metavar="[LORA]")
]


@dataclass
class CompareOptions:
    """What is compared, and what is written."""

    panel: ClassVar[str] = "Comparing"
    match: MatchOption = "auto"
    overlap: Annotated[
        str | None,
        typer.Option(metavar="RANK", help=find_shown(AdviceOptions, "overlap").help),
    ] = None
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Also show the overlaps at fewer columns.")
    ] = False
    save_match: SaveMatchOption = None
    report: Annotated[
        Path | None,
        path_option(
            "Also write everything: a page with a map if the name ends in .html, else JSON."
        ),
    ] = None
    overwrite: OverwriteOption = False
    explain: ExplainOption = False
    modules: ModulesOption = False
    as_json: JsonOption = False
    quiet: QuietOption = False

    def find_rank(self) -> Rank | None:
        """Of the subspaces that are compared; None compares none."""
        if self.overlap is None:
            return OVERLAP_RANK if self.sweep else None
        return parse_rank(self.overlap, "--overlap")


def _sampled(name: str) -> Any:
    """An option of what is sampled, as a fit has it, with the default of a measurement."""
    return take_option(FitSettings, name, getattr(SAMPLED, name))


@dataclass
class SampleOptions:
    """What is sampled where the models are run."""

    panel: ClassVar[str] = "Sampling"
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Run both models on a few of their own trajectories and measure what the moved "
            "LoRA reaches (pipeline folders; no data, no training).",
        ),
    ] = False
    images: int = _sampled("images")
    steps: int = _sampled("steps")
    size: int | None = _sampled("size")
    guidance: float | None = _sampled("guidance")
    target_steps: int | None = _sampled("target_steps")
    target_guidance: float | None = _sampled("target_guidance")
    lora_steps: int | None = _sampled("lora_steps")
    lora_guidance: float | None = _sampled("lora_guidance")

    def read(self, prompts: Prompts) -> FitSettings:
        """As the library takes them.

        Raises:
            ValueError: samples are described although nothing is sampled.
        """
        if not self.measure and (self != SampleOptions() or prompts != Prompts()):
            raise ValueError(
                "prompts, images, steps, sizes and guidance are for measuring: add --measure"
            )
        names = [known.name for known in fields(self) if known.name != "measure"]
        return FitSettings(prompts.read(), **{name: getattr(self, name) for name in names})


@expand_options
def advise(
    bases: Bases,
    asked: CompareOptions,
    samples: SampleOptions,
    prompts: Prompts,
    resources: Resources,
    lora: LoraArgument = None,
) -> None:
    """Say what to do with a LoRA between two bases, and what it will give."""
    resources.check_device()
    sampled, rank = samples.read(prompts), asked.find_rank()
    source, target = bases.open()
    files = [*source.files, *target.files]
    if asked.save_match is not None:
        check_match_file(asked.save_match, files, asked.overwrite)
    if asked.report is not None:
        check_report(asked.report, [], [lora] if lora else [], files, asked.overwrite)
    how = resources.read()
    with progress_bar("advise", not (asked.quiet or asked.as_json)) as progress:
        how |= {"progress": progress}
        match: Match = asked.match
        if asked.save_match is not None:
            match = resolve_match(match, source, target, **how)
            save_match(asked.save_match, source, target, match, asked.overwrite)
            asked.match = str(asked.save_match)
        options = AdviceOptions(
            match=match, overlap=rank, measure=sampled if samples.measure else False, **how
        )
        advice = find_advice(source, target, lora, options)
    command = write_command(lora, bases, advice, asked.match)
    if asked.report is not None:
        write_report(asked.report, advice, command, asked.overwrite)
    if asked.as_json:
        answer.give(advice.to_dict() | {"command": command})
        return
    show_words(out, advice.in_words())
    if asked.explain or asked.modules or rank is not None:
        show_tables(out, advice.tables(asked.modules, asked.sweep))
        for sentence in advice.sentences():
            out.print(sentence)
    elif not asked.quiet:
        out.print("--explain shows the numbers behind this.", style="dim")
    for path in (asked.save_match, asked.report):
        if path is not None:
            out.print_line(f"wrote {path}")
    if command:
        out.print_line(command, style="bold")


def write_report(path: Path, advice: Advice, command: str, overwrite: bool) -> None:
    """Everything, as a page or as JSON."""
    if is_page_path(path):
        page = advice.to_html({"made by": read_command(), "command": command})
        text = name_options(page, write_flag)
    else:
        text = json.dumps(advice.to_dict() | {"command": command}, indent=1) + "\n"
    put_text(path, text, overwrite=overwrite)


def write_command(lora: Path | None, bases: Bases, advice: Advice, match: str = AUTO) -> str:
    """The command line that follows; "" where nothing is worth a try.

    Args:
        lora: what is moved; a placeholder stands for none.
        bases: as they were given.
        advice: what to do.
        match: as the next command is to take it.
    """
    if not advice.verb:
        return ""
    file = lora or Path("LORA.safetensors")
    options = dict(advice.options) | ({"match": match} if "match" in advice.options else {})
    flags = (write_flag(name, str(value)) or "" for name, value in options.items())
    words = [word for flag in flags for word in flag.split(" ", 1)]
    out = f"{split_lora_name(file)[0]}-on-{split_lora_name(Path(bases.target))[0]}.safetensors"
    line = [
        "prolora",
        advice.verb,
        spell_path(file),
        "--source",
        bases.source,
        "--target",
        bases.target,
    ]
    return shlex.join([*line, *words, "-o", out])
