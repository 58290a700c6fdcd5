"""Draws a grid of what LoRAs do, and lets metrics compare it: copy × strengths × moved files.

    python examples/evaluate.py SOURCE TARGET LORA [MOVED …] -o OUT --prompt "…" --metric clip=DIR

SOURCE and TARGET are folders of diffusers pipelines. All rows draw the same prompts from the same
noise: the source with the LoRA and without, the target alone, the target with the copied LoRA at
each strength, and with every moved file at each strength. OUT gets the images, grid.png and
scores.json. Nothing is downloaded, and no code of a folder is run. A metric is a plain function
`(images, prompts, wanted) -> a number for each image`, where `wanted` is what the source draws with
the LoRA; write your own into METRICS.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageChops, ImageDraw, ImageStat
from torch import Tensor
from torch.nn.functional import normalize

import prolora

Metric = Callable[[Sequence[Any], Sequence[str], Sequence[Any]], list[float]]
SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
WEIGHTS = SAFE | {"use_safetensors": True}
ASKED = "source + LoRA"


def open_pipeline(folder: Path) -> Any:
    """Loads a pipeline, from safetensors only."""
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    parts = {name: part for name, part in index.items() if isinstance(part, list)}
    own = [
        name for name, part in parts.items() if part[0] not in (None, "diffusers", "transformers")
    ]
    if own or isinstance(index["_class_name"], list):
        raise SystemExit(f"{folder}: {', '.join(own) or '_class_name'} would run code of its own")
    pipe = DiffusionPipeline.from_pretrained(folder, **WEIGHTS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], **how: Any) -> list[Any]:
    """An image for each prompt and seed."""
    return [
        pipe(prompt, generator=torch.Generator().manual_seed(seed), **how).images[0]
        for prompt in prompts
        for seed in seeds
    ]


def draw_with(pipe: Any, lora: Path, strength: float, **asked: Any) -> list[Any]:
    """The images of a LoRA at a strength; the pipeline is left without it."""
    pipe.load_lora_weights(lora, adapter_name="drawn")
    pipe.set_adapters("drawn", strength)
    try:
        return draw(pipe, **asked)
    finally:
        pipe.unload_lora_weights()


def measure_pixels(
    images: Sequence[Any], prompts: Sequence[str], wanted: Sequence[Any]
) -> list[float]:
    """Minus the root mean square difference of the pixels, from 0 to 1."""
    apart = [
        ImageStat.Stat(ImageChops.difference(a, b)) for a, b in zip(images, wanted, strict=True)
    ]
    return [-((sum(x / 3 for x in one.sum2) / one.count[0]) ** 0.5) / 255 for one in apart]


def load_clip(folder: Path) -> dict[str, Metric]:
    """CLIP's likeness of image and prompt, and of image and wanted image, as cosines."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder, **WEIGHTS).eval()
    look = AutoImageProcessor.from_pretrained(folder, **SAFE)
    split = AutoTokenizer.from_pretrained(folder, **SAFE)
    most = model.config.text_config.max_position_embeddings

    def embed(images: Sequence[Any]) -> Tensor:
        seen = model.vision_model(**look(images=list(images), return_tensors="pt"))
        return normalize(model.visual_projection(seen.pooler_output))

    @torch.no_grad()
    def compare_text(images: Any, prompts: Any, wanted: Any) -> list[float]:
        words = split(
            list(prompts), truncation=True, padding=True, max_length=most, return_tensors="pt"
        )
        said = normalize(model.text_projection(model.text_model(**words).pooler_output))
        return (embed(images) * said).sum(1).tolist()

    @torch.no_grad()
    def compare_images(images: Any, prompts: Any, wanted: Any) -> list[float]:
        return (embed(images) * embed(wanted)).sum(1).tolist()

    return {"CLIP-T": compare_text, "CLIP-I": compare_images}


def load_dinov2(folder: Path) -> dict[str, Metric]:
    """DINOv2's likeness of image and wanted image, as a cosine."""
    from transformers import AutoImageProcessor, Dinov2Model

    model = Dinov2Model.from_pretrained(folder, **WEIGHTS).eval()
    look = AutoImageProcessor.from_pretrained(folder, **SAFE)

    @torch.no_grad()
    def compare_images(images: Any, prompts: Any, wanted: Any) -> list[float]:
        ours, theirs = (
            normalize(model(**look(images=list(x), return_tensors="pt")).pooler_output)
            for x in (images, wanted)
        )
        return (ours * theirs).sum(1).tolist()

    return {"DINOv2": compare_images}


METRICS = {"clip": load_clip, "dinov2": load_dinov2}


def estimate(values: Tensor) -> tuple[float, float, float]:
    """The mean of values [prompts, seeds] and its 95 % interval, by a bootstrap over both."""
    generator = torch.Generator().manual_seed(0)
    prompts, seeds = (torch.randint(n, (2000, n), generator=generator) for n in values.shape)
    drawn = values.double()[prompts[:, :, None], seeds[:, None, :]].mean((1, 2))
    low, high = torch.quantile(drawn, drawn.new_tensor([0.025, 0.975])).tolist()
    return float(values.mean()), low, high


def draw_grid(rows: dict[str, list[Any]], every: int) -> Any:
    """A line of images for each row, the first of every prompt."""
    shown = {name: images[::every] for name, images in rows.items()}
    wide, high = next(iter(rows.values()))[0].size
    grid = Image.new(
        "RGB", (len(next(iter(shown.values()))) * wide, len(rows) * (high + 16)), "white"
    )
    for line, (name, images) in enumerate(shown.items()):
        ImageDraw.Draw(grid).text((2, line * (high + 16)), name, fill="black")
        for column, image in enumerate(images):
            grid.paste(image, (column * wide, line * (high + 16) + 16))
    return grid


def evaluate(
    source: Path,
    target: Path,
    lora: Path,
    moved: Sequence[Path],
    out: Path,
    *,
    strengths: Sequence[float],
    metrics: dict[str, Metric],
    prompts: Sequence[str],
    seeds: Sequence[int],
    **how: Any,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Draws every row and judges it."""
    out.mkdir(parents=True)
    asked = {"prompts": prompts, "seeds": seeds, **how}
    pipe = open_pipeline(source)
    rows = {"source": draw(pipe, **asked), ASKED: draw_with(pipe, lora, 1.0, **asked)}
    pipe = open_pipeline(target)
    rows["target"] = draw(pipe, **asked)
    copy = out / "copy.safetensors"
    prolora.transfer(lora, source, target, out=copy, method="copy")
    for path in (copy, *moved):
        for strength in strengths:
            rows[f"{path.stem} × {strength:g}"] = draw_with(pipe, path, strength, **asked)
    for number, images in enumerate(rows.values()):
        for place, image in enumerate(images):
            image.save(out / f"{number}-{place}.png")
    draw_grid(rows, len(seeds)).save(out / "grid.png")
    words = [prompt for prompt in prompts for _ in seeds]
    first, found = f"copy × {strengths[0]:g}", {}
    for name in list(rows)[2:]:
        found[name] = {}
        for metric, ask in metrics.items():
            ours, theirs = (
                torch.tensor(ask(rows[row], words, rows[ASKED])).reshape(len(prompts), len(seeds))
                for row in (name, first)
            )
            found[name][metric] = {
                "mean": estimate(ours),
                "minus copy": None if name == first else estimate(ours - theirs),
            }
    (out / "scores.json").write_text(json.dumps(found, indent=1, ensure_ascii=False), "utf-8")
    return found


def main() -> None:
    """Reads the command line and prints the scores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("lora", type=Path)
    parser.add_argument("moved", type=Path, nargs="*")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--prompt", action="append", required=True)
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--metric", action="append", default=[], help="clip=DIR or dinov2=DIR")
    options = parser.parse_args()
    metrics: dict[str, Metric] = {"pixels": measure_pixels}
    for name, _, folder in (given.partition("=") for given in options.metric):
        metrics |= METRICS[name](Path(folder))
    found = evaluate(
        options.source,
        options.target,
        options.lora,
        options.moved,
        options.out,
        strengths=options.strengths,
        metrics=metrics,
        prompts=options.prompt,
        seeds=options.seed or [0, 1, 2, 3],
        num_inference_steps=options.steps,
    )
    for row, scores in found.items():
        for metric, said in scores.items():
            mean, low, high = said["mean"]
            apart = said["minus copy"]
            more = (
                "" if apart is None else "  minus copy {:+.4f} ({:+.4f} to {:+.4f})".format(*apart)
            )
            print(f"{row:24} {metric:8} {mean:.4f} ({low:.4f} to {high:.4f}){more}")


if __name__ == "__main__":
    main()
