"""Samples a person can look at: ``python bench/quality/grid.py --work DIR`` draws docs/images."""

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
from worlds import World, load_world

COLUMNS = {"thick": 6, "slanted": 6, "concept": 5, "fewstep": 6}
ROWS = ("no adapter", "copy", "prolora 0.9", "auto", "trained there")
PIXELS, LABEL, GAP = 32, 118, 8


def draw_samples(world: World, model: torch.nn.Module, adapter: str, n: int) -> Tensor:
    """n images (n, 1, 16, 16) for what the adapter is about, from the same noise for every row."""
    y = world.sample_prompts(adapter, n)
    few = adapter == "fewstep"
    steps, guidance = (FEW_STEPS, 1.0) if few else (SAMPLE_STEPS, 2.0)
    return world.sample(model, y, steps=steps, guidance=guidance, seed=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="the study's folder")
    parser.add_argument("--arch", default="unet")
    options = parser.parse_args()
    folder = Folder(load_world("digits"), options.work, options.arch)
    width = LABEL + sum(n * PIXELS + GAP for n in COLUMNS.values())
    block = len(ROWS) * PIXELS + GAP
    page = Image.new("L", (width, 18 + len(RELATED) * block), 255)
    pen = ImageDraw.Draw(page)
    left = LABEL
    for adapter, n in COLUMNS.items():
        pen.text((left, 3), adapter, fill=0)
        left += n * PIXELS + GAP
    for i, kind in enumerate(RELATED):
        target, cases_by_adapter, oracles = loaded(folder, kind, 0)
        left = LABEL
        for adapter, n in COLUMNS.items():
            case = cases_by_adapter[adapter]
            updates = {
                "no adapter": {},
                "trained there": oracles[adapter],
                **{label: (METHODS | CHOSEN)[label](case) for label in ROWS[1:-1]},
            }
            for j, label in enumerate(ROWS):
                top = 18 + i * block + j * PIXELS
                with apply_updates(target, updates[label]):
                    images = draw_samples(folder.world, target, adapter, n)
                strip = torch.cat(list(images[:, 0]), dim=1)
                grey = ((strip + 1) * 127.5).clamp(0, 255).byte().numpy()
                tile = Image.fromarray(grey).resize((n * PIXELS, PIXELS), Image.Resampling.NEAREST)
                page.paste(tile, (left, top))
                if left == LABEL:
                    pen.text((2, top + 10), f"{kind}: {label}", fill=0)
            left += n * PIXELS + GAP
    page.save(ROOT / f"docs/images/evidence-samples-{options.arch}.png", optimize=True)


if __name__ == "__main__":
    main()
