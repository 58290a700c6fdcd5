"""Samples a person can look at: ``python bench/quality/grid.py --work DIR`` draws docs/images.

With --out it draws there; with --bases only what the source and the targets draw by themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from contenders import CHOSEN, METHODS
from evidence import RELATED, ROOT
from icons.words import WHAT
from models import Folder, load_lora
from PIL import Image, ImageDraw
from scoring import FEW_STEPS, SAMPLE_STEPS, STUDENT_STEPS, apply_updates
from study import loaded
from torch import Tensor, nn
from worlds import NAMES, World, load_world


@dataclass(frozen=True)
class Sheet:
    """What is drawn of a world, and how large.

    Attributes:
        columns: adapter -> how many images.
        kinds: of target.
        every: of the prompts that are scored, every how many-th is drawn.
        contents: the words of the judge's classes, for the heads of the columns; () for none.
        pixels: of an image, each way.
        label: pixels at the left.
        font: height of the letters.
    """

    columns: dict[str, int]
    kinds: tuple[str, ...]
    every: int = 1
    contents: Sequence[str] = ()
    pixels: int = 32
    label: int = 118
    font: int = 10


SHEETS = {
    "digits": Sheet({"thick": 6, "slanted": 6, "concept": 5, "fewstep": 6}, RELATED),
    "icons": Sheet(
        {"neon": 6, "duotone": 4, "concept": 4},
        ("pruned", "far", "merged 1", "few-step"),
        every=3,
        contents=WHAT,
        pixels=56,
        label=170,
        font=14,
    ),
}
ROWS = ("no adapter", "copy", "prolora 0.9", "auto", "trained there")
GAP = 8


def draw_samples(folder: Folder, kind: str, model: nn.Module, adapter: str) -> Tensor:
    """Images for what the adapter is about, from the same noise for every row."""
    world, y = folder.world, choose_prompts(folder.world, adapter)
    few_step = world.distilled.get(kind) == "lines"
    steps = STUDENT_STEPS if few_step else SAMPLE_STEPS
    guidance = world.guidance_of(kind)
    if adapter == "fewstep":
        steps, guidance = FEW_STEPS, 1.0
    return world.sample(model, y, steps=steps, guidance=guidance, seed=3)


def choose_prompts(world: World, adapter: str) -> Tensor:
    """The prompts of an adapter's columns."""
    sheet = SHEETS[world.name]
    n = sheet.columns[adapter]
    return world.sample_prompts(adapter, n * sheet.every)[:: sheet.every]


def new_page(world: World, width: int, height: int) -> Image.Image:
    """White paper, grey where the world is."""
    return Image.new("L" if world.shape[0] == 1 else "RGB", (width, height), "white")


def write_text(page: Image.Image, place: tuple[int, int], text: str, font: int) -> None:
    """Black letters; the place is the left end of their middle line."""
    ImageDraw.Draw(page).text(place, text, fill="black", font_size=font, anchor="lm")


def paste_strip(page: Image.Image, images: Tensor, left: int, top: int, pixels: int) -> None:
    """Images (n, c, h, w) side by side, each of so many pixels of the page."""
    bytes_ = ((images + 1) * 127.5).clamp(0, 255).byte()
    # Coloured pixels are smoothed: the eye reads a small picture more easily without their edges.
    way = Image.Resampling.NEAREST if page.mode == "L" else Image.Resampling.BICUBIC
    for i, image in enumerate(bytes_):
        flat = image[0] if page.mode == "L" else image.permute(1, 2, 0)
        tile = Image.fromarray(flat.contiguous().numpy()).resize((pixels, pixels), way)
        page.paste(tile, (left + i * pixels, top))


def draw_bases(folder: Folder, n: int = 32) -> Image.Image:
    """A row of samples of every base that is there."""
    world, sheet = folder.world, SHEETS[folder.world.name]
    kinds = ["source", *world.kinds]
    kinds = [kind for kind in kinds if folder.model_path(kind, 0).exists()]
    row = sheet.pixels + 2
    page = new_page(world, sheet.label + n * sheet.pixels, len(kinds) * row)
    for i, kind in enumerate(kinds):
        few_step = world.distilled.get(kind) == "lines"
        images = world.sample(
            folder.load_model(kind, 0),
            world.sample_prompts("", n),
            STUDENT_STEPS if few_step else 16,
            world.guidance_of(kind),
            seed=3,
        )
        paste_strip(page, images, sheet.label, i * row, sheet.pixels)
        write_text(page, (2, i * row + sheet.pixels // 2), kind, sheet.font)
    return page


def draw_adapters(folder: Folder) -> Image.Image:
    """Every adapter on the source and on the kinds of target shown, by the methods shown."""
    world, sheet = folder.world, SHEETS[folder.world.name]
    kinds = [kind for kind in sheet.kinds if folder.model_path(kind, 0).exists()]
    blocks = [draw_source(folder), *(draw_target(folder, kind) for kind in kinds)]
    head = (1 + bool(sheet.contents)) * (sheet.font + 8)
    width = sheet.label + sum(n * sheet.pixels + GAP for n in sheet.columns.values())
    rows = sum(map(len, blocks))
    page = new_page(world, width, head + rows * sheet.pixels + len(blocks) * GAP)
    write_heads(page, world)
    top = head
    for block in blocks:
        for label, strips in block.items():
            write_text(page, (2, top + sheet.pixels // 2), label, sheet.font)
            left = sheet.label
            for images, n in zip(strips, sheet.columns.values(), strict=True):
                paste_strip(page, images, left, top, sheet.pixels)
                left += n * sheet.pixels + GAP
            top += sheet.pixels
        top += GAP
    return page


def write_heads(page: Image.Image, world: World) -> None:
    """Names of the adapters, and what each column is asked for."""
    sheet = SHEETS[world.name]
    left, line = sheet.label, sheet.font + 8
    for adapter, n in sheet.columns.items():
        write_text(page, (left, line // 2), adapter, sheet.font)
        for i, content in enumerate(world.content(choose_prompts(world, adapter)).tolist()):
            if sheet.contents:
                place = (left + i * sheet.pixels, line + line // 2)
                write_text(page, place, sheet.contents[content], sheet.font - 2)
        left += n * sheet.pixels + GAP


Strips = dict[str, list[Tensor]]
"""Label of a row -> the images of each adapter."""


def draw_source(folder: Folder) -> Strips:
    """The source, by itself and with each adapter that is moved."""
    model, strips = folder.load_model("source", 0), {}
    for adapter in SHEETS[folder.world.name].columns:
        updates = load_lora(folder.lora_path("source", 0, adapter))
        for label, update in (("source: no adapter", {}), ("source: with it", updates)):
            with apply_updates(model, update):
                images = draw_samples(folder, "source", model, adapter)
            strips.setdefault(label, []).append(images)
    return strips


def draw_target(folder: Folder, kind: str) -> Strips:
    """A target, with each adapter by every method."""
    target, cases_by_adapter, oracles = loaded(folder, kind, 0)
    strips: Strips = {}
    for adapter in SHEETS[folder.world.name].columns:
        case = cases_by_adapter[adapter]
        updates = {
            "no adapter": {},
            **{label: (METHODS | CHOSEN)[label](case) for label in ROWS[1:-1]},
            "trained there": oracles[adapter],
        }
        for label, update in updates.items():
            with apply_updates(target, update):
                images = draw_samples(folder, kind, target, adapter)
            strips.setdefault(f"{kind}: {label}", []).append(images)
    return strips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=NAMES, default=NAMES[0])
    parser.add_argument("--work", type=Path, required=True, help="the study's folder")
    parser.add_argument("--arch", default="unet")
    parser.add_argument("--bases", action="store_true")
    parser.add_argument("--out", type=Path, help="the picture; docs/images unless given")
    options = parser.parse_args()
    world = load_world(options.world)
    folder = Folder(world, options.work, options.arch)
    page = draw_bases(folder) if options.bases else draw_adapters(folder)
    named = "" if world.name == NAMES[0] else f"-{world.name}"
    name = f"evidence-{'bases' if options.bases else 'samples'}{named}-{options.arch}.png"
    if page.mode == "RGB":
        page = page.quantize(256, dither=Image.Dither.NONE)  # a third of the size
    page.save(options.out or ROOT / "docs/images" / name, optimize=True)


if __name__ == "__main__":
    main()
