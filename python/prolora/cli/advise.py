"""`prolora advise`: what to do with a LoRA between two bases, in one screen."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from ..core.option_fields import take_option
from ..probe.settings import FitSettings
from ..workflow.advice import SAMPLED
from ..workflow.advice import advise as find_advice
from .console import out, progress_bar
from .options import (
    Bases,
    JsonOption,
    MatchOption,
    Prompts,
    QuietOption,
    Resources,
    expand_options,
    parse_path,
)
from .tables import show_tables

LoraArgument = Annotated[
    Path | None,
    typer.Argument(parser=parse_path, metavar="[LORA]", help="A LoRA file or PEFT folder."),
]


@dataclass
class AdviseOptions:
    """What is asked, and what is shown."""

    match: MatchOption = "auto"
    as_json: JsonOption = False
    quiet: QuietOption = False


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
    asked: AdviseOptions,
    samples: SampleOptions,
    prompts: Prompts,
    resources: Resources,
    lora: LoraArgument = None,
) -> None:
    """Say what to do with a LoRA between two bases, and what it will give."""
    resources.check_device()
    sampled = samples.read(prompts)
    with progress_bar("advise", not (asked.quiet or asked.as_json)) as progress:
        advice = find_advice(
            bases.source,
            bases.target,
            lora,
            measure=samples.measure,
            match=asked.match,
            probe=sampled,
            cache=resources.find_cache(),
            device=resources.device,
            max_memory=resources.max_bytes,
            progress=progress,
        )
    if asked.as_json:
        print(json.dumps(advice.to_dict(), indent=1))
        return
    if not asked.quiet:
        show_tables(out, advice.tables())
    for sentence in advice.sentences():
        out.print(sentence, style="bold yellow" if sentence.startswith("No-go") else None)
    if advice.command:
        out.print_line(advice.command, style="bold")
