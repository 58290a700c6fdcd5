"""A model as a fit sees it: it draws images, and predicts at their noise levels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ProLoRAError
from .pipelines.latents import LatentSpace
from .pipelines.schedules import NoiseSchedule, align_rows

Read = Callable[[Any], Tensor]
"""A model's return value -> its prediction."""

NO_PROMPT = -1
"""The number of the prompt in a question without one."""


@dataclass(frozen=True)
class Call:
    """One call of a model."""

    args: tuple[Any, ...]  # positional arguments of the model's forward
    kwargs: dict[str, Any]  # its keyword arguments


@dataclass(frozen=True)
class Image:
    """One sampled image."""

    latent: Tensor  # x₀ as the side that drew it denoises it [1, ...], float32
    noise: Tensor  # ε of its first state, alike
    levels: Tensor  # noise levels of the sampler's calls, falling [steps]


class FitSide(ABC):
    """One model as a fit sees it.

    `PipelineSide` is that of a diffusers pipeline. A side of another model has these attributes,
    `sample` and `build_call`.

    Attributes:
        name: for messages.
        denoiser: the module that the LoRA's names start from.
        schedule: what it predicts at a noise level.
        space: its latents; by default both sides share them.
        pixels: height and width of its images, where they cross to other latents.
        prompts: number of the prompts that it is sampled with.
        at_once: samples of one call.
    """

    name: str
    denoiser: nn.Module
    schedule: NoiseSchedule
    space: LatentSpace = LatentSpace(None, shared=True)
    pixels: tuple[int, int] = (0, 0)
    prompts: int = 1
    at_once: int = 16

    @abstractmethod
    def sample(self, number: int, prompt: int) -> Image:
        """Draws an image from noise that belongs to its number."""

    @abstractmethod
    def build_call(
        self, state: Tensor, level: Tensor, prompts: Sequence[int], adapted: bool = False
    ) -> Call:
        """Builds the call at states [n, ...] of noise levels [n].

        `prompts` has a number for each, NO_PROMPT for none; `adapted` says that the LoRA runs.
        """

    def read(self, result: Any) -> Tensor:
        """Reads the prediction in the denoiser's return value."""
        return output_of(result)

    def run_text_encoders(self) -> AbstractContextManager[None]:
        """Runs the LoRA's part in text encoders, where there is one, while it is sampled."""
        return nullcontext()

    @property
    def device(self) -> torch.device:
        """Where its states are computed."""
        return next((p.device for p in self.denoiser.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def predict(
        self, state: Tensor, level: Tensor, prompts: Sequence[int], adapted: bool = False
    ) -> Tensor:
        """Returns the denoiser's prediction; arguments as for `build_call`."""
        call = self.build_call(state, level, prompts, adapted)
        return self.read(self.denoiser(*call.args, **call.kwargs))

    def mix(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Mixes states a·x₀ + b·ε [n, ...] at noise levels [n]."""
        a, b = (align_rows(part, clean) for part in self.schedule.scales(level))
        return (a * clean + b * noise).to(clean)

    def read_clean(self, state: Tensor, level: Tensor, prediction: Tensor) -> Tensor:
        """Reads the x₀ in a prediction f = c·x₀ + d·x."""
        c, d = self._weigh(level, prediction)
        return (prediction - d * state) / c

    def predict_clean(self, state: Tensor, level: Tensor, clean: Tensor) -> Tensor:
        """Returns the prediction f = c·x₀ + d·x that means an x₀."""
        c, d = self._weigh(level, clean)
        return c * clean + d * state

    def _weigh(self, level: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        c, d = self.schedule.weights(level)
        return align_rows(c, like), align_rows(d, like)

    def cross(self, latent: Tensor, other: FitSide) -> Tensor:
        """Moves latents [n, ...] to another side: by their pixels, unless latents are shared."""
        pixels = self.space.decode(latent)
        if not self.space.shared and tuple(pixels.shape[-2:]) != other.pixels:
            pixels = F.interpolate(
                pixels, other.pixels, mode="bicubic", antialias=True, align_corners=False
            )
        return other.space.encode(pixels)

    def convert(
        self, other: FitSide, states: tuple[Tensor, Tensor], level: Tensor, prediction: Tensor
    ) -> Tensor:
        """Converts a prediction at the first state to the other's at the second.

        Both mean one x₀: f' = (c'/c)·f + d'·x' − (c'/c)·d·x where latents are shared.
        """
        if not self.space.shared:
            crossed = self.cross(self.read_clean(states[0], level, prediction), other)
            return other.predict_clean(states[1], level, crossed)
        f, x = (self.space.as_image(part) for part in (prediction, states[0]))
        there = other.space.as_image(states[1])
        (c, d), (c_there, d_there) = self._weigh(level, f), other._weigh(level, there)
        share = c_there / c
        return other.space.as_latent(share * f + (d_there * there - share * d * x))


def output_of(result: Any) -> Tensor:
    """Returns the predicted tensor: the value itself, a tuple's first, or `.sample`.

    A list of tensors is one of samples.
    """
    if isinstance(result, Tensor):
        return result
    if isinstance(result, list) and result and all(isinstance(x, Tensor) for x in result):
        return torch.stack(result)
    if isinstance(result, tuple | list) and result:
        return output_of(result[0])
    if hasattr(result, "sample"):
        return output_of(result.sample)
    raise ProLoRAError(f"a model returned {type(result).__name__}, which holds no prediction")
