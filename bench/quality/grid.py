"""Samples a person can look at: ``python bench/quality/grid.py --work DIR`` draws docs/images.

With --out it draws there; with --bases only what the source and the targets draw by themselves.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from contenders import CHOSEN, METHODS
from evidence import RELATED, ROOT
from models import Folder
from PIL import Image, ImageDraw
from scoring import FEW_STEPS, SAMPLE_STEPS, apply_updates
from study import loaded
from torch import Tensor
from worlds import NAMES, World, load_world

COLUMNS = {
    "digits": {"thick": 6, "slanted": 6, "concept": 5, "fewstep": 6},
    "icons": {"neon": 8, "duotone": 6, "concept": 6, "fewstep": 8},
}
KINDS = {"digits": RELATED, "icons": ("near", "far", "far ground", "pruned", "merged 3")}
ROWS = ("no adapter", "copy", "prolora 0.9", "auto", "trained there")
PIXELS, LABEL, GAP = 32, 118, 8


def draw_samples(world: World, model: torch.nn.Module, adapter: str, n: int) -> Tensor:
    """n images for what the adapter is about, from the same noise for every row."""
    y = world.sample_prompts(adapter, n)
    few = adapter == "fewstep"
    steps, guidance = (FEW_STEPS, 1.0) if few else (SAMPLE_STEPS, 2.0)
    return world.sample(model, y, steps=steps, guidance=guidance, seed=3)


def paste_strip(page: Image.Image, images: Tensor, left: int, top: int) -> None:
    """Images (n, c, h, w) side by side, as large as the page's world shows them."""
    strip = ((torch.cat(list(images), dim=2) + 1) * 127.5).clamp(0, 255).byte()
    pixels = strip[0] if page.mode == "L" else strip.permute(1, 2, 0)
    tile = Image.fromarray(pixels.contiguous().numpy())
    size = (len(images) * PIXELS, PIXELS)
    page.paste(tile.resize(size, Image.Resampling.NEAREST), (left, top))


def draw_bases(folder: Folder, n: int = 32) -> Image.Image:
    """A row of samples of every base that is there."""
    kinds = ["source", *folder.world.kinds]
    kinds = [kind for kind in kinds if folder.model_path(kind, 0).exists()]
    mode = "L" if folder.world.shape[0] == 1 else "RGB"
    page = Image.new(mode, (LABEL + n * PIXELS, len(kinds) * (PIXELS + 2)), "white")
    for i, kind in enumerate(kinds):
        model, top = folder.load_model(kind, 0), i * (PIXELS + 2)
        few = folder.world.distilled.get(kind) == "lines"
        y = folder.world.sample_prompts("", n)
        guidance = folder.world.guidance_of(kind)
        images = folder.world.sample(model, y, 4 if few else 16, guidance, seed=3)
        paste_strip(page, images, LABEL, top)
        ImageDraw.Draw(page).text((2, top + 10), kind, fill="black")
    return page


def draw_adapters(folder: Folder) -> Image.Image:
    """Every adapter on the kinds of target shown, moved by the methods shown."""
    world, kinds = folder.world, KINDS[folder.world.name]
    columns = COLUMNS[world.name]
    width = LABEL + sum(n * PIXELS + GAP for n in columns.values())
    block = len(ROWS) * PIXELS + GAP
    mode = "L" if world.shape[0] == 1 else "RGB"
    page = Image.new(mode, (width, 18 + len(kinds) * block), "white")
    pen = ImageDraw.Draw(page)
    left = LABEL
    for adapter, n in columns.items():
        pen.text((left, 3), adapter, fill="black")
        left += n * PIXELS + GAP
    for i, kind in enumerate(kinds):
        target, cases_by_adapter, oracles = loaded(folder, kind, 0)
        left = LABEL
        for adapter, n in columns.items():
            case = cases_by_adapter[adapter]
            updates = {
                "no adapter": {},
                "trained there": oracles[adapter],
                **{label: (METHODS | CHOSEN)[label](case) for label in ROWS[1:-1]},
            }
            for j, label in enumerate(ROWS):
                top = 18 + i * block + j * PIXELS
                with apply_updates(target, updates[label]):
                    paste_strip(page, draw_samples(world, target, adapter, n), left, top)
                if left == LABEL:
                    pen.text((2, top + 10), f"{kind}: {label}", fill="black")
            left += n * PIXELS + GAP
    return page


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
    page.save(options.out or ROOT / "docs/images" / name, optimize=True)


if __name__ == "__main__":
    main()
