"""What the latents of a pipeline show: the way to pixels through its VAE, and back.

Pipelines normalise a VAE's latents each in its own way (a scale, a shift, statistics by channel, a
batch norm over patches) and lay them out in their own. So it is seen on one short sampling: what
the pipeline gives its VAE to decode is a multiple and a shift of each channel of its latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ProLoRAError, UnsupportedFormat

IMAGE, FRAME, PACKED, TOKENS, OTHER = "image", "frame", "packed", "tokens", "other"
"""Layouts of a denoiser's latents: [n, c, h, w]; [n, c, 1, h, w]; [n, h·w/4, 4c], patches of 2 × 2
as FLUX packs them; [n, h·w, c], whatever tokens hold; all others."""


_TOLERANCE = 1e-3  # share of the decoded latents' norm; some pipelines round to half precision


@dataclass(frozen=True)
class LatentSpace:
    """A denoiser's latents and the images that they stand for."""

    vae: Any  # decodes and encodes; None where latents cross as they are
    layout: str = IMAGE  # as the denoiser is given them
    shared: bool = False  # the other model denoises the same latents
    decoded_frame: bool = False  # the VAE is given one
    fold: int = 1  # the VAE's latents are wider and higher by this factor, folded into channels
    # Of each folded channel; the VAE's latents are scale · latent + shift
    scale: Tensor | None = None
    shift: Tensor | None = None  # of each folded channel

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Decodes latents of any layout to pixels [n, 3, h, w], about −1 to 1.

        In float32.
        """
        image = self.as_image(latent).float()
        if self.vae is None:
            return F.pixel_shuffle(image, self.fold)
        scale, shift = self._factors(image)
        stored = F.pixel_shuffle(scale * image + shift, self.fold)
        stored = stored[:, :, None] if self.decoded_frame else stored
        pixels: Tensor = self.vae.decode(stored.to(_dtype_of(self.vae)), return_dict=False)[0]
        return (pixels[:, :, 0] if pixels.dim() == 5 else pixels).float()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encodes pixels [n, 3, h, w] to the denoiser's latents, in float32.

        Where the VAE gives a distribution, they are its mode.
        """
        if self.vae is None:
            return self.as_latent(F.pixel_unshuffle(pixels.float(), self.fold))
        given = (pixels[:, :, None] if self.decoded_frame else pixels).to(_dtype_of(self.vae))
        stored = _read_encoded(self.vae.encode(given)).float()
        image = F.pixel_unshuffle(stored[:, :, 0] if stored.dim() == 5 else stored, self.fold)
        scale, shift = self._factors(image)
        return self.as_latent((image - shift) / scale)

    def _factors(self, image: Tensor) -> tuple[Tensor, Tensor]:
        assert self.scale is not None and self.shift is not None
        scale, shift = (part.to(image)[:, None, None] for part in (self.scale, self.shift))
        return scale, shift

    def as_image(self, latent: Tensor) -> Tensor:
        """Reshapes latents to [n, c, h, w]; tokens must form a square.

        Other layouts stay as they are, where both models denoise the same latents.
        """
        image = latent
        if latent.dim() == 5 and latent.shape[2] == 1:
            image = latent[:, :, 0]
        elif latent.dim() == 3 and self.layout in (PACKED, TOKENS):
            n, tokens, width = latent.shape
            side = math.isqrt(tokens)
            if side * side != tokens:
                raise UnsupportedFormat(
                    f"a latent of {tokens} tokens is not a square; a fit samples squares"
                )
            image = latent.mT.reshape(n, width, side, side)
            image = F.pixel_shuffle(image, 2) if self.layout == PACKED else image
        if image.dim() != 4 and not self.shared:
            raise UnsupportedFormat(f"latents of shape {list(latent.shape)} are not single images")
        return image

    def as_latent(self, image: Tensor) -> Tensor:
        """Reshapes an image [n, c, h, w] to the denoiser's layout."""
        if self.layout == FRAME:
            return image[:, :, None]
        image = F.pixel_unshuffle(image, 2) if self.layout == PACKED else image
        return image.flatten(2).mT if self.layout in (PACKED, TOKENS) else image


def recognise_layout(pipe: Any, latent: Tensor) -> str:
    """Recognises the layout of a latent [n, ...] of a pipeline's denoiser."""
    if latent.dim() == 4:
        return IMAGE
    if latent.dim() == 5 and latent.shape[2] == 1:
        return FRAME
    return PACKED if latent.dim() == 3 and _packs_patches(pipe) else OTHER


def _packs_patches(pipe: Any) -> bool:
    pack = getattr(pipe, "_pack_latents", None)
    image = torch.arange(2 * 3 * 4 * 4).float().reshape(2, 3, 4, 4)
    try:  # on a small latent
        return pack is not None and torch.equal(
            pack(image, 2, 3, 4, 4), LatentSpace(None, PACKED).as_latent(image)
        )
    except (TypeError, ValueError, RuntimeError):
        return False


def check_shapes(
    spaces: tuple[LatentSpace, LatentSpace],
    latents: tuple[Tensor, Tensor],
    names: tuple[str, str],
) -> None:
    """Refuses latents that are not the same numbers in two layouts."""
    same = spaces[0].layout == spaces[1].layout
    source, target = (
        tuple((latent if same else space.as_image(latent)).shape[1:])
        for space, latent in zip(spaces, latents, strict=True)
    )
    if source != target:
        raise ProLoRAError(
            f"{names[0]} denoises {list(source)} numbers and {names[1]} {list(target)}: they "
            "cannot be asked the same question"
        )


def check_shown(pipe: Any, name: str) -> None:
    """Refuses a pipeline whose latents cannot be turned into images and back."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        denoiser: Any = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        if _fold_pixels(getattr(denoiser.config, "in_channels", 3)) is None:
            raise UnsupportedFormat(
                f"{name}: its {type(pipe).__name__} has no VAE, and its latents are not pixels, so "
                "no image can cross to it or from it"
            )
    elif not callable(getattr(vae, "encode", None)) or getattr(vae, "encoder", vae) is None:
        raise UnsupportedFormat(
            f"{name}: its VAE {type(vae).__name__} has no encoder, so no image can cross to it"
        )


def _fold_pixels(channels: int) -> int | None:
    """Returns the side of square patches of three colours; None for other numbers."""
    side = math.isqrt(channels // 3)
    return side if 3 * side**2 == channels else None


def observe_latents(
    pipe: Any, like: Tensor, final: Tensor, given: Tensor | None, name: str
) -> LatentSpace:
    """Observes the latent space of a pipeline on one sampling.

    `like` are latents as the denoiser is given them, `final` those after the scheduler's last step,
    `given` what the VAE was given to decode; None where it never was.
    """
    layout = TOKENS if like.dim() == 3 else recognise_layout(pipe, like)
    space = LatentSpace(getattr(pipe, "vae", None), layout)
    image = space.as_image(final)
    if space.as_image(like).shape[1:] != image.shape[1:]:
        raise UnsupportedFormat(
            f"{name}: its denoiser is given {list(like.shape[1:])} numbers and samples "
            f"{list(final.shape[1:])}, so it is given more than a latent"
        )
    if space.vae is None:
        space = replace(space, fold=_fold_pixels(image.shape[1]) or 1)
    else:
        space = _observe_decoding(space, image, given, f"{name}: its {type(pipe).__name__}")
    _check_round_trip(space, image, name)
    return space


def _observe_decoding(
    space: LatentSpace, image: Tensor, given: Tensor | None, name: str
) -> LatentSpace:
    """Observes what the pipeline does to latents before its VAE decodes them."""
    if given is None:
        raise UnsupportedFormat(f"{name} never decodes its latents")
    stored = given[:, :, 0] if given.dim() == 5 else given
    fold = max(stored.shape[-1] // image.shape[-1], 1)
    folded = (image.shape[1] // fold**2, *(fold * side for side in image.shape[2:]))
    if tuple(stored.shape[1:]) != folded:
        raise UnsupportedFormat(
            f"{name} gives its VAE {list(given.shape[1:])} numbers for latents of "
            f"{list(image.shape[1:])}, and a fit cannot tell how they correspond"
        )
    scale, shift, error = _fit_channels(image, F.pixel_unshuffle(stored, fold))
    if not error < _TOLERANCE or not bool((scale != 0).all()):
        raise UnsupportedFormat(
            f"{name} gives its VAE no multiple of its latents, channel by channel, so a fit "
            "cannot take images to them"
        )
    frame = given.dim() == 5
    return replace(space, decoded_frame=frame, fold=fold, scale=scale, shift=shift)


def _check_round_trip(space: LatentSpace, image: Tensor, name: str) -> None:
    latent = space.as_latent(image)
    vae = type(space.vae).__name__
    try:
        pixels = space.decode(latent)
        back = space.encode(pixels)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # VAEs of diffusers raise any type
        raise UnsupportedFormat(
            f"{name}: its VAE {vae} cannot encode what it decodes: {type(error).__name__}: {error}"
        ) from error
    if pixels.shape[1] != 3 or back.shape != latent.shape:
        raise UnsupportedFormat(
            f"{name}: its VAE {vae} decodes {list(pixels.shape[1:])} numbers, and encodes them as "
            f"{list(back.shape[1:])} where the latents are {list(latent.shape[1:])}"
        )


def _fit_channels(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Fits y ≈ scale · x + shift [c] and its relative error."""
    x, y = (part.cpu().double().movedim(1, 0).flatten(1) for part in (x, y))
    mean_x, mean_y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    spread = (x - mean_x).square().sum(1).clamp_min(1e-30)
    scale = ((x - mean_x) * (y - mean_y)).sum(1) / spread
    shift = mean_y[:, 0] - scale * mean_x[:, 0]
    error = (scale[:, None] * x + shift[:, None] - y).norm() / y.norm().clamp_min(1e-30)
    return scale.float(), shift.float(), float(error)


def _read_encoded(encoded: Any) -> Tensor:
    if hasattr(encoded, "latent_dist"):
        mode: Tensor = encoded.latent_dist.mode()
        return mode
    for name in ("latent", "latents"):
        latent = getattr(encoded, name, None)
        if isinstance(latent, Tensor):
            return latent
    if isinstance(encoded, tuple) and isinstance(encoded[0], Tensor):
        return encoded[0]
    raise ProLoRAError(f"a VAE encodes images as {type(encoded).__name__}, which has no latents")


def _dtype_of(vae: nn.Module) -> torch.dtype:
    return next((p.dtype for p in vae.parameters()), torch.float32)
