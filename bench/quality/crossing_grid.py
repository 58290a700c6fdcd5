"""Samples of LoRAs that crossed latent spaces: ``python crossing_grid.py --work DIR``.

DIR is the folder of crossed.py. Draws docs/images/crossing.png, and keeps moved LoRAs in DIR/grid.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from contenders import Updates
from crossed import IMAGES, PAIRS, Move, move_lora
from crossing import ADAPTERS, Crossing, sample
from evidence import ROOT
from grid import GAP, SHEETS, new_page, paste_strip, write_text
from icons.words import WHAT
from models import load_lora
from PIL import Image
from safetensors.torch import save_file
from scoring import apply_updates
from torch import Tensor
from worlds import load_world

COLUMNS = {"neon": 4, "duotone": 3, "concept": 3, "shaded": 4}
SHOWN = ["same architecture, other latent space"]
ROWS = (
    "source",
    "source + its LoRA",
    "target",
    "target + moved LoRA",
    "target + LoRA trained on it",
)


def load_moved(case: Move, path: Path) -> Updates:
    """The moved LoRA; moved now where it is not kept."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        updates = move_lora(case, IMAGES)[0]
        parts = {f"{name}.up": update.up for name, update in updates.items()}
        parts |= {f"{name}.down": update.down for name, update in updates.items()}
        save_file({name: part.contiguous() for name, part in parts.items()}, path)
    return load_lora(path)


def draw_columns(study: Crossing, name: str, adapter: str) -> list[Tensor]:
    """The rows of one LoRA: images from one noise of each model."""
    pair = PAIRS[name]
    case = Move(study, pair, 0, adapter)
    moved = load_moved(case, study.root / "grid" / f"{pair[0].name}-{pair[1].name}-{adapter}")
    y = study.world.sample_prompts(adapter, 3 * COLUMNS[adapter])[::3]
    spaces = case.recorder(1)
    oracle = study.load_lora(case.theirs, 0, 0, adapter)
    drawn = []
    for setting, model, side, updates in (
        (case.ours, case.source, spaces.ours, {}),
        (case.ours, case.source, spaces.ours, case.lora),
        (case.theirs, case.target, spaces.theirs, {}),
        (case.theirs, case.target, spaces.theirs, moved),
        (case.theirs, case.target, spaces.theirs, oracle),
    ):
        with apply_updates(model, updates):
            latents = sample(study.world, setting, model, y, seed=3)
        drawn.append(side.space.decode(latents))
    return drawn


def draw_page(study: Crossing, names: list[str]) -> Image.Image:
    """Every pair below the other."""
    sheet = SHEETS["icons"]
    label, pixels, line = sheet.label + 40, sheet.pixels, sheet.font + 8
    width = label + sum(n * pixels + GAP for n in COLUMNS.values())
    height = line + len(names) * (2 * line + len(ROWS) * pixels + GAP)
    page = new_page(study.world, width, height)
    top = line
    for number, name in enumerate(names):
        plain = name.replace("ε", "noise").replace("→", "to")  # the font lacks both
        write_text(page, (2, top + line // 2), plain, sheet.font)
        left = label
        for adapter, count in COLUMNS.items():
            if number == 0:
                write_text(page, (left, line // 2), adapter, sheet.font)
            y = study.world.sample_prompts(adapter, 3 * count)[::3]
            for i, word in enumerate(study.world.content(y).tolist()):
                place = (left + i * pixels, top + line + line // 2)
                write_text(page, place, WHAT[word], sheet.font - 2)
            for row, images in enumerate(draw_columns(study, name, adapter)):
                paste_strip(page, images, left, top + 2 * line + row * pixels, pixels)
            left += count * pixels + GAP
        for row, text in enumerate(ROWS):
            place = (2, top + 2 * line + row * pixels + pixels // 2)
            write_text(page, place, text, sheet.font)
        top += 2 * line + len(ROWS) * pixels + GAP
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of crossed.py")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/crossing.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    assert set(COLUMNS) == set(ADAPTERS)
    page = draw_page(Crossing(load_world("icons"), options.work), SHOWN)
    page.quantize(256, dither=Image.Dither.NONE).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
