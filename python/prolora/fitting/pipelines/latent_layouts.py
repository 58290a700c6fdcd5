"""How denoisers lay out the same latents: as an image, one frame of a video, or packed tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ProLoRAError

IMAGE, FRAME, PACKED, OTHER = "image", "frame", "packed", "other"


@dataclass(frozen=True)
class LatentLayout:
    """The layout of a denoiser's latents."""

    # "image" [n, c, h, w]; "frame" [n, c, 1, h, w]; "packed" [n, h·w/4, 4c], patches of 2 × 2 as
    # FLUX packs them; "other" in all other cases.
    kind: str

    @classmethod
    def of(cls, pipe: Any, latent: Tensor) -> LatentLayout:
        """Recognises the layout of a latent [n, ...] of a pipeline's denoiser."""
        if latent.dim() == 4:
            return cls(IMAGE)
        if latent.dim() == 5 and latent.shape[2] == 1:
            return cls(FRAME)
        return cls(PACKED if latent.dim() == 3 and _packs_patches(pipe) else OTHER)

    def unpack(self, latent: Tensor) -> Tensor:
        """Returns the latent as an image [n, c, h, w]."""
        if self.kind == FRAME:
            return latent[:, :, 0]
        if self.kind != PACKED:
            return latent
        n, tokens, width = latent.shape
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ProLoRAError(
                f"a latent of {tokens} tokens is not a square; a fit samples squares"
            )
        return (
            latent.reshape(n, side, side, width // 4, 2, 2)
            .permute(0, 3, 1, 4, 2, 5)
            .reshape(n, width // 4, 2 * side, 2 * side)
        )

    def pack(self, image: Tensor) -> Tensor:
        """Returns an image [n, c, h, w] as a latent."""
        if self.kind == FRAME:
            return image[:, :, None]
        return _pack_patches(image) if self.kind == PACKED else image

    def translate(self, latent: Tensor, other: LatentLayout) -> Tensor:
        """Moves a latent to another layout, unless both are equal."""
        return latent if other == self else other.pack(self.unpack(latent))


def _pack_patches(image: Tensor) -> Tensor:
    n, c, h, w = image.shape
    patches = image.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(n, h * w // 4, 4 * c)


def _packs_patches(pipe: Any) -> bool:
    """Tries on a small latent whether a pipeline packs as FLUX does."""
    pack = getattr(pipe, "_pack_latents", None)
    image = torch.arange(2 * 3 * 4 * 4).float().reshape(2, 3, 4, 4)
    try:
        return pack is not None and torch.equal(pack(image, 2, 3, 4, 4), _pack_patches(image))
    except (TypeError, ValueError, RuntimeError):
        return False


def check_shapes(
    shapes: tuple[Tensor, Tensor],
    layouts: tuple[LatentLayout, LatentLayout],
    names: tuple[str, str],
) -> None:
    """Refuses latents that are not the same numbers in two layouts."""
    source, target = (
        tuple((layout.unpack(latent) if layouts[0] != layouts[1] else latent).shape[1:])
        for layout, latent in zip(layouts, shapes, strict=True)
    )
    if source != target:
        raise ProLoRAError(
            f"{names[0]} denoises {list(source)} numbers and {names[1]} {list(target)}: they "
            "cannot be asked the same question"
        )
