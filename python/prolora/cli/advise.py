"""`prolora advise`: what to do with a LoRA between two bases, in one screen."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from ..probe.settings import Probing, read_prompts
from ..workflow.advice import SAMPLED
from ..workflow.advice import advise as find_advice
from .console import out, progress_bar
from .options import (
    Bases,
    JsonOption,
    LoraGuidanceOption,
    LoraStepsOption,
    MatchOption,
    ProbeGuidanceOption,
    ProbeSizeOption,
    ProbeStepsOption,
    PromptOption,
    PromptsOption,
    QuietOption,
    Resources,
    TargetGuidanceOption,
    TargetStepsOption,
    expand_options,
    parse_path,
    write_flag,
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


@dataclass
class SampleOptions:
    """What is sampled where the models are run."""

    panel: ClassVar[str] = "Measuring"
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Run both models on a few of their own trajectories and measure what the moved "
            "LoRA reaches (pipeline folders; no data, no training).",
        ),
    ] = False
    prompt: PromptOption = field(default_factory=list)
    prompts: PromptsOption = None
    probe_images: Annotated[
        int, typer.Option(metavar="N", help="Images that each model samples.")
    ] = SAMPLED.images
    probe_steps: ProbeStepsOption = SAMPLED.steps
    probe_size: ProbeSizeOption = None
    probe_guidance: ProbeGuidanceOption = None
    target_steps: TargetStepsOption = None
    target_guidance: TargetGuidanceOption = None
    lora_steps: LoraStepsOption = None
    lora_guidance: LoraGuidanceOption = None

    def check(self) -> None:
        """Raises ValueError where samples are described although nothing is sampled."""
        if not self.measure and self != SampleOptions():
            raise ValueError(
                "prompts, --probe-…, --target-… and --lora-… are for measuring: add --measure"
            )

    def to_probing(self) -> Probing:
        """As the library takes them."""
        return Probing(
            prompts=(*self.prompt, *(read_prompts(self.prompts) if self.prompts else ())),
            images=self.probe_images,
            steps=self.probe_steps,
            size=self.probe_size,
            guidance=self.probe_guidance,
            target_steps=self.target_steps,
            target_guidance=self.target_guidance,
            lora_steps=self.lora_steps,
            lora_guidance=self.lora_guidance,
        )


@expand_options
def advise(
    bases: Bases,
    asked: AdviseOptions,
    samples: SampleOptions,
    resources: Resources,
    lora: LoraArgument = None,
) -> None:
    """Say what to do with a LoRA between two bases, and what it will give."""
    resources.check_device()
    samples.check()
    with progress_bar("advise", not (asked.quiet or asked.as_json)) as progress:
        advice = find_advice(
            bases.source,
            bases.target,
            lora,
            measure=samples.measure,
            match=asked.match,
            probe=samples.to_probing(),
            cache=resources.find_cache(),
            device=resources.device,
            max_memory=resources.max_bytes,
            progress=progress,
        )
    command = "" if advice.options is None else write_command(lora, bases, advice.options)
    if asked.as_json:
        print(json.dumps(advice.to_dict() | {"command": command}, indent=1))
        return
    if not asked.quiet:
        show_tables(out, advice.tables())
    for sentence in advice.sentences():
        out.print(sentence, style="bold yellow" if sentence.startswith("No-go") else None)
    if command:
        out.print_line(command, style="bold")


def write_command(lora: Path | None, bases: Bases, options: Mapping[str, Any]) -> str:
    """The `prolora transfer …` that follows.

    Args:
        lora: what is moved; a placeholder stands for none.
        bases: as they were given.
        options: those of the transfer.
    """
    file, told = lora or Path("LORA.safetensors"), dict(options)
    if probing := told.pop("probe", None):
        names = [f.name for f in fields(probing) if f.name.startswith(("target_", "lora_"))]
        told |= {name: x for name in names if (x := getattr(probing, name)) is not None}
    flags = (write_flag(name, str(value)) or "" for name, value in told.items())
    words = [word for flag in flags for word in flag.split(" ", 1)]
    out = f"{file.stem}-on-{Path(bases.target).stem}.safetensors"
    line = ["prolora", "transfer", str(file), "--source", bases.source, "--target", bases.target]
    return shlex.join([*line, *words, "-o", out])
