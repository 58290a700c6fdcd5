"""Draws docs/images/demo.png and look.png: the shipped icons, moved by fits. Minutes of one core.

    python docs/make_pictures.py [demo] [look]

Each picture is a pixel of the model drawn as a square: nothing is smoothed.
"""

from __future__ import annotations

import io
import sys
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

import prolora

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "examples/icon_family/weights"
SCALE, GAP, LABEL, LINE = 5, 4, 150, 22
SHOWN = 6
"""Prompts of a picture, a column each."""


def fit(lora: str, target: str, **options: Any) -> Any:
    """Fits a shipped LoRA, and returns the report with its grid of images."""
    name = "butterflies.txt" if lora == "concept" else "prompts.txt"
    prompts = tuple((WEIGHTS / name).read_text("utf-8").splitlines())
    files = WEIGHTS / f"loras/{lora}.safetensors", WEIGHTS / "source", WEIGHTS / target
    return prolora.fit(*files, prompts=prompts, shown_prompts=SHOWN, **options).report


def draw(rows: list[tuple[str, list[bytes]]], heads: list[str], caption: str) -> Image.Image:
    """Draws a row of images for each label, below the words of their prompts."""
    tiles = [(name, [Image.open(io.BytesIO(one)) for one in row]) for name, row in rows]
    side = SCALE * tiles[0][1][0].width
    lines = textwrap.wrap(caption, 130)
    width = LABEL + SHOWN * (side + GAP)
    height = LINE + len(rows) * (side + GAP) + LINE * len(lines) + GAP
    picture = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for i, head in enumerate(heads):
        pen.text((LABEL + i * (side + GAP) + side / 2, 2), head, "black", font, anchor="ma")
    for j, (name, row) in enumerate(tiles):
        y = LINE + j * (side + GAP)
        pen.text((4, y + side / 2), name, "black", font, anchor="lm")
        for i, one in enumerate(row):
            large = one.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
            picture.paste(large, (LABEL + i * (side + GAP), y))
    for i, line in enumerate(lines):
        pen.text((4, height - LINE * (len(lines) - i)), line, "black", font)
    return picture


def make_demo() -> Image.Image:
    """The LoRA neon, moved to a model that was trained independently."""
    report = fit("neon", "apart")
    grid, heads = report.grid, [prompt.split()[0] for prompt in report.grid.rows]
    names = {
        "source": "source",
        "source + LoRA": "source + LoRA",
        "target": "apart",
        "target + copy": "apart + copied LoRA",
        "target + fit": "apart + fitted LoRA",
    }
    rows = [(names[c], list(row)) for c, row in zip(grid.columns, grid.images, strict=True)]
    share = min(report.probe.gate.share.values())
    return draw(
        rows,
        heads,
        "“apart” was trained independently of the source. A copy of the LoRA does nothing useful "
        f"there (row 4). Fitted by prolora to both models, it does {share:.0%} of what it does to "
        "the source, on images that the fit did not see (row 5).",
    )


def make_look() -> Image.Image:
    """Three LoRAs on a model of another style of drawing, with --look source."""
    rows: list[tuple[str, list[bytes]]] = []
    heads: list[str] = []
    for lora in ("neon", "duotone", "concept"):
        grid = fit(lora, "far", look="source", force=True).grid
        heads = heads or [prompt.split()[0] for prompt in grid.rows]
        images = dict(zip(grid.columns, map(list, grid.images), strict=True))
        rows += [("far", images["target"])] if not rows else []
        if lora == "concept":
            rows.append(("far, butterflies", images["target"]))
        rows.append((f"{lora}: source", images["source + LoRA"]))
        rows += [(f"{lora}: copied", images["target + copy"])] if "target + copy" in images else []
        rows.append((f"{lora}: fitted", images["target + fit"]))
    return draw(
        rows,
        heads,
        "“far” draws in another style. Each LoRA on the source, copied to far at 1, "
        "and fitted to far with --look source.",
    )


def main() -> None:
    """Draws the pictures that are named, or both."""
    for name in sys.argv[1:] or ("demo", "look"):
        picture = {"demo": make_demo, "look": make_look}[name]()
        few = picture.quantize(256, dither=Image.Dither.NONE)  # a fifth of the file
        few.save(ROOT / f"docs/images/{name}.png", optimize=True)
        print(f"docs/images/{name}.png", *picture.size)


if __name__ == "__main__":
    main()
