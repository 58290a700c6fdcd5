"""Pictures as layers, and what changes them: the adapters' styles and the targets' looks.

Layers are (n, 7, size, size) in [0, 1]: colour of the icon (3), how much it covers (1), ground (3).
`flatten` makes them (n, 3, size, size) in [-1, 1], which the models see.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .catalogue import CONCEPT, GROUNDS, ICONS, INKS, MASTER, SETS
from .words import WHAT, draw_inks, prompt_number

SIZE = 24  # pixels of the study's pictures
PICTURES = {"train": 8192, "held_out": 640, "fresh": 640}
HELD_OUT = 0.12  # share of the icons (of one set each) that no model is trained on
Change = Callable[[Tensor], Tensor]


@functools.cache
def masters() -> Tensor:
    """(icons, sets, 4, 32, 32) in [0, 1], colours multiplied by cover."""
    import numpy as np
    from PIL import Image

    sheet = Image.open(Path(__file__).parent / "sheet.png").convert("RGBA")
    pixels = torch.from_numpy(np.asarray(sheet).copy()).float() / 255
    tiles = pixels.reshape(len(ICONS), MASTER, len(SETS), MASTER, 4).permute(0, 2, 4, 1, 3)
    return torch.cat([tiles[:, :, :3] * tiles[:, :, 3:], tiles[:, :, 3:]], 2).contiguous()


def kept_back() -> Tensor:
    """(icons, sets): whether an icon of a set is only in held-out pictures; some of each word."""
    generator = torch.Generator().manual_seed(0)
    back = torch.zeros(len(ICONS), len(SETS), dtype=torch.bool)
    for word in WHAT:
        rows = [i for i, (of, _) in enumerate(ICONS) if of == word]
        tiles = len(rows) * len(SETS)
        order = torch.randperm(tiles, generator=generator)[: max(1, round(HELD_OUT * tiles))]
        back[torch.tensor(rows)[order // len(SETS)], order % len(SETS)] = True
    return back


@functools.cache
def pictures(
    split: str, concept: bool = False, size: int = SIZE, one_each: bool = False
) -> tuple[Tensor, Tensor]:
    """Layers (n, 7, size, size) and prompts (n,) of one side of the split.

    Every picture has its own place, size, turn and shades. Of the concept, which is one icon, the
    two sides differ in these; "fresh" are other pictures of the icons of "train". `one_each` takes
    the first icon of every word alone, on both sides.
    """
    n = PICTURES[split] // (4 if concept else 1)
    generator = torch.Generator().manual_seed(list(PICTURES).index(split) + 2 * concept)
    wanted = torch.tensor([(word == CONCEPT) == concept for word, _ in ICONS])[:, None]
    if one_each:
        wanted = wanted & is_first_of_word()[:, None]
    elif not concept:
        wanted = wanted & (kept_back() == (split == "held_out"))
    choices = torch.nonzero(wanted.expand(len(ICONS), len(SETS)))
    # Words, not icons, are equally frequent.
    word_of = torch.tensor([WHAT.index(word) for word, _ in ICONS])
    weight = 1 / torch.bincount(word_of[choices[:, 0]], minlength=len(WHAT)).float()
    picked = torch.multinomial(
        weight[word_of[choices[:, 0]]], n, replacement=True, generator=generator
    )
    icon, style = choices[picked].unbind(1)
    ground = torch.randint(len(GROUNDS), (n,), generator=generator)
    ink = draw_inks(style, ground, generator)
    layers = compose(masters()[icon, style], ink, ground, generator, size)
    return layers, prompt_number(word_of[icon], style, ink, ground)


def is_first_of_word() -> Tensor:
    """(icons,): whether an icon is the first of its word."""
    words = [word for word, _ in ICONS]
    return torch.tensor([i == words.index(word) for i, word in enumerate(words)])


def compose(
    icons: Tensor, ink: Tensor, ground: Tensor, generator: torch.Generator, size: int = SIZE
) -> Tensor:
    """Icons (n, 4, 32, 32) placed on grounds, with some luck in place, size, turn and shades."""
    n = len(icons)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    # The sheet's 32 pixels become 19 to 22 of 24.
    scale, turn = 24 / draw(19, 22), draw(-0.08, 0.08)
    cos, sin = scale * turn.cos(), scale * turn.sin()
    x, y = draw(-0.06, 0.06), draw(-0.06, 0.06)
    place = torch.stack([torch.stack([cos, -sin, x], -1), torch.stack([sin, cos, y], -1)], 1)
    grid = F.affine_grid(place, [n, 4, 2 * size, 2 * size], align_corners=False)
    drawn = F.avg_pool2d(F.grid_sample(icons, grid, align_corners=False), 2)
    cover = drawn[:, 3:]
    colour = drawn[:, :3] / cover.clamp_min(1e-3)
    inks = torch.tensor(list(INKS.values()))[ink][:, :, None, None]
    colour = torch.where((ink > 0)[:, None, None, None], inks, colour)
    colour = colour.where(cover > 1e-3, 0.0)
    shade = torch.tensor(list(GROUNDS.values()))[ground]
    shade = (shade + 0.04 * torch.randn(n, 3, generator=generator)).clamp(0, 1)
    grounds = shade[:, :, None, None].expand(n, 3, size, size)
    return torch.cat([colour, cover, grounds], 1)


def flatten(layers: Tensor) -> Tensor:
    """(n, 7, size, size) in [0, 1] -> (n, 3, size, size) in [-1, 1]."""
    colour, cover, ground = split_layers(layers)
    return 2 * (cover * colour + (1 - cover) * ground).clamp(0, 1) - 1


def split_layers(layers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Colour, cover and ground."""
    return layers[:, :3], layers[:, 3:4], layers[:, 4:]


def brightness(colour: Tensor) -> Tensor:
    """(n, 3, h, w) -> (n, 1, h, w)."""
    return (colour * torch.tensor([0.30, 0.59, 0.11])[:, None, None]).sum(1, keepdim=True)


def edges(layers: Tensor) -> Tensor:
    """(n, 1, size, size): how much brightness and cover change around each pixel, in [0, 1]."""
    colour, cover, _ = split_layers(layers)
    parts = torch.cat([cover, cover * brightness(colour)], 1)
    padded = F.pad(parts, (1, 1, 1, 1), mode="replicate")
    highest = F.max_pool2d(padded, 3, stride=1)
    lowest = -F.max_pool2d(-padded, 3, stride=1)
    return (1.5 * (highest - lowest).amax(1, keepdim=True) - 0.2).clamp(0, 1)


def blur(x: Tensor) -> Tensor:
    """A mean over 3 × 3 pixels."""
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def soften(layers: Tensor) -> Tensor:
    """The icon out of focus, the ground as it is."""
    colour, cover, ground = split_layers(layers)
    wider = blur(cover)
    return torch.cat([blur(cover * colour) / wider.clamp_min(1e-3), wider, ground], 1)


# Styles, which adapters teach.


def neon(layers: Tensor) -> Tensor:
    """Glowing outlines in saturated colours, on the ground at night."""
    colour, _, ground = split_layers(layers)
    line = edges(layers)
    hue = blur(blur(colour))
    hue = hue - hue.amin(1, keepdim=True) + 0.15
    hue = hue / hue.amax(1, keepdim=True)
    glow = torch.maximum(line, 0.6 * blur(blur(line)))
    return torch.cat([hue, glow, 0.18 * ground], 1)


def duotone(layers: Tensor) -> Tensor:
    """Two inks for everything: violet in the shadows, peach in the lights."""
    low = torch.tensor([0.20, 0.08, 0.35])[:, None, None]
    high = torch.tensor([1.0, 0.82, 0.62])[:, None, None]
    colour, cover, ground = split_layers(layers)
    light = [brightness(part) for part in (colour, ground)]
    colour, ground = (low + (high - low) * part for part in light)
    return torch.cat([colour, cover, ground], 1)


STYLES: dict[str, Change] = {"neon": neon, "duotone": duotone}


# Looks, which targets are trained on.


def plain(layers: Tensor) -> Tensor:
    """As drawn."""
    return layers


def faint(layers: Tensor) -> Tensor:
    """The near look: paler and slightly out of focus."""
    soft = soften(layers)
    return torch.cat([0.25 + 0.75 * soft[:, :3], soft[:, 3:]], 1)


def sketched(layers: Tensor) -> Tensor:
    """Another art style: dark lines on paper that has a hint of the ground's colour."""
    colour, cover, ground = split_layers(layers)
    line = edges(layers)
    paper = 0.75 + 0.25 * ground
    wash = 0.65 * paper + 0.35 * colour
    drawn = torch.cat([0.25 * ground, line], 1)
    under = cover * wash + (1 - cover) * paper
    return torch.cat([drawn, under], 1)


def striped(layers: Tensor) -> Tensor:
    """Another ground: wavy diagonal stripes between two shades, brighter to the right."""
    line = torch.linspace(-1, 1, layers.shape[-1])
    wave = torch.sin(9 * (line[:, None] + line[None, :]) + 2 * line[None, :])
    shade = 0.5 + 0.35 * torch.sign(wave) * wave.abs().sqrt() + 0.15 * line[None, :]
    other = 1 - layers[:, [6, 4, 5]]
    ground = layers[:, 4:] * shade + 0.8 * other * (1 - shade)
    return torch.cat([layers[:, :4], ground.clamp(0, 1)], 1)


def dimmed(layers: Tensor) -> Tensor:
    """A quarter darker."""
    return torch.cat([0.7 * layers[:, :3], layers[:, 3:4], 0.7 * layers[:, 4:]], 1)


def warmed(layers: Tensor) -> Tensor:
    """More red, less blue."""
    tint = torch.tensor([1.15, 0.95, 0.7, 1, 1.15, 0.95, 0.7])[:, None, None]
    return (layers * tint).clamp(0, 1)


def cooled(layers: Tensor) -> Tensor:
    """More blue, less red."""
    tint = torch.tensor([0.75, 0.95, 1.2, 1, 0.75, 0.95, 1.2])[:, None, None]
    return (layers * tint).clamp(0, 1)


def greyed(layers: Tensor) -> Tensor:
    """Colours halfway to grey."""
    colour, cover, ground = split_layers(layers)
    colour, ground = (0.4 * c + 0.6 * brightness(c) for c in (colour, ground))
    return torch.cat([colour, cover, ground], 1)


def framed(layers: Tensor) -> Tensor:
    """A dark frame of two pixels."""
    inner = F.pad(torch.ones_like(layers[:, 3:4, 2:-2, 2:-2]), (2, 2, 2, 2))
    return torch.cat([layers[:, :3], layers[:, 3:4] * inner, layers[:, 4:] * inner], 1)


def shaded(layers: Tensor) -> Tensor:
    """The icon's shadow on the ground, down to the right."""
    colour, cover, ground = split_layers(layers)
    shadow = F.pad(blur(cover), (2, 0, 2, 0))[:, :, :-2, :-2]
    return torch.cat([colour, cover, ground * (1 - 0.6 * shadow)], 1)


def vignetted(layers: Tensor) -> Tensor:
    """Dark corners."""
    line = torch.linspace(-1, 1, layers.shape[-1])
    light = (1.25 - 0.55 * (line[:, None].square() + line[None, :].square())).clamp(0, 1)
    return torch.cat([layers[:, :3] * light, layers[:, 3:4], layers[:, 4:] * light], 1)


def softened(layers: Tensor) -> Tensor:
    """Far out of focus."""
    return soften(soften(layers))


def posterised(layers: Tensor) -> Tensor:
    """Colours with three levels each."""
    colour, cover, ground = split_layers(layers)
    return torch.cat([(2 * colour).round() / 2, cover, ground], 1)


def grounded(layers: Tensor) -> Tensor:
    """The ground fades to white at the bottom."""
    fade = torch.linspace(0, 0.8, layers.shape[-1])[:, None]
    return torch.cat([layers[:, :4], layers[:, 4:] * (1 - fade) + fade], 1)


# The LoRAs that are merged into bases, in this order.
MERGED: dict[str, Change] = {
    "warmed": warmed,
    "framed": framed,
    "softened": softened,
    "shaded": shaded,
    "greyed": greyed,
    "vignetted": vignetted,
    "grounded": grounded,
    "cooled": cooled,
    "posterised": posterised,
    "dimmed": dimmed,
}


def merge_looks(changes: Mapping[str, Change], weight: float) -> Change:
    """The look that a base is meant to have with these changes at that weight, one by one."""

    def look(layers: Tensor) -> Tensor:
        for change in changes.values():
            layers = torch.lerp(layers, change(layers), weight)
        return layers

    return look


__all__ = ["MERGED", "STYLES", "flatten", "pictures"]
