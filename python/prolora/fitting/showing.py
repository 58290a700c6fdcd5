"""Images of a fit for its page: the source and the target, with the LoRA and without."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.lowrank import LowRank
from ..errors import NonFiniteWeights, ProLoRAError
from ..reports.page.picture_file import write_png
from ..reports.report import PictureGrid
from .models import in_float32
from .pipelines.pipeline import Pipeline, share_size
from .settings import FitSettings
from .swapping import compute_device
from .updates import with_lora

log = logging.getLogger(__name__)


@dataclass
class ImageGrid:
    """A grid of images, drawn by column; an error ends no fit."""

    models: tuple[Pipeline, Pipeline]  # source and target
    settings: tuple[FitSettings, FitSettings]  # of either, with the size
    prompts: tuple[str, ...]  # one for each row
    carried: bool = False  # both bare models have the LoRA's part in their text encoders in place
    # What is drawn so far: heading -> PNG files, one for each row
    columns: dict[str, list[bytes]] = field(default_factory=dict)
    failure: str = ""  # why the images are missing
    seconds: float = 0.0  # that drawing took

    @classmethod
    def of(
        cls, models: tuple[Pipeline, Pipeline], sampled: FitSettings, shared: bool, carried: bool
    ) -> ImageGrid:
        """Makes a grid of some of the sampled prompts, perhaps without rows.

        `shared` says that both have the same latents, and so the same noise; then a missing size
        becomes the smaller default.
        """
        ours = share_size(sampled, *models) if shared else sampled
        known = sampled.prompts or ("",)
        count = min(sampled.shown_prompts, len(known))
        rows = tuple(known[i * len(known) // count] for i in range(count))
        return cls(models, (ours, models[1].derive_target_settings(ours)), rows, carried)

    def draw_source(
        self,
        updates: Mapping[str, LowRank],
        text_encoders: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Draws the source without and with the LoRA.

        `text_encoders` puts the LoRA's part beside its text encoders.
        """
        self._draw("source", 0, {})
        with text_encoders():
            self._draw("source + LoRA", 0, updates)

    def draw_target(
        self, copied: Mapping[str, LowRank], fitted: Mapping[str, LowRank] | None
    ) -> None:
        """Draws the target without the LoRA, with the copy and with the fitted one.

        No column is drawn for an empty copy or a missing fit.
        """
        self._draw("target", 1, {})
        for name, updates in (("target + copy", copied), ("target + fit", fitted)):
            if updates:
                self._draw(name, 1, updates)

    def _draw(self, name: str, side: int, updates: Mapping[str, LowRank]) -> None:
        """Draws one column; the noise of a row is the same in all."""
        if self.failure or not self.prompts:
            return
        model, settings, drawn = self.models[side], self.settings[side], []
        started = time.perf_counter()
        try:
            # The VAE is away while the target is fitted.
            model.move_beside_denoiser(compute_device(next(model.denoiser.parameters())))
            with in_float32(model.denoiser), with_lora(model.denoiser, updates):
                for row, prompt in enumerate(self.prompts):
                    pixels = read_pixels(model.sample_latents(prompt, settings, row, "pt"))
                    drawn.append(write_png(pixels))
            self.columns[name] = drawn
        except Exception as error:  # diffusers and its models raise any type
            self.failure = f"{name}: {error}"
            log.warning("the page gets no images: %s", self.failure)
        self.seconds += time.perf_counter() - started

    def to_page(self, source: str, target: str) -> PictureGrid | None:
        """Returns what the page shows, unless something could not be drawn."""
        if self.failure or not self.columns:
            return None
        ways = ["without it"]
        if "target + copy" in self.columns:
            ways.append("with the LoRA as weights alone move it")
        if "target + fit" in self.columns:
            ways.append("with the fitted LoRA")
        listed = f"{', '.join(ways[:-1])} and {ways[-1]}" if len(ways) > 1 else ways[0]
        caption = (
            f"Each row is one prompt, drawn from one seed: {source} without the LoRA and with it, "
            f"then {target} {listed}."
        )
        if self.carried:
            caption += " The LoRA's part in the text encoders is in place in all of them."
        return PictureGrid(tuple(self.columns), self.prompts, tuple(self.columns.values()), caption)


def read_pixels(result: Any) -> Tensor:
    """Reads the pixels [3, h, w] from 0 to 1 in a pipeline's result."""
    images = getattr(result, "images", None)
    images = images if isinstance(images, Tensor) else torch.as_tensor(images)
    image = images[0]
    if image.dim() == 3 and image.shape[0] != 3 and image.shape[-1] == 3:
        image = image.permute(2, 0, 1)
    if not bool(torch.isfinite(image).all()):
        raise NonFiniteWeights("the pipeline gives an image that holds NaN or infinities")
    if image.dim() != 3 or image.shape[0] != 3:
        raise ProLoRAError(f"the pipeline gives {list(image.shape)} and no image of three colours")
    return image
