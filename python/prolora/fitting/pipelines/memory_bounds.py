"""Bounds on memory for both pipelines of a fit: a card's, and the machine's.

Before a model is loaded, only the headers of their files are read.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ...architectures.modules import find_block, is_adaptable, matrix_shape, may_be_fitted
from ...bases.folder import open_folder_weights
from ...bases.memory import resident_bytes
from ...bases.pipeline_files import UNUSED_PARTS, read_component_config, read_pipeline_index
from ...core.validation import DeviceLike
from ...errors import TooLittleMemory
from ...files.sizes import format_size
from ..settings import AUTO, BFLOAT16, FLOAT32, FitSettings, Precision
from ..swapping import count_staying
from .prompt_memory import TEXT_ENCODERS

CONTEXT = 10**9
"""Bytes that CUDA and its libraries take; assumed."""
MARGIN = 0.05
"""Of the card, for what its allocator cannot join; assumed."""
MOST_SAMPLES = 16
"""Largest number of samples that a batch is given to spare copies of blocks."""
TILE = 512
"""Pixels of a side of the tiles that VAEs are given, where whole images take too much."""
_IMAGE_BYTES = 7000
"""Of a pixel that a VAE decodes in float32; what Qwen-Image's takes, and twice that of SDXL's."""
_NUMBER_BYTES: Mapping[Precision, int] = {FLOAT32: 4, BFLOAT16: 3}
"""Of a number that is kept for the backward pass; in 16 bits about half of them are float32."""
_WEIGHT_BYTES: Mapping[Precision, tuple[torch.dtype, int]] = {
    FLOAT32: (torch.float32, 4),
    BFLOAT16: (torch.bfloat16, 2),
}
"""Precision -> the dtype that weights are computed in, and its bytes."""
_TEXT = 512  # tokens of a prompt, at most
_OF_TEXT = re.compile(r"add_|context|txt")  # in names of modules that see the prompt alone
_COPIES = 3.5  # of the factors: now, gradient, direction; the last step in 16 bits
_SPECTRA = 16  # eigenvectors of each side


@dataclass(frozen=True)
class CardPlan:
    """What makes a fit fit a card."""

    precision: Precision  # the models compute in it
    tile: int | None  # pixels of the VAEs' tiles; None leaves them as they are
    samples: int | None  # in a batch of the fit, where its step has so many; None: as in calls
    rooms: tuple[int, int]  # bytes for the blocks of source and target while both are there
    fitting: int  # bytes for the target's blocks once it is alone


@dataclass(frozen=True)
class _PipelineSize:
    """The size of a pipeline, in bytes unless stated otherwise."""

    others: int  # VAE and the like, in float32
    outside: int  # the denoiser but for its blocks
    blocks: list[int]  # each of its blocks
    # The weights of the largest block, and of all outside, in the dtype that they are computed in,
    # where they are stored in another
    widened: Mapping[Precision, int]
    factors: int  # Σ(m + n) over the modules of the blocks that may be fitted
    largest: int  # numbers that the largest block keeps of a sample for its backward pass
    between: int  # numbers that lie between the blocks
    pixels: int  # of a side of its images

    @property
    def visiting(self) -> int:
        return max(self.blocks, default=0)

    def activations(self, samples: int, precision: Precision, backward: bool) -> int:
        """Returns the bytes of a pass, with widened weights."""
        kept = (2 * self.largest + self.between) if backward else self.largest
        return samples * _NUMBER_BYTES[precision] * kept + self.widened[precision]


def is_card(device: DeviceLike) -> bool:
    """Returns whether a device has memory of its own."""
    return device is not None and torch.device(device).type != "cpu"


def plan_card(
    limit: int,  # bytes of the card's memory
    folders: tuple[Path, Path],  # of source and target
    settings: FitSettings,  # size of the images, and precision
    rank: int,  # of the LoRA and of the fit
    crosses: bool,  # whether images are decoded and encoded
) -> CardPlan:
    """Returns how a fit keeps within a card's memory.

    The first way that leaves room for all blocks: as asked, in 16 bits, with small tiles. Else
    blocks visit, and the number of samples in a batch is the one with the fewest copies of blocks.
    Nothing is loaded; what a pass keeps is estimated from the shapes of the weights.
    """
    sides = _measure(folders[0], settings.size), _measure(folders[1], settings.size)
    every = [sum(side.blocks) for side in sides]
    usable = int((1 - MARGIN) * limit)
    for precision, tile in _list_ways(settings.precision, crosses):
        both = CONTEXT + _both_there(sides, precision, tile, 2, rank, crosses)
        alone = CONTEXT + _target_alone(sides[1], precision, 2, rank)
        if both + sum(every) <= usable and alone + every[1] <= usable:
            return CardPlan(precision, tile, None, (every[0], every[1]), every[1])
    plans, needed = [], []
    for samples in range(1, MOST_SAMPLES + 1):
        both = CONTEXT + _both_there(sides, precision, tile, samples, rank, crosses)
        alone = CONTEXT + _target_alone(sides[1], precision, samples, rank)
        needed.append(max(both + sum(side.visiting for side in sides), alone + sides[1].visiting))
        if needed[-1] <= usable:
            fitting = min(every[1], usable - alone)
            rooms = _share_room(sides, usable - both, fitting)
            stay = sum(sides[1].blocks[: count_staying(sides[1].blocks, fitting)])
            plan = CardPlan(precision, tile, samples, rooms, fitting)
            plans.append(((every[1] - stay) / samples, -samples, plan))
    if not plans:
        raise TooLittleMemory(
            f"a bound of {format_size(limit)} on the card's memory is too little: with one block "
            f"of each model there at a time, in {precision}, this run needs "
            f"{format_size(math.ceil(needed[0] / (1 - MARGIN)))}"
        )
    return min(plans, key=lambda one: one[:2])[2]


def _list_ways(asked: Precision, crosses: bool) -> Iterator[tuple[Precision, int | None]]:
    """Yields precision and tile, each way beside those before it."""
    if asked == AUTO:
        yield FLOAT32, None
    bits = BFLOAT16 if asked == AUTO else asked
    yield bits, None
    if crosses:
        yield bits, TILE


def _share_room(
    sides: tuple[_PipelineSize, _PipelineSize], room: int, fitting: int
) -> tuple[int, int]:
    """Shares room for blocks in proportion to those that are to stay.

    Each side has room for its largest block. The target gets no more than while it is `fitting`.
    """
    every = [sum(side.blocks) for side in sides]
    spare = room - sum(side.visiting for side in sides)
    ours, theirs = (
        min(size, side.visiting + spare * size // max(sum(every), 1))
        for side, size in zip(sides, every, strict=True)
    )
    return ours, min(fitting, theirs)


def _both_there(
    sides: tuple[_PipelineSize, _PipelineSize],
    precision: Precision,
    tile: int | None,
    samples: int,
    rank: int,
    crosses: bool,
) -> int:
    """Returns the bytes while both are sampled and asked, without their blocks.

    Samplers make calls of two samples, whatever the fit takes.
    """
    passes = [side.activations(max(samples, 2), precision, backward=False) for side in sides]
    if crosses:
        pixels = max(side.pixels for side in sides)
        passes.append(_IMAGE_BYTES * min(pixels, tile or pixels) ** 2)
    held = sum(side.others + side.outside for side in sides)
    return held + max(passes) + 4 * rank * max(side.factors for side in sides)


def _target_alone(side: _PipelineSize, precision: Precision, samples: int, rank: int) -> int:
    """Returns the bytes while the target is fitted, without its blocks."""
    state = int(4 * (_COPIES * rank + _SPECTRA) * side.factors)
    return side.outside + state + side.activations(samples, precision, backward=True)


def _measure(folder: Path, size: int | None) -> _PipelineSize:
    index = read_pipeline_index(folder)
    assert index.denoiser is not None
    part = folder / index.denoiser
    weights = open_folder_weights(part)
    config = read_component_config(part)
    levels = len(config.get("block_out_channels") or ()) if index.denoiser == "unet" else 0
    sample = config.get("sample_size")  # eight pixels a latent
    pixels = size or (8 * sample if levels and isinstance(sample, int) else 1024)
    blocks: dict[str, int] = defaultdict(int)
    wide: dict[Precision, dict[str, int]] = {way: defaultdict(int) for way in _WEIGHT_BYTES}
    kept: dict[str, int] = defaultdict(int)
    widths: dict[str, list[int]] = defaultdict(list)
    outside = factors = 0
    for key, weight in weights.items():
        name, shape = key.rpartition(".")[0], tuple(weight.shape)
        bytes_ = math.prod(shape) * weight.dtype.itemsize
        position = find_block(name)
        unit = f"{position.stack}.{position.number}" if position else _find_resnet(name)
        if position:
            blocks[unit] += bytes_
        else:
            outside += bytes_
        for way, (own, size_of) in _WEIGHT_BYTES.items():
            wide[way][unit] += size_of * math.prod(shape) if weight.dtype != own else 0
        if unit and len(shape) in (2, 4):
            places = _count_places(name, pixels, levels)
            kept[unit] += places * (shape[0] + shape[1])
            widths[unit].append(places * shape[1])
            factors += sum(matrix_shape(shape)) if may_be_fitted(shape) else 0
    return _PipelineSize(
        others=estimate_bytes(folder)[1] - outside - sum(blocks.values()),
        outside=outside,
        blocks=list(blocks.values()),
        # The largest unit, and all outside of units, which is kept for a whole pass.
        widened={
            way: parts.get("", 0) + max((n for unit, n in parts.items() if unit), default=0)
            for way, parts in wide.items()
        },
        factors=factors,
        largest=max(kept.values(), default=0),
        between=int(sum(median(several) for several in widths.values())),
        pixels=pixels,
    )


def check_memory(limit: int, folders: tuple[Path, Path], device: DeviceLike) -> None:
    """Refuses a bound on the machine's memory that the models alone exceed."""
    (ours, others), (theirs, rest) = map(estimate_bytes, folders)
    on_host = not is_card(device)
    least = resident_bytes() + max(ours + others, theirs + rest + (others if on_host else 0))
    if least > limit:
        raise TooLittleMemory(
            f"a bound of {format_size(limit)} on memory is too little: the two pipelines alone "
            f"need {format_size(least)} at a time"
        )


def watch_memory(limit: int | None) -> Callable[[float], None]:
    """Returns what refuses a bound on the machine's memory in the middle of a stage.

    It is called with the share of the stage that is done.
    """
    loaded = resident_bytes() if limit is not None else 0

    def check(share: float) -> None:
        taken = resident_bytes() if limit is not None else 0
        if limit is not None and taken > limit:
            needed = loaded + (taken - loaded) / share
            raise TooLittleMemory(
                f"a bound of {format_size(limit)} on memory is too little: with {share:.0%} of a "
                f"stage done this run takes {format_size(taken)}, and will need about "
                f"{format_size(needed)}; sample fewer images, or in fewer steps"
            )

    return check


def estimate_bytes(folder: Path) -> tuple[int, int]:
    """Estimates a pipeline's weights in bytes: text encoders, other models.

    The denoiser stays as it is stored; the other models are in float32.
    """
    index = read_pipeline_index(folder)
    encoders = others = 0
    for name in index.parts:
        if name in UNUSED_PARTS or not list((folder / name).glob("*.safetensors")):
            continue
        weights = open_folder_weights(folder / name).values()
        stored = name == index.denoiser
        size = sum(math.prod(w.shape) * (w.dtype.itemsize if stored else 4) for w in weights)
        if name.startswith(TEXT_ENCODERS):
            encoders += size
        else:
            others += size
    return encoders, others


def shrink_tiles(vae: Any, pixels: int) -> None:
    """Makes the tiles of a VAE smaller, with the same overlap, if it can."""
    if hasattr(vae, "tile_latent_min_size") and pixels < vae.tile_sample_min_size:
        vae.tile_latent_min_size = pixels * vae.tile_latent_min_size // vae.tile_sample_min_size
        vae.tile_sample_min_size = pixels
    for side in ("height", "width"):
        least, stride = f"tile_sample_min_{side}", f"tile_sample_stride_{side}"
        if hasattr(vae, stride) and pixels < getattr(vae, least):
            setattr(vae, stride, pixels * getattr(vae, stride) // getattr(vae, least))
            setattr(vae, least, pixels)


def _find_resnet(name: str) -> str:
    """Returns the residual block around a UNet's convolution; "" outside."""
    before, found, after = name.partition(".resnets.")
    return f"{before}.resnets.{after.split('.')[0]}" if found else ""


def _count_places(name: str, pixels: int, levels: int) -> int:
    """Counts the tokens or pixels of a sample that a module sees.

    Eight pixels of an image are one of its latent. A UNet halves it from level to level; a
    transformer has a token for 2 × 2 of it, and the prompt's tokens, which may have modules of
    their own; what makes scales and shifts sees the time step alone.
    """
    if not levels:
        if not is_adaptable(name):
            return 1
        return _TEXT if _OF_TEXT.search(name) else (pixels // 16) ** 2 + _TEXT
    words = name.split(".")
    level = levels - 1
    if words[0] == "down_blocks":
        level = int(words[1])
    elif words[0] == "up_blocks":
        level = levels - 1 - int(words[1])
    return max((pixels // 8) >> level, 1) ** 2
