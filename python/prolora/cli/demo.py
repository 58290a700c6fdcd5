"""The demo: a shipped LoRA moves between two shipped models, and images show what it does.

The models are the mini family of examples/mini_family: real diffusion UNets with SDXL's module
names, trained on handwritten digits. Needs the `demo` extra (diffusers and Pillow).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapters import read_adapter
from ..adapters.adapter import Adapter
from ..core.methods import ProjectMethod
from ..errors import ProLoRAError
from ..files.safetensors_file import SafetensorsFile
from ..files.writing import check_writable, write_text_atomically
from ..workflow.output_paths import check_report_path
from ..workflow.page.document import Picture, render_report
from ..workflow.report import Report
from ..workflow.transfer import transfer, transfer_file

STEPS = 25
GUIDANCE = 2.0
NULL_LABEL = 10
SCALE = 4  # pixels of the picture for each of a sample

DemoMethod = Literal["auto", ProjectMethod]
"""The methods that need no whole pipelines; the shipped models are UNets alone."""


def find_models() -> Path:
    """The folder of the shipped models: in an installed package, else in the source tree."""
    package = Path(__file__).resolve().parents[1]
    for folder in (
        package / "mini_family/weights",
        package.parents[1] / "examples/mini_family/weights",
    ):
        if (folder / "labels.safetensors").is_file():
            return folder
    raise ProLoRAError("this installation carries no demo models: install prolora from its source")


def run_demo(
    output: Path,
    *,
    lora: str = "thick",
    target: str = "pruned",
    method: DemoMethod = "auto",
    seed: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> tuple[Report, list[Path]]:
    """Transfers a shipped LoRA and draws samples of every combination, from the same noise.

    Args:
        output: folder for the LoRA, the report and the picture; made if missing.
        lora: a file of the family's `loras` folder.
        target: "pruned" or "finetuned".
        method: as `transfer` takes it; the shipped models are no pipelines that "probe" could run.
        seed: of the noise.
        progress: called as progress(done, total, name).

    Returns:
        The report of the transfer, and the files written.

    Raises:
        ProLoRAError: no such LoRA or target, or the `demo` extra is missing.
    """
    models = find_models()
    source, goal, file = choose_files(models, lora, target)
    base, other = load_unet(source), load_unet(goal)
    output.mkdir(parents=True, exist_ok=True)
    moved, record, picture, page = (
        output / f"{lora}-on-{target}{suffix}"
        for suffix in (".safetensors", ".json", ".png", ".html")
    )
    check_writable(picture)
    check_report_path(page)

    report = transfer_file(file, source, goal, moved, method=method)
    record.write_text(report.to_json() + "\n")

    table = SafetensorsFile(models / "labels.safetensors").read("table").float()
    copied = transfer(file, source, goal, method="copy").adapter
    rows: list[tuple[str, nn.Module]] = [
        ("source", base),
        ("source + LoRA", merge_adapter(base, read_adapter(file))),
        (target, other),
        (f"{target} + copied LoRA", merge_adapter(other, copied)),
        (f"{target} + {report.method}", merge_adapter(other, read_adapter(moved))),
    ]
    images = []
    for done, (name, unet) in enumerate(rows):
        progress(done, len(rows), f"sampling: {name}")
        images.append(sample_digits(unet, table, seed))
    progress(len(rows), len(rows), "done")
    draw_samples([name for name, _ in rows], torch.stack(images), picture)
    shown = Picture(picture.read_bytes(), describe_samples([name for name, _ in rows]))
    facts = {"LoRA": file.name, "written to": moved.name}
    write_text_atomically(page, render_report(report, facts, [shown]))
    return report, [moved, record, picture, page]


def describe_samples(names: list[str]) -> str:
    """What the picture shows, in a sentence."""
    return f"Digits from the same noise, a row each: {'; '.join(names)}."


def choose_files(models: Path, lora: str, target: str) -> tuple[Path, Path, Path]:
    """The source's folder, the target's folder and the LoRA's file.

    Raises:
        ProLoRAError: there is no such target or LoRA.
    """
    targets = {path.parent.name: path.parent for path in models.glob("*/config.json")}
    source = targets.pop("source")
    files = {path.stem: path for path in models.glob("loras/*.safetensors")}
    for option, name, known in (("--target", target, targets), ("--lora", lora, files)):
        if name not in known:
            choices = ", ".join(sorted(known))
            raise ProLoRAError(f"{option} {name}: there is none; choose from {choices}")
    return source, targets[target], files[lora]


def load_unet(folder: Path) -> nn.Module:
    """A shipped model in float32.

    Raises:
        ProLoRAError: the `demo` extra is missing.
    """
    try:
        from diffusers import UNet2DConditionModel
    except ImportError as error:
        raise ProLoRAError(
            "the demo samples images with diffusers: pip install 'prolora[demo]'"
        ) from error
    # Plain loading: the low-memory way needs accelerate, for models a thousand times larger.
    unet: nn.Module = UNet2DConditionModel.from_pretrained(
        folder, torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    return unet.eval()


def merge_adapter(unet: nn.Module, adapter: Adapter) -> nn.Module:
    """A copy of the model with the adapter's updates added to its weights."""
    changed = copy.deepcopy(unet)
    for name, update in adapter.updates.items():
        weight: Any = changed.get_submodule(name).weight
        weight.data += update.dense().reshape(weight.shape).to(weight.dtype)
    return changed


@torch.no_grad()
def sample_digits(unet: nn.Module, table: Tensor, seed: int) -> Tensor:
    """One image of each digit: Euler steps of a rectified flow with classifier-free guidance.

    Args:
        unet: predicts noise − image at timestep 1000·t.
        table: [11, tokens, width] label embeddings; the last row is "no label".
        seed: of the starting noise.

    Returns:
        [10, 16, 16] in −1 … 1.
    """
    x = torch.randn(10, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
    tokens = torch.cat([table[:NULL_LABEL], table[NULL_LABEL:].expand(10, -1, -1)])
    times = torch.linspace(1, 0, STEPS + 1)
    for now, after in itertools.pairwise(times):
        both = unet(torch.cat([x, x]), 1000 * now, tokens, return_dict=False)[0]
        labelled, unlabelled = both.chunk(2)
        x = x + (after - now) * (unlabelled + GUIDANCE * (labelled - unlabelled))
    return x[:, 0].clamp(-1, 1)


def draw_samples(names: list[str], images: Tensor, path: Path) -> None:
    """A PNG with a captioned row of images [rows, columns, h, w] for each name."""
    from PIL import Image, ImageDraw

    rows, columns, height, width = images.shape
    cell_h, cell_w, caption, gap = height * SCALE, width * SCALE, 190, 4
    sheet = Image.new("L", (caption + columns * (cell_w + gap), rows * (cell_h + gap)), 255)
    pen = ImageDraw.Draw(sheet)
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    for i, name in enumerate(names):
        top = i * (cell_h + gap)
        pen.text((8, top + cell_h // 2 - 8), name, fill=0, font_size=14)
        for j in range(columns):
            cell = Image.fromarray(pixels[i, j].numpy()).resize(
                (cell_w, cell_h), Image.Resampling.NEAREST
            )
            sheet.paste(cell, (caption + j * (cell_w + gap), top))
    sheet.save(path)
