"""What `prolora transfer` takes beside the options of a transfer: files, and what is sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import typer

from ..probe.settings import STARTS, Probing, read_prompts
from ..workflow.options import TransferOptions
from .options import (
    JsonOption,
    LoraGuidanceOption,
    LoraStepsOption,
    ModulesOption,
    ProbeGuidanceOption,
    ProbeSizeOption,
    ProbeStepsOption,
    PromptOption,
    PromptsOption,
    QuietOption,
    TargetGuidanceOption,
    TargetStepsOption,
    parse_path,
)

StartName = Literal[STARTS]  # type: ignore[valid-type]


@dataclass
class OutputOptions:
    """What is written, and what is shown."""

    panel: ClassVar[str] = "Output"
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=parse_path,
            metavar="PATH",
            help="Output file (.safetensors); a folder if there are several LoRAs.",
        ),
    ] = None
    report: Annotated[
        Path | None,
        typer.Option(
            parser=parse_path,
            metavar="FILE",
            help="Also write the whole report: a page for people if the name ends in .html, "
            "otherwise JSON; - prints the JSON.",
        ),
    ] = None
    card: Annotated[
        bool,
        typer.Option(
            "--card",
            help="Also write a model card for the Hugging Face Hub: README.md beside the output, "
            "or in the folder of several.",
        ),
    ] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would move, from headers alone.")
    ] = False
    modules: ModulesOption = False
    as_json: JsonOption = False
    quiet: QuietOption = False

    @property
    def show_tables(self) -> bool:
        """Whether people read along."""
        return not (self.as_json or self.quiet or self.report == Path("-"))


@dataclass
class ProbeOptions:
    """What is sampled where the models are run."""

    panel: ClassVar[str] = "Probing (only with --method probe)"
    prompt: PromptOption = field(default_factory=list)
    prompts: PromptsOption = None
    probe_images: Annotated[
        int,
        typer.Option(metavar="N", help="Images each model samples; as many again are held out."),
    ] = Probing.images
    probe_steps: ProbeStepsOption = Probing.steps
    probe_size: ProbeSizeOption = None
    probe_guidance: ProbeGuidanceOption = None
    target_steps: TargetStepsOption = None
    target_guidance: TargetGuidanceOption = None
    lora_steps: LoraStepsOption = None
    lora_guidance: LoraGuidanceOption = None
    probe_start: Annotated[
        StartName,
        typer.Option(
            help="Where the fit starts: from no update, from the LoRA moved without probing, "
            "or from the better of the two."
        ),
    ] = "auto"
    probe_fit_steps: Annotated[int, typer.Option(metavar="N", help="Steps of the fit.")] = (
        Probing.fit_steps
    )
    resume: Annotated[
        Path | None,
        typer.Option(
            parser=parse_path,
            metavar="FOLDER",
            help="Folder that keeps finished parts, so that an interrupted run can go on.",
        ),
    ] = None
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Write the LoRA even if the held-out probes speak against it."
        ),
    ] = False

    def to_probing(self, moving: TransferOptions) -> Probing:
        """As the library takes them.

        Raises:
            ValueError: some are given although the method does not probe.
        """
        if self != ProbeOptions() and not moving.runs_models:
            raise ValueError(
                "prompts, --probe-…, --target-…, --lora-…, --resume and --force are for probing: "
                "add --method probe"
            )
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
            start=self.probe_start,
            fit_steps=self.probe_fit_steps,
            force=self.force,
            resume=self.resume,
        )
