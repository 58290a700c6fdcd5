"""`prolora evaluate`: what moved LoRAs give, in images and in scores."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import typer

from ..core.methods import MethodChoice
from ..core.option_fields import take_option
from ..errors import InvalidOption
from ..probe.settings import SAMPLING, FitSettings
from ..workflow.evaluate import evaluate as draw_and_judge
from ..workflow.evaluating.drawing import JSON_FILE, PAGE
from ..workflow.evaluation_options import DRAWN, JUDGING, EvaluationOptions
from .console import out, progress_bar
from .options import (
    CacheOption,
    DeviceOption,
    JsonOption,
    Prompts,
    QuietOption,
    Resources,
    base_argument,
    expand_options,
    path_argument,
    path_option,
)
from .tables import show_tables, show_words


@dataclass
class Files:
    """What is compared, and where the result goes."""

    source: Annotated[str, base_argument("Pipeline that the LoRA was trained on.", "SOURCE")]
    target: Annotated[str, base_argument("Pipeline that it was moved to.", "TARGET")]
    lora: Annotated[
        Path, path_argument("The LoRA (or its hub id), or a folder of several.", "LORA")
    ]
    moved: Annotated[
        list[Path],
        path_argument("What became of it; for several LoRAs, folders.", "MOVED"),
    ] = dataclasses.field(default_factory=list)
    output: Annotated[
        Path,
        path_option(
            "Folder for images, page and JSON; a run that was cut off goes on there.",
            "--output",
            "-o",
            metavar="FOLDER",
        ),
    ] = Path("prolora-evaluation")


def _drawn(name: str, **changed: Any) -> Any:
    """An option of what is sampled, as a fit has it, with the default of an evaluation."""
    return take_option(FitSettings, name, getattr(DRAWN, name), panel=SAMPLING, **changed)


@dataclass
class Drawing:
    """What is drawn."""

    images: int = _drawn("images", help="Images of each prompt, each from noise of its own.")
    steps: int = _drawn("steps")
    size: int | None = _drawn("size")
    guidance: float | None = _drawn("guidance")
    target_steps: int | None = _drawn("target_steps")
    target_guidance: float | None = _drawn("target_guidance")
    lora_steps: int | None = _drawn("lora_steps")
    lora_guidance: float | None = _drawn("lora_guidance")
    seed: int = _drawn("seed", help="Seed of the first image of each prompt.")
    shown_prompts: int = _drawn("shown_prompts", help="Prompts on the page.", metavar="N")


@dataclass
class Judging:
    """What is drawn beside the files, and what judges it."""

    panel: ClassVar[str] = JUDGING
    metric: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=FOLDER",
            help="A metric (clip, dinov2, csd, hpsv2, pickscore) and the folder of its model, or "
            "its id in the Hub's cache on this machine; may be repeated. Nothing is downloaded.",
        ),
    ] = dataclasses.field(default_factory=list)
    method: Annotated[
        list[str],  # typer takes no list of words
        typer.Option(
            metavar="METHOD",
            help="Also move the LoRA by its weights in this way, as a transfer does, and draw it; "
            "may be repeated.",
        ),
    ] = dataclasses.field(default_factory=list)

    def read_metrics(self) -> dict[str, str]:
        """Name -> folder.

        Raises:
            InvalidOption: one has no name or no folder.
        """
        pairs = [text.partition("=") for text in self.metric]
        for name, sign, folder in pairs:
            if not (name and folder):
                text = f"{name}{sign}{folder}"
                raise InvalidOption(f"--metric {text!r}: give a name and a folder: clip=FOLDER")
        names = [name for name, _, _ in pairs]
        if len(set(names)) < len(names):
            raise InvalidOption("--metric: two have one name; give each a name of its own")
        return {name: folder for name, _, folder in pairs}


@dataclass
class Where:
    """Where to compute, and what is kept of the bases; drawing has no bound on memory."""

    panel: ClassVar[str] = "Resources"
    device: DeviceOption = "auto"
    cache: CacheOption = None


@expand_options
def evaluate(
    files: Files,
    judging: Judging,
    asked: EvaluationOptions,
    prompts: Prompts,
    drawing: Drawing,
    where: Where,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw what moved LoRAs give, and compare them with the copy by metrics."""
    resources = Resources(where.device, cache=where.cache)
    resources.check_device()
    with progress_bar("evaluate", not (quiet or as_json)) as progress:
        options = replace(
            asked,
            sampling=FitSettings(prompts.read(), **dataclasses.asdict(drawing)),
            methods=cast(tuple[MethodChoice, ...], tuple(judging.method)),
            metrics=judging.read_metrics(),
            cache=resources.find_cache(),
            device=resources.device,
            progress=progress,
        )
        bases = files.source, files.target
        done = draw_and_judge(*bases, files.lora, files.moved, files.output, options)
    if as_json:
        print((files.output / JSON_FILE).read_text("utf-8"), end="")
        return
    show_words(out, done.in_words())
    if not quiet:
        show_tables(out, done.tables())
    for name in (PAGE, JSON_FILE):
        out.print_line(f"wrote {files.output / name}")
