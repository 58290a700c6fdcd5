"""In how many samples of the shipped family the study's judge sees what was asked for.

``python bench/quality/family_seen.py --judge DIR`` makes bench/results/family_seen.json and the
table of examples/icon_family/README.md; some minutes on one core. Models are sampled as
`prolora demo` samples them. The judge learns real icons only, and is made in DIR if it is missing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from evidence import ROOT, fill_page, format_table
from icons.drawing import flatten, pictures
from icons.shipped import token_table
from icons.words import NULL_PROMPT, STYLE, prompt_parts, read_prompt
from judge import Judge
from results import Row, git
from study import load_judge, make_judge
from torch import Tensor
from worlds import load_world

from prolora.adapters import read_adapter
from prolora.cli import demo

RESULTS = ROOT / "bench/results/family_seen.json"
PAGE = ROOT / "examples/icon_family/README.md"
WORLD = load_world("icons")
SAMPLES, NOISES, SEED = 320, 16, 0
SETTINGS = (demo.STEPS, demo.GUIDANCE)
DRAWN = {
    **{name: (name, "", SETTINGS) for name in ("source", "apart", "pruned", "far")},
    "few-step": ("few-step", "", demo.SAMPLED_OTHERWISE["few-step"]),
    **{f"source + {lora}": ("source", lora, SETTINGS) for lora in ("neon", "duotone", "concept")},
    **{f"{name}, the demo's prompts": (name, "", SETTINGS) for name in ("source", "apart")},
    "source, guidance 1": ("source", "", (demo.STEPS, 1.0)),
    "source, guidance 6": ("source", "", (demo.STEPS, 6.0)),
    "source, 32 steps": ("source", "", (32, demo.GUIDANCE)),
}
"""Row -> member, LoRA, and the steps and guidance that it is sampled with."""
PARTS = {"all": "all", "coloured": "coloured sets", "silhouettes": "silhouettes"}
SHOWN = {
    "fresh": "real pictures of the icons that the judge learnt",
    "held_out": "real pictures of icons that it did not learn",
}


def draw(name: str) -> tuple[Tensor, Tensor]:
    """Samples of a row and their prompts: every thing in turn, the other words by chance."""
    member, lora, settings = DRAWN[name]
    model = demo.load_transformer(demo.find_models() / member)
    if lora:
        file = demo.find_models() / f"loras/{lora}.safetensors"
        model = demo.merge_adapter(model, read_adapter(file))
    y = WORLD.sample_prompts(lora, SAMPLES)
    if "the demo's prompts" in name:
        y = torch.tensor([read_prompt(text) for text in demo.PROMPTS * NOISES])
    tokens = token_table()[torch.cat([torch.tensor([NULL_PROMPT]), y])]
    return demo.sample_icons(model, tokens, *settings, SEED), y


def read_images(judge: Judge, images: Tensor, y: Tensor) -> Row:
    """The share that is named as asked for: of all, of the coloured sets, of the silhouettes."""
    hits = (judge(images)[1].argmax(1) == WORLD.content(y)).float()
    dark = prompt_parts(y)[1] == STYLE.index("silhouette")
    parts = dict(zip(PARTS, (hits, hits[~dark], hits[dark]), strict=True))
    shares = {name: round(float(part.mean()), 3) for name, part in parts.items() if len(part)}
    return {"images": len(y)} | shares


def seen_table(rows: dict[str, Row]) -> str:
    """A line for each row, a column for each part."""
    lines = [
        [name, *(f"{row[part]:.2f}" if part in row else "–" for part in PARTS)]
        for name, row in rows.items()
    ]
    return format_table(["", *PARTS.values()], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--judge", type=Path, required=True, help="folder of judge.safetensors")
    folder = parser.parse_args().judge
    torch.set_num_threads(1)
    if not (folder / "judge.safetensors").is_file():
        make_judge(WORLD, folder / "judge.safetensors")
    judge = load_judge(WORLD, folder)
    rows = {}
    for split, name in SHOWN.items():
        layers, y = pictures(split)
        rows[name] = read_images(judge, flatten(layers), y)
    for name in DRAWN:
        rows[name] = read_images(judge, *draw(name))
        print(name, rows[name], flush=True)
    made = {"script": "bench/quality/family_seen.py", "commit": git("rev-parse", "--short", "HEAD")}
    made |= {"date": git("log", "-1", "--format=%cs"), "torch": torch.__version__}
    RESULTS.write_text(json.dumps({"made": made, "rows": rows}, indent=1) + "\n")
    PAGE.write_text(fill_page(PAGE.read_text("utf-8"), {"seen": seen_table(rows)}), "utf-8")


if __name__ == "__main__":
    main()
