"""`prolora evaluate`: what moved LoRAs give, in images and in scores."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from ..core.methods import MethodChoice
from ..core.option_fields import take_option
from ..errors import InvalidOption, name_options
from ..files.writing import write_text_atomically
from ..probe.settings import FitSettings
from ..workflow.evaluate import evaluate as draw_and_judge
from ..workflow.evaluating.drawing import JSON_FILE, PAGE
from ..workflow.evaluation_options import DRAWN, JUDGING, EvaluationOptions
from .console import out, progress_bar
from .options import (
    JsonOption,
    Prompts,
    QuietOption,
    Resources,
    expand_options,
    parse_base,
    parse_path,
    write_flag,
)
from .outputs import read_command
from .tables import show_tables, show_words


def _drawn(name: str, **changed: Any) -> Any:
    """An option of what is sampled, as a fit has it, with the default of an evaluation."""
    return take_option(FitSettings, name, getattr(DRAWN, name), **changed)


@dataclass
class DrawingOptions:
    """What is drawn."""

    panel: ClassVar[str] = "Sampling"
    images: int = _drawn("images", help="Images of each prompt, each from noise of its own.")
    steps: int = _drawn("steps")
    size: int | None = _drawn("size")
    guidance: float | None = _drawn("guidance")
    target_steps: int | None = _drawn("target_steps")
    target_guidance: float | None = _drawn("target_guidance")
    lora_steps: int | None = _drawn("lora_steps")
    lora_guidance: float | None = _drawn("lora_guidance")
    seed: int = _drawn("seed", help="Seed of the first image of each prompt.")
    shown_prompts: int = _drawn("shown_prompts", help="Prompts on the page.", panel="Sampling")


@dataclass
class Judging:
    """What is compared, and by what."""

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
        list[MethodChoice],
        typer.Option(
            help="Also move the LoRA by its weights in this way, and draw it; may be repeated. "
            "The copy is always drawn."
        ),
    ] = dataclasses.field(default_factory=list)
    strength: Annotated[
        list[float],
        typer.Option(
            metavar="FACTOR", help="Also draw the copy at this strength; may be repeated."
        ),
    ] = dataclasses.field(default_factory=list)

    def read_metrics(self) -> dict[str, str]:
        """Name -> folder.

        Raises:
            InvalidOption: one has no name or no folder.
        """
        pairs = [text.partition("=") for text in self.metric]
        for text, (name, _, folder) in zip(self.metric, pairs, strict=True):
            if not (name and folder):
                raise InvalidOption(f"--metric {text!r}: give a name and a folder, clip=FOLDER")
        return {name: folder for name, _, folder in pairs}


@expand_options
def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            parser=parse_base, metavar="SOURCE", help="Pipeline the LoRA was trained on."
        ),
    ],
    target: Annotated[
        str, typer.Argument(parser=parse_base, metavar="TARGET", help="Pipeline it was moved to.")
    ],
    lora: Annotated[
        Path,
        typer.Argument(parser=parse_path, metavar="LORA", help="The LoRA, or a folder of several."),
    ],
    drawing: DrawingOptions,
    judging: Judging,
    prompts: Prompts,
    asked: EvaluationOptions,
    resources: Resources,
    moved: Annotated[
        list[Path],
        typer.Argument(
            parser=parse_path,
            metavar="[MOVED]...",
            help="What became of it; of several LoRAs folders with the same names.",
        ),
    ] = [],  # noqa: B006
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            parser=parse_path,
            metavar="FOLDER",
            help="Folder for images, page and JSON; a run that was cut off goes on there.",
        ),
    ] = Path("prolora-evaluation"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw what moved LoRAs give, and compare them with the copy by metrics."""
    resources.check_device()
    sampling = FitSettings(prompts.read(), **dataclasses.asdict(drawing))
    with progress_bar("evaluate", not (quiet or as_json)) as progress:
        options = replace(
            asked,
            sampling=sampling,
            methods=tuple(judging.method),
            strengths=tuple(judging.strength),
            metrics=judging.read_metrics(),
            cache=resources.find_cache(),
            device=resources.device,
            progress=progress,
        )
        done = draw_and_judge(source, target, lora, moved, output, options)
    page = name_options(done.to_html({"command": read_command()}), write_flag)
    write_text_atomically(output / PAGE, page)
    if as_json:
        print(json.dumps(done.to_dict(), indent=1))
        return
    show_words(out, done.in_words())
    if not quiet:
        show_tables(out, done.tables())
    for name in (PAGE, JSON_FILE):
        out.print_line(f"wrote {output / name}")
