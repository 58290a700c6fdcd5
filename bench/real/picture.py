"""Draws docs/images/terrain.png: ``python bench/real/picture.py DATA WORK``; see README.md.

WORK is the folder of study.py with the LoRAs of seed 0 and their fits. Terrain of one step from
noise, the same noise in every row, lit from the north-west.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "quality"))

# isort: split
from models import load_lora
from PIL import Image, ImageDraw, ImageFont
from rows import make_case
from scoring import apply_updates
from study import VERSIONS, Study, Which, open_network
from torch import Tensor
from torch.nn import functional
from world import sample_changed, sample_terrains

IDEAS = ("ridged", "steep")
"""Of those that LoRAs of this size learn, the ones that were fitted."""
SHOWN, SIDE, GAP, LABEL, LINE = 3, 128, 6, 190, 22
SEED = 11


def shade(values: Tensor) -> Tensor:
    """Heightfields [n, 1, h, w] of the models' space -> brightness 0..1 [n, h, w].

    What one step from noise leaves of the noise is averaged over five cells before it is lit.
    """
    smooth = functional.avg_pool2d(values, 5, 1, 2, count_include_pad=False)[:, 0]
    flat = smooth.flatten(1)
    heights = 9 * smooth / flat.std(1)[:, None, None]
    south = functional.pad(heights, (0, 0, 0, 1), "replicate")[:, 1:] - heights
    east = functional.pad(heights, (0, 1, 0, 0), "replicate")[:, :, 1:] - heights
    light = (1 + south + east) / (1 + south.square() + east.square()).sqrt()
    low, high = flat.amin(1)[:, None, None], flat.amax(1)[:, None, None]
    tone = 0.25 + 0.6 * (smooth - low) / (high - low)
    return (tone * (0.45 + 0.5 * light)).clamp(0, 1)


def list_rows(study: Study, idea: str) -> Iterator[tuple[str, str, dict | None]]:
    """(title, version, updates) of every row; None where the idea is done to samples."""
    which = Which(idea, "lora-16", 0)
    own = load_lora(study.lora_path("0.4.1", which))
    source, target = (open_network(study.base_path(name)) for name in VERSIONS)
    case = make_case((source, target), own)
    yield "0.4.1", "0.4.1", {}
    yield "  what is asked of it", "0.4.1", None
    yield "0.4.1 + its LoRA", "0.4.1", own
    yield "0.4.2", "0.4.2", {}
    yield "  what is asked of it", "0.4.2", None
    yield "0.4.2 + copied LoRA", "0.4.2", dict(case.updates)
    yield "0.4.2 + fitted LoRA", "0.4.2", load_lora(study.moved_path("forward", which))
    yield "0.4.2 + LoRA trained on it", "0.4.2", load_lora(study.lora_path("0.4.2", which))


def draw_page(study: Study) -> Image.Image:
    """Columns of terrains for each idea."""
    rows = [row[0] for row in list_rows(study, IDEAS[0])]
    size = LABEL + len(IDEAS) * (SHOWN * SIDE + GAP), LINE + len(rows) * (SIDE + 2)
    page, font = Image.new("L", size, 255), ImageFont.load_default(15)
    pen = ImageDraw.Draw(page)
    difficulty = torch.tensor([0.2, 0.5, 0.8])
    for row, title in enumerate(rows):
        pen.text((4, LINE + row * (SIDE + 2) + SIDE // 2 - 8), title, fill=0, font=font)
    for column, idea in enumerate(IDEAS):
        left = LABEL + column * (SHOWN * SIDE + GAP)
        pen.text((left + SHOWN * SIDE // 2, 2), idea, fill=0, font=font, anchor="ma")
        for row, (_, version, updates) in enumerate(list_rows(study, idea)):
            network = open_network(study.base_path(version))
            if updates is None:
                drawn = sample_changed(network, idea, difficulty, SEED)
            else:
                with apply_updates(network, updates) as model:
                    drawn = sample_terrains(model, difficulty, SEED)
            lit = shade(drawn)
            for i, one in enumerate((255 * lit).byte().numpy()):
                page.paste(Image.fromarray(one), (left + i * SIDE, LINE + row * (SIDE + 2)))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images/terrain.png"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(given.data, given.work, steps=0, batch=0, questions=0, fits=1)
    draw_page(study).quantize(64, dither=Image.Dither.NONE).save(given.out, optimize=True)


if __name__ == "__main__":
    main()
