"""The demo: a shipped LoRA on another shipped model, and a page of images.

The models are in examples/icon_family: real diffusion transformers with FLUX's module names,
trained on coloured icons of 32 × 32 pixels. Needs the `demo` extra (diffusers).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..adapters import read_adapter
from ..bases.base import Progress
from ..best import transfer
from ..errors import ProLoRAError, join_words
from ..files.store import check_free, put_text
from ..fitting.fit import fit
from ..fitting.models import suited_threads
from ..fitting.settings import SHOWN, FitSettings, read_prompts
from ..fitting.showing import ImageGrid
from ..reports.lora_report import LoraReport, MovedReport
from .console import out, progress_bar
from .flags import OverwriteOption, path_option
from .transfer import show_report, spell_flags

APART = "apart"
"""The member that was trained apart from the source, which weights alone move nothing to."""
STEPS, IMAGES = 16, 16
FEW_STEPS = {"few-step": 4}
"""Members that draw in few steps, and without guidance."""


@dataclass(frozen=True)
class Demo:
    """A LoRA of the family, and where it goes."""

    lora: Path
    source: Path
    target: Path
    moved: Path  # what is written

    @classmethod
    def find(cls, lora: str, target: str, output: Path) -> Demo:
        """Finds the files of a demo by their names.

        Raises:
            ProLoRAError: there is no such target or LoRA.
        """
        models = find_models()
        targets = {path.parent.name: path.parent for path in models.glob("*/model_index.json")}
        source = targets.pop("source")
        files = {path.stem: path for path in models.glob("loras/*.safetensors")}
        for what, name, names in (("target", target, targets), ("LoRA", lora, files)):
            if name not in names:
                choices = ", ".join(sorted(names))
                raise ProLoRAError(f"unknown demo {what} {name!r}: choose from {choices}")
        moved = output / f"{lora}-on-{target}.safetensors"
        return cls(files[lora], source, targets[target], moved)

    @property
    def page(self) -> Path:
        """Returns the path of the page."""
        return self.moved.with_suffix(".html")

    @property
    def prompts(self) -> Path:
        """Returns the file of the prompts."""
        of_concept = self.lora.stem == "concept"
        return self.lora.parents[1] / ("butterflies.txt" if of_concept else "prompts.txt")

    @property
    def command(self) -> str:
        """Returns the command that makes the same LoRA."""
        words = ["prolora", "fit" if self.target.name == APART else "transfer", str(self.lora)]
        words += ["--source", str(self.source), "--target", str(self.target)]
        if steps := FEW_STEPS.get(self.target.name):
            words += ["--target-steps", str(steps)]
        if self.target.name == APART:
            words += ["--prompts", str(self.prompts), "--images", str(IMAGES)]
            words += ["--steps", str(STEPS), "--report", str(self.page)]
        return join_words([*words, "-o", str(self.moved)])

    def run(self, overwrite: bool, progress: Progress | None) -> LoraReport:
        """Moves the LoRA; writes it, and a page with images of both models.

        Raises:
            ProLoRAError: something else is there, or the `demo` extra is missing.
        """
        for path in (self.moved, self.page):
            check_free(path, overwrite=overwrite)
        prompts = read_prompts(self.prompts)
        if self.target.name == APART:
            report = fit(
                self.lora,
                self.source,
                self.target,
                out=self.moved,
                prompts=prompts,
                images=IMAGES,
                steps=STEPS,
                shown_prompts=SHOWN,
                overwrite=overwrite,
                progress=progress,
            ).report
        else:
            steps = FEW_STEPS.get(self.target.name)
            done = transfer(
                self.lora,
                self.source,
                self.target,
                out=self.moved,
                overwrite=overwrite,
                target_steps=steps,
            )
            report = self._draw(done.report, prompts, progress)
        facts = {"LoRA": self.lora.name, "written to": self.moved.name, "by": self.command}
        text = report.to_html(facts, spell_flags)
        put_text(self.page, text, overwrite=overwrite)
        return report

    def _draw(
        self, report: LoraReport, prompts: tuple[str, ...], progress: Progress | None
    ) -> LoraReport:
        """Adds images of both models, without the LoRA and with it."""
        from ..fitting.pipelines.pipeline_opening import open_pipeline

        tell = progress or (lambda done, total, name: None)
        tell(0, 2, "drawing")
        models = open_pipeline(self.source), open_pipeline(self.target)
        settings = FitSettings(
            prompts, steps=STEPS, target_steps=FEW_STEPS.get(self.target.name), shown_prompts=SHOWN
        )
        grid = ImageGrid.of(models, settings, True, False)
        with suited_threads(model.denoiser for model in models):
            grid.draw_source(read_adapter(self.lora).updates, nullcontext)
            tell(1, 2, "drawing")
            grid.draw_target(read_adapter(self.moved).updates, None)
        tell(2, 2, "drawn")
        assert isinstance(report, MovedReport)
        return replace(report, grid=grid.to_page(self.source.name, self.target.name))


def find_models() -> Path:
    """Returns the folder of the shipped models."""
    installed = find_spec("prolora_icon_family")
    places = (installed and installed.submodule_search_locations) or []
    checkout = Path(__file__).resolve().parents[3] / "examples/icon_family"
    for place in (*map(Path, places), checkout):
        if (place / "weights/prompts.safetensors").is_file():
            return place / "weights"
    raise ProLoRAError(
        "the demo's models are a distribution of their own, prolora-icon-family: install it from a "
        "clone of prolora's repository by `pip install ./examples/icon_family`"
    )


def demo(
    output: Annotated[
        Path, path_option("Folder for the results.", "--output", "-o", metavar="FOLDER")
    ] = Path("prolora-demo"),
    lora: Annotated[
        str, typer.Option(help="A shipped LoRA: neon, duotone or concept (a butterfly).")
    ] = "neon",
    target: Annotated[
        str,
        typer.Option(
            help="A shipped base to move to: pruned, far (another art style), few-step, or apart "
            "(trained apart from the source, so that both models run, for a minute or two). "
            "Default: pruned, and then apart."
        ),
    ] = "",
    overwrite: OverwriteOption = False,
) -> None:
    """Move a shipped LoRA between small shipped models, and draw what it does."""
    demos = [Demo.find(lora, name, output) for name in ([target] if target else ["pruned", APART])]
    output.mkdir(parents=True, exist_ok=True)
    for one in demos:
        out.print_line(one.command)
        with progress_bar("demo") as progress:
            report = one.run(overwrite, progress)
        show_report(report)
        for path in (one.moved, one.page):
            out.print_line(f"wrote {path}")
        out.print_line(f"To see it, open {one.page} in a browser.", style="bold")
