"""The options of `prolora transfer`, panel by panel."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import typer

from ..comparison.verdict import DEFAULT_THRESHOLD, LookMode
from ..core.projection import DEFAULT_RANK
from ..errors import InvalidOption
from ..probe.settings import STARTS, STRATEGIES, Probing, read_prompts
from ..workflow.options import (
    DroppedMode,
    DtypeName,
    FormatLike,
    FormatName,
    MethodChoice,
    ProgramName,
    TextEncoderMode,
    TransferOptions,
    VectorsMode,
)
from .options import (
    InsertedOption,
    JsonOption,
    LoraGuidanceOption,
    LoraStepsOption,
    MatchOption,
    ModulesOption,
    OverwriteOption,
    ProbeGuidanceOption,
    ProbeSizeOption,
    ProbeStepsOption,
    PromptOption,
    PromptsOption,
    QuietOption,
    RankOption,
    SaveMatchOption,
    TargetGuidanceOption,
    TargetStepsOption,
    parse_out_rank,
    parse_path,
    parse_rank,
    parse_share,
    parse_strength,
)

StrategyName = Literal[STRATEGIES]  # type: ignore[valid-type]
StartName = Literal[STARTS]  # type: ignore[valid-type]

MethodOption = Annotated[
    MethodChoice,
    typer.Option(
        help="How to move the LoRA. auto chooses by how far the bases are apart; probe runs the "
        "models."
    ),
]

ThresholdOption = Annotated[
    float,
    typer.Option(
        parser=parse_share,
        metavar="SHARE",
        help="Skip modules whose subspaces overlap (Φ) less than this on either side.",
    ),
]


@dataclass
class MethodOptions:
    """How the updates are moved."""

    panel: ClassVar[str] = "Method"
    method: MethodOption = "auto"
    strength: Annotated[
        str,
        typer.Option(
            metavar="FACTOR|auto",
            help="Factor on every update; auto takes what suits these bases best. Default: auto "
            "with --method auto, otherwise 1.",
        ),
    ] = ""
    look: Annotated[
        LookMode,
        typer.Option(
            help="What auto aims at: the LoRA's idea in the target's own look, or the images that "
            "the LoRA was made for."
        ),
    ] = "target"
    rank: RankOption = str(DEFAULT_RANK)
    dropped: Annotated[
        DroppedMode,
        typer.Option(
            help="Updates of blocks that the target lacks: leave them out, or add them to the "
            "nearest block that is still there."
        ),
    ] = "skip"
    text_encoder: Annotated[
        TextEncoderMode,
        typer.Option(
            help="The LoRA's text-encoder part: copy it unchanged, move it like the rest, or leave "
            "it out."
        ),
    ] = "copy"
    vectors: Annotated[
        VectorsMode,
        typer.Option(help="Trained biases and normalisation layers: copy them, or leave them out."),
    ] = "copy"
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            help="Move a LoRA that prolora moved before, although --source is not the base that it "
            "was moved to.",
        ),
    ] = False

    def to_dict(self) -> dict[str, Any]:
        """As the library takes them."""
        parsed = {"rank": parse_rank(self.rank), "strength": parse_strength(self.strength)}
        return vars(self) | parsed


@dataclass
class MatchOptions:
    """Which module of the source belongs to which of the target."""

    panel: ClassVar[str] = "Matching"
    match: MatchOption = "name"
    inserted: InsertedOption = "skip"
    save_match: SaveMatchOption = None
    threshold: ThresholdOption = DEFAULT_THRESHOLD
    min_coverage: Annotated[
        float,
        typer.Option(
            parser=parse_share,
            metavar="SHARE",
            help="Fail if a smaller share of the LoRA's modules can move.",
        ),
    ] = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As the library takes them."""
        return {name: value for name, value in vars(self).items() if name != "save_match"}


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
    out_rank: Annotated[
        str,
        typer.Option(
            metavar="RANK",
            help="Rank of the output: a number, a share of the energy (0.99), a share of the "
            "LoRA's rank (50%), what fits a file of a size (100MB), or exact (at most twice the "
            "LoRA's).",
        ),
    ] = "exact"
    format: Annotated[
        FormatName, typer.Option(help="Format of the output; auto keeps the LoRA's.")
    ] = "auto"
    for_program: Annotated[
        ProgramName | None,
        typer.Option("--for", help="Instead of a format: the program that reads the output."),
    ] = None
    dtype: Annotated[
        DtypeName | None, typer.Option(help="Type of the factors. Default: the LoRA's.")
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
    overwrite: OverwriteOption = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would move, from headers alone.")
    ] = False
    redo: Annotated[
        bool, typer.Option("--redo", help="With several LoRAs, replace results that are there.")
    ] = False
    modules: ModulesOption = False
    as_json: JsonOption = False
    quiet: QuietOption = False

    @property
    def form(self) -> dict[str, Any]:
        """Format and dtype as the library takes them."""
        dtype = getattr(torch, self.dtype) if self.dtype else None
        return {"format": self.format_or_program, "dtype": dtype}

    @property
    def format_or_program(self) -> FormatLike:
        """What the file is for, or its format.

        Raises:
            InvalidOption: both were given.
        """
        if self.for_program is None:
            return self.format
        if self.format != "auto":
            raise InvalidOption(
                f"--for {self.for_program} chooses the format itself; leave out --format"
            )
        return self.for_program

    @property
    def rank(self) -> int | float | str:
        """The rank of the output as the library takes it."""
        return parse_out_rank(self.out_rank)

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
    probe_strategy: Annotated[
        StrategyName,
        typer.Option(help="Fit all updates at once, or block by block, which takes less memory."),
    ] = "joint"
    probe_start: Annotated[
        StartName,
        typer.Option(
            help="Where the joint fit starts: from no update, from the LoRA moved without probing, "
            "or from the better of the two."
        ),
    ] = "auto"
    probe_fit_steps: Annotated[int, typer.Option(metavar="N", help="Steps of the joint fit.")] = (
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

    def to_probing(self, method: MethodChoice) -> Probing:
        """As the library takes them.

        Raises:
            ValueError: some are given although `method` does not probe.
        """
        if self != ProbeOptions() and not TransferOptions(method=method).runs_models:
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
            strategy=self.probe_strategy,
            start=self.probe_start,
            fit_steps=self.probe_fit_steps,
            force=self.force,
            resume=self.resume,
        )
