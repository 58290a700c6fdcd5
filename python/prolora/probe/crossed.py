"""What crossed between models with different latents, and what did not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core.lowrank import LowRank
from .recording.trajectories import predict_call
from .recording.translation import Translation
from .recording.wanted import WantedChange
from .updates import run_beside

BANDS = ("palette", "composition", "detail")
"""A change's mean over all places; its means over blocks beside that; the rest."""
BLOCKS = 4
"""Blocks along each side of an image."""


@dataclass(frozen=True)
class BandReport:
    """One band of the wanted change."""

    name: str  # "palette", "composition" or "detail"
    energy: float  # its share of the energy of the wanted change
    reached: float  # 1 − ‖achieved − wanted‖²/‖wanted‖² within it


@dataclass
class CrossedImages:
    """The images that crossed, and what the VAEs kept of them."""

    images: int = 0  # how many there are
    # Side -> Σ‖decode(encode(x)) − x‖² of the images x given to its VAE
    lost: dict[str, float] = field(default_factory=dict)
    # Side -> Σ‖x − mean of x‖² of the same images
    variance: dict[str, float] = field(default_factory=dict)
    shared: bool = False  # both models denoise the same latents, so that nothing had to cross
    _counts: dict[str, int] = field(default_factory=dict)

    def count(self, side: str) -> int:
        """Counts one more image that crosses to a side; the number of those so far."""
        self.images += 1
        self._counts[side] = self._counts.get(side, 0) + 1
        return self._counts[side]

    def add_round_trip(self, side: str, pixels: Tensor, returned: Tensor) -> None:
        """Adds pixels [n, 3, h, w] and their way through the side's VAE and back."""
        pixels = pixels.cpu().double()
        lost = float((returned.cpu() - pixels).square().sum())
        spread = pixels - pixels.mean((2, 3), keepdim=True)
        self.lost[side] = self.lost.get(side, 0.0) + lost
        self.variance[side] = self.variance.get(side, 0.0) + float(spread.square().sum())

    @property
    def round_trip(self) -> dict[str, float]:
        """Side -> ‖decode(encode(x)) − x‖²/‖x − mean‖²; sides without a VAE are not in it."""
        return {
            side: lost / max(self.variance[side], 1e-30) for side, lost in sorted(self.lost.items())
        }

    def report(self, bands: tuple[BandReport, ...]) -> CrossedReport:
        """Reports what crossed, with the bands of the change."""
        return CrossedReport(self.images, self.round_trip, bands, self.shared)


@dataclass(frozen=True)
class CrossedReport:
    """What crossed between two latent spaces."""

    images: int  # number of sampled images that the other model was asked about
    # "source" and "target" -> ‖decode(encode(x)) − x‖²/‖x − mean‖² of images x given to the side's
    # VAE; without a side that denoises pixels
    round_trip: dict[str, float]
    bands: tuple[BandReport, ...] = ()  # of the wanted change of x₀ on the held-out probes
    # Both models denoise the same latents; they were asked about the same images with the same
    # noise.
    shared: bool = False

    def sentences(self) -> list[str]:
        """Writes the result in plain sentences."""
        line = (
            f"Both models were asked about {self.images} sampled images, with the same noise"
            if self.shared
            else f"The latents of the two models are different spaces; {self.images} images "
            "crossed as pixels"
        )
        if self.round_trip:
            lost = (
                f"that of the {side} loses {lost:.0%}" for side, lost in self.round_trip.items()
            )
            line += f" (of the VAEs, {' and '.join(lost)} of an image's variance)"
        shown = any(band.energy > 0 for band in self.bands)
        return [f"{line}.", *([self._describe_bands()] if shown else [])]

    def _describe_bands(self) -> str:
        reached = [f"of the {band.name} {_share_text(band.reached)}" for band in self.bands]
        energies = [f"{band.energy:.0%}" for band in self.bands]
        return (
            f"{_enumerate(reached).capitalize()} crossed, on held-out probes; these hold "
            f"{_enumerate(energies)} of the wanted change."
        )


def split_bands(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Splits an image [n, c, h, w] into the sum of its three orthogonal BANDS."""
    mean = image.mean((2, 3), keepdim=True).expand_as(image)
    rows, columns = (_block_means(side).to(image) for side in image.shape[2:])
    coarse = rows @ image @ columns
    return mean, coarse - mean, image - coarse


def _block_means(side: int) -> Tensor:
    """Returns the projection [side, side] onto vectors constant on each of BLOCKS blocks."""
    block = torch.arange(side) * min(BLOCKS, side) // side
    same = (block[:, None] == block[None]).double()
    return same / same.sum(1, keepdim=True)


@torch.no_grad()
def measure_bands(
    target: nn.Module,
    updates: Mapping[str, LowRank],
    strength: float,
    held_out: Sequence[WantedChange],
    translation: Translation,
) -> tuple[BandReport, ...]:
    """Measures the share of each band that updates reach; empty without an image.

    Args:
        target: the target without updates.
        updates: of the target.
        strength: their factor.
        held_out: probes that the fit did not see.
        translation: gives the image of a change.
    """
    energy, missing = [0.0] * len(BANDS), [0.0] * len(BANDS)
    with run_beside(target, updates, strength):
        for wanted in held_out:
            achieved = predict_call(target, wanted.call, translation.read) - wanted.plain
            image = translation.image_of_change(wanted.call, wanted.change)
            reached = translation.image_of_change(wanted.call, achieved)
            if image is None or reached is None:
                return ()
            ours, theirs = split_bands(image.cpu().double()), split_bands(reached.cpu().double())
            for i, (want, got) in enumerate(zip(ours, theirs, strict=True)):
                energy[i] += float(want.square().sum())
                missing[i] += float((got - want).square().sum())
    total = max(sum(energy), 1e-30)
    return tuple(
        BandReport(name, e / total, 1 - m / max(e, 1e-30))
        for name, e, m in zip(BANDS, energy, missing, strict=True)
    )


def _share_text(share: float) -> str:
    return f"{share:.0%}" if share > 0 else "nothing"


def _enumerate(texts: Sequence[str]) -> str:
    return f"{', '.join(texts[:-1])} and {texts[-1]}"
