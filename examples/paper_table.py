"""Makes the papers' table on models of yours: what each way to move LoRAs draws, as judges see it.

    python examples/paper_table.py SOURCE TARGET LORA … -o OUT --prompt "a photo of {lora}" \\
        --metric clip=DIR --metric dinov2=DIR [--fit-prompts FILE] [--also trained=DIR/{lora}.safetensors]

SOURCE and TARGET are folders of diffusers pipelines; {lora} is a LoRA's file name without its ending.
The rows: the target alone (none), a copy at each strength, `auto`, `prolora`, a fit where prompts for
it are given, and files of yours such as LoRAs trained on the target. All rows draw the same prompts
from the same noise; judges.py has the metrics. OUT contains images, a grid for each LoRA and
table.json; the same command goes on where it was cut off. Nothing is downloaded.
"""  # noqa: E501

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from judges import METRICS, Metric, measure_pixels
from PIL import Image, ImageDraw
from torch import Tensor

import prolora
from prolora.fitting.pipelines.pipeline_opening import open_pipeline


class Painter:
    """Draws prompts with one model at a time, and keeps the images."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Opens no model before one has to draw."""
        self.options, self.pipe, self.model, self.digests = options, None, None, {}

    def digest(self, path: Path) -> str:
        """Returns the SHA-256 of a file, or of all files of a folder."""
        if path not in self.digests:
            digest = hashlib.sha256()
            for file in filter(Path.is_file, sorted(path.rglob("*")) if path.is_dir() else [path]):
                digest.update(str(file.relative_to(path)).encode())
                with file.open("rb") as stream:
                    for block in iter(lambda stream=stream: stream.read(1 << 20), b""):
                        digest.update(block)
            self.digests[path] = digest.hexdigest()
        return self.digests[path]

    def open(self, model: Path) -> Any:
        """Opens a pipeline: on a GPU as it is stored, else in float32."""
        if self.model != model:
            self.model, self.pipe = model, open_pipeline(model).pipe
            self.pipe.to("cuda" if torch.cuda.is_available() else torch.float32)
            self.pipe.set_progress_bar_config(disable=True)
        return self.pipe

    def draw(self, model: Path, prompts: list[str], lora: Path | None, strength: float) -> Any:
        """Returns an image for each prompt and seed; what was drawn of the same files is read."""
        seeds, steps = self.options.seed, self.options.steps
        recipe = prompts, seeds, steps, strength, self.digest(model), lora and self.digest(lora)
        name = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
        folder = self.options.out / "images" / name
        wanted = {folder / f"{i}-{s}.png": (p, s) for i, p in enumerate(prompts) for s in seeds}
        if all(place.exists() for place in wanted):
            return [Image.open(place).convert("RGB") for place in wanted]
        folder.mkdir(parents=True, exist_ok=True)
        pipe = self.open(model)
        # The shipped small models have no loader of LoRAs but their transformer's.
        whole = hasattr(pipe, "load_lora_weights")
        part, prefix = (pipe, {}) if whole else (pipe.transformer, {"prefix": "transformer"})
        if lora:
            load = part.load_lora_weights if whole else part.load_lora_adapter
            load(str(lora), adapter_name="drawn", **prefix)
            part.set_adapters("drawn", strength)
        for place, (prompt, seed) in wanted.items():
            noise = torch.Generator().manual_seed(seed)
            drawn = pipe(prompt, num_inference_steps=steps, generator=noise, output_type="pt")
            pixels = (drawn.images[0].float().cpu() * 255).round().byte().permute(1, 2, 0)
            Image.fromarray(pixels.contiguous().numpy()).save(place.with_suffix(".new"), "png")
            place.with_suffix(".new").replace(place)
        if lora:
            part.delete_adapters("drawn")
        return [Image.open(place).convert("RGB") for place in wanted]


def move(lora: Path, options: argparse.Namespace) -> dict[str, tuple[Path | None, float]]:
    """Returns row -> a file and its strength; a way that refuses has no row."""
    bases, written = (options.source, options.target), options.out / "loras"
    written.mkdir(parents=True, exist_ok=True)
    rows: dict[str, tuple[Path | None, float]] = {"none": (None, 1.0)}
    for way in ("copy", "auto", "prolora", *(["fit"] if options.fit_prompts else [])):
        how: dict[str, Any] = {"out": written / f"{lora.stem}-{way}.safetensors"}
        how["format"] = "diffusers"
        try:
            if way == "fit":
                prompts = tuple(options.fit_prompts.read_text("utf-8").splitlines())
                prolora.fit(lora, *bases, prompts=prompts, **how)
            else:
                prolora.transfer(lora, *bases, method=way, **how)
        except prolora.ProLoRAError as refusal:
            print(f"{lora.stem}: {way}: {refusal}")
            continue
        for strength in options.strengths if way == "copy" else [1.0]:
            rows[f"copy × {strength:g}" if way == "copy" else way] = how["out"], strength
    for name, _, pattern in (given.partition("=") for given in options.also):
        rows[name] = Path(pattern.format(lora=lora.stem)), 1.0
    return rows


def estimate(values: Tensor) -> list[float]:
    """The mean of values [LoRAs, images] and its 95 % interval, by a bootstrap over both."""
    generator = torch.Generator().manual_seed(0)
    loras, images = (torch.randint(n, (2000, n), generator=generator) for n in values.shape)
    means = values.double()[loras[:, :, None], images[:, None, :]].mean((1, 2))
    return [float(values.mean()), *torch.quantile(means, means.new_tensor([0.025, 0.975])).tolist()]


def save_grid(rows: dict[str, list[Any]], every: int, path: Path) -> None:
    """A line of images for each row, the first of every prompt."""
    width, height = next(iter(rows.values()))[0].size
    lines = [(name, images[::every]) for name, images in rows.items()]
    grid = Image.new("RGB", (len(lines[0][1]) * width, len(lines) * (height + 16)), "white")
    for line, (name, images) in enumerate(lines):
        ImageDraw.Draw(grid).text((2, line * (height + 16)), name, fill="black")
        for column, image in enumerate(images):
            grid.paste(image, (column * width, line * (height + 16) + 16))
    grid.save(path)


def make_table(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Draws and judges every row: row -> metric -> number of LoRAs, mean, low, high."""
    metrics: dict[str, Metric] = {"pixels": measure_pixels}
    for name, _, folder in (given.partition("=") for given in options.metric):
        metrics |= METRICS[name](Path(folder))
    painter, scores = Painter(options), {}
    for lora in options.loras:
        prompts = [prompt.format(lora=lora.stem) for prompt in options.prompt]
        wanted = painter.draw(options.source, prompts, lora, 1.0)
        drawn = {
            name: painter.draw(options.target, prompts, *row)
            for name, row in move(lora, options).items()
        }
        grid = {"source + LoRA": wanted, **drawn}
        save_grid(grid, len(options.seed), options.out / f"grid-{lora.stem}.png")
        texts = [prompt for prompt in prompts for _ in options.seed]
        for name, images in drawn.items():
            for metric, judge in metrics.items():
                row = scores.setdefault(name, {}).setdefault(metric, [])
                row.append(judge(images, texts, wanted))
    return {
        name: {metric: [len(v), *estimate(torch.tensor(v))] for metric, v in row.items()}
        for name, row in scores.items()
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, list[float]]]:
    """Reads the command line, makes the table, writes and prints it."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("loras", type=Path, nargs="+")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--prompt", action="append", required=True)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.6, 1.0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--fit-prompts", type=Path)
    parser.add_argument("--also", action="append", default=[])
    parser.add_argument("--metric", action="append", default=[])
    options = parser.parse_args(arguments)
    table = make_table(options)
    text = json.dumps(table, indent=1, ensure_ascii=False)
    (options.out / "table.json").write_text(text, "utf-8")
    for name, row in table.items():
        for metric, (loras, mean, low, high) in row.items():
            print(f"{name:12} {metric:8} {mean:.4f} ({low:.4f} to {high:.4f}), LoRAs: {loras}")
    return table


if __name__ == "__main__":
    main()
