"""The demo: a shipped LoRA moves between two shipped models, and images show what it does.

The models are those of examples/icon_family: real diffusion transformers with FLUX's module names,
trained on coloured icons of 24 × 24 pixels. Needs the `demo` extra (diffusers and Pillow).
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import read_adapter
from ..adapters.adapter import Adapter
from ..bases import open_base
from ..core.methods import MethodChoice
from ..errors import InvalidOption, ProLoRAError, name_options
from ..files.safetensors_file import SafetensorsFile
from ..files.store import check_free, put_bytes, put_text
from ..probe import FitSettings, Samplers, fit_to_models
from ..workflow.by_fitting.pipeline import describe_fit
from ..workflow.page.document import Picture
from ..workflow.report import Report
from ..workflow.transfer import transfer
from .options import write_flag

STEPS, GUIDANCE = 16, 3.0
# Members of the family that are sampled otherwise: steps and guidance, 1 being none.
SAMPLED_OTHERWISE = {"few-step": (4, 1.0)}
NULL_PROMPT = "nothing nothing nothing nothing"
SIZE, PATCH = 24, 4  # pixels of an image, and of what the transformer reads as one token
SCALE = 6  # pixels of the picture for each of a sample
APART = "apart"
"""The member that was trained apart from the source, which weights alone move nothing to."""
FITTED_IMAGES = 16  # of each run of a model that a fit learns from

PROMPTS = (
    "face noto many on-blue",
    "clock fluent many on-red",
    "flower fluent many on-purple",
    "fruit noto many on-green",
    "star noto many on-blue",
    "car blob many on-white",
)
"""What the pictures show: a thing, the set it is drawn like, its inks and the ground.

The family draws these well: examples/icon_family/README.md has how often a judge sees them.
"""
BUTTERFLIES = (
    *(
        f"butterfly {style}"
        for style in (
            "noto many on-white",
            "blob many on-green",
            "twemoji many on-yellow",
            "fluent many on-blue",
            "emojione many on-black",
            "silhouette ink-black on-orange",
        )
    ),
    *PROMPTS[:4],
)
"""What they show of the LoRA that teaches the butterfly."""


def find_models() -> Path:
    """The folder of the shipped models: in an installed package, else in the source tree."""
    package = Path(__file__).resolve().parents[1]
    for folder in (
        package / "icon_family/weights",
        package.parents[1] / "examples/icon_family/weights",
    ):
        if (folder / "prompts.safetensors").is_file():
            return folder
    raise ProLoRAError("this installation carries no demo models: install prolora from its source")


def run_demo(
    output: Path,
    *,
    lora: str = "neon",
    target: str = "",
    method: MethodChoice = "auto",
    prompts: Sequence[str] = (),
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> tuple[Report, list[Path]]:
    """Transfers a shipped LoRA and draws samples of every combination, from the same noise.

    Args:
        output: folder for the LoRA, the report and the picture; made if missing.
        lora: a file of the family's `loras` folder.
        target: "apart", "pruned", "far" or "few-step"; by default "apart", or "pruned" where
            another method than "auto" is chosen.
        method: as `transfer` takes it; "auto" fits the LoRA to "apart".
        prompts: of four words each; those of the LoRA if there are none.
        seed: of the noise.
        overwrite: replace what exists.
        progress: called as progress(done, total, name).

    Returns:
        The report of the transfer, and the files written.

    Raises:
        InvalidOption: the method moves nothing to that target.
        ProLoRAError: no such LoRA, target or prompt, or the `demo` extra is missing.
    """
    models = find_models()
    target = target or (APART if method == "auto" else "pruned")
    if target == APART and method not in ("auto", "copy"):
        raise InvalidOption(
            f"{APART} was trained apart from the source, and {method!r} moves nothing to it: "
            "choose the method auto, which runs both models, or the target pruned, far or few-step"
        )
    source, goal, file = find_demo_files(models, lora, target)
    prompts = prompts or (BUTTERFLIES if lora == "concept" else PROMPTS)
    tokens = encode_prompts(models, prompts)
    base, other = load_transformer(source), load_transformer(goal)
    moved, record, picture, page = (
        output / f"{lora}-on-{target}{suffix}"
        for suffix in (".safetensors", ".json", ".png", ".html")
    )
    for path in (moved, record, picture, page):
        check_free(path, overwrite=overwrite)

    if target == APART and method == "auto":
        ends = Samplers(sampler_of(base, models, lora), sampler_of(other, models, lora))
        made = fit_to_models(base, other, read_adapter(file), ends, FitSettings(progress=progress))
        fitted = describe_fit(file, open_base(source), open_base(goal), made)
        fitted.save(moved, overwrite=overwrite)
        report = fitted.report
    else:
        # The pruned target lacks blocks in the middle, so that its numbers are not the source's.
        report = transfer(file, source, goal, out=moved, method=method, overwrite=overwrite).report
    report.save(record, overwrite=overwrite)

    copied = transfer(file, source, goal, method="copy").adapter
    rows: list[tuple[str, str, nn.Module]] = [
        ("source", "source", base),
        ("source", "source + LoRA", merge_adapter(base, read_adapter(file))),
        (target, target, other),
        (target, f"{target} + copied LoRA", merge_adapter(other, copied)),
        (target, f"{target} + moved ({report.method})", merge_adapter(other, read_adapter(moved))),
    ]
    images = sample_rows(rows, tokens, seed, progress)
    names, columns = [name for _, name, _ in rows], [prompt.split()[0] for prompt in prompts]
    drawn = draw_samples(names, columns, images, say_below(report, target))
    put_bytes(picture, drawn, overwrite=overwrite)
    shown = Picture(drawn, describe_samples(names, prompts))
    facts = {"LoRA": file.name, "written to": moved.name}
    text = name_options(report.to_html(facts, [shown]), write_flag)
    put_text(page, text, overwrite=overwrite)
    return report, [moved, record, picture, page]


def sample_rows(
    rows: Sequence[tuple[str, str, nn.Module]],
    tokens: Tensor,
    seed: int,
    progress: Callable[[int, int, str], None],
) -> Tensor:
    """Images [rows, prompts, 3, 24, 24] of rows: a member, what it is called, and its weights."""
    images = []
    for done, (member, name, transformer) in enumerate(rows):
        progress(done, len(rows), f"sampling: {name}")
        steps, guidance = SAMPLED_OTHERWISE.get(member, (STEPS, GUIDANCE))
        images.append(sample_icons(transformer, tokens, steps, guidance, seed))
    progress(len(rows), len(rows), "done")
    return torch.stack(images)


def sampler_of(transformer: nn.Module, models: Path, lora: str) -> Callable[[int], None]:
    """A function that lets a member draw what the family knows, of prompts and noise by a seed."""
    beginnings = json.loads(SafetensorsFile(models / "prompts.safetensors").metadata["beginnings"])
    of_concept = lora == "concept"
    known = [
        text
        for text in beginnings
        if len(text.split()) == 4
        and text != NULL_PROMPT
        and text.startswith("butterfly") == of_concept
    ]

    def draw(seed: int) -> None:
        prompts = random.Random(seed).choices(known, k=FITTED_IMAGES)
        sample_icons(transformer, encode_prompts(models, prompts), STEPS, GUIDANCE, seed)

    return draw


def say_below(report: Report, target: str) -> str:
    """The sentence under the picture: what was measured, or else what to compare."""
    gate = report.probe.gate if report.probe else None
    if gate is None or gate.copy_share is None:
        return f"Copied to {target} as it is (row 4), and moved to it by prolora (row 5)."
    fitted, copied = (min(shares.values()) for shares in (gate.share, gate.copy_share))
    does = f"does {copied:.0%}" if copied > 0 else "does nothing useful"
    raised = f", and is written {gate.strength:g} times as strong" if gate.strength > 1 else ""
    return (
        f"The target was trained apart from the source. A copy of the LoRA {does} there (row 4). "
        f"Fitted by prolora to both models, it reached {fitted:.0%} of what it does to the "
        f"source{raised} (row 5)."
    )


def describe_samples(names: Sequence[str], prompts: Sequence[str]) -> str:
    """What the picture shows, in two sentences."""
    rows, columns = "; ".join(names), "; ".join(prompts)
    return f"Icons from the same noise, a row each: {rows}. The prompts: {columns}."


def find_demo_files(models: Path, lora: str, target: str) -> tuple[Path, Path, Path]:
    """The source's folder, the target's folder and the LoRA's file.

    Raises:
        ProLoRAError: there is no such target or LoRA.
    """
    targets = {path.parent.name: path.parent for path in models.glob("*/config.json")}
    source = targets.pop("source")
    files = {path.stem: path for path in models.glob("loras/*.safetensors")}
    for what, name, known in (("target", target, targets), ("LoRA", lora, files)):
        if name not in known:
            choices = ", ".join(sorted(known))
            raise ProLoRAError(f"unknown demo {what} {name!r}: choose from {choices}")
    return source, targets[target], files[lora]


def encode_prompts(models: Path, prompts: Sequence[str]) -> Tensor:
    """What the family's text encoder says about prompts, and about the null prompt.

    The encoder itself is not shipped. It looks back only, so that a token depends on the words up
    to its own; the table has a row for every beginning of a prompt.

    Returns:
        [1 + prompts, 4, 64]; the null prompt comes first.

    Raises:
        ProLoRAError: the models have not learnt such a prompt.
    """
    file = SafetensorsFile(models / "prompts.safetensors")
    beginnings = json.loads(file.metadata["beginnings"])
    places = {beginning: place for place, beginning in enumerate(beginnings)}
    rows = []
    for prompt in (NULL_PROMPT, *prompts):
        words = prompt.split()
        parts = [" ".join(words[:count]) for count in range(1, len(words) + 1)]
        known = list(itertools.takewhile(places.__contains__, parts))
        if not len(words) == len(known) == 4:
            following = name_words(beginnings, ["", *known][min(len(known), 3)])
            raise ProLoRAError(f"--prompt {prompt!r}: a prompt has four words. {following}")
        rows.append([places[part] for part in parts])
    return file.read("tokens").float()[torch.tensor(rows)]


def name_words(beginnings: Sequence[str], before: str) -> str:
    """The words that may come after a beginning of a prompt, in a sentence."""
    parts = [part.rpartition(" ") for part in beginnings if part != "nothing"]
    words = ", ".join(word for start, _, word in parts if start == before)
    place = f"after {before!r}" if before else "first"
    return f"These may come {place}: {words}"


def load_transformer(folder: Path) -> nn.Module:
    """A shipped model in float32.

    Raises:
        ProLoRAError: the `demo` extra is missing.
    """
    try:
        from diffusers import FluxTransformer2DModel
    except ImportError as error:
        raise ProLoRAError(
            "the demo samples images with diffusers: pip install 'prolora[demo]'"
        ) from error
    # Plain loading: the low-memory way needs accelerate, for models a thousand times larger.
    transformer: nn.Module = FluxTransformer2DModel.from_pretrained(
        folder, torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    return transformer.eval()


def merge_adapter(model: nn.Module, adapter: Adapter) -> nn.Module:
    """A copy of the model with the adapter's updates added to its weights."""
    changed = copy.deepcopy(model)
    for name, update in adapter.updates.items():
        weight: Any = changed.get_submodule(name).weight
        weight.data += update.dense().reshape(weight.shape).to(weight.dtype)
    return changed


@torch.no_grad()
def sample_icons(
    transformer: nn.Module, tokens: Tensor, steps: int, guidance: float, seed: int
) -> Tensor:
    """One image of each prompt: Euler steps of a rectified flow with classifier-free guidance.

    Args:
        transformer: predicts noise − image.
        tokens: [1 + n, 4, 64], those of the null prompt first.
        steps: of equal length.
        guidance: v = v_null + guidance · (v_prompt − v_null).
        seed: of the starting noise.

    Returns:
        [n, 3, 24, 24] in −1 … 1.
    """
    null, wanted = tokens[:1], tokens[1:]
    n = len(wanted)
    x = torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([wanted, null.expand(n, -1, -1)])
    for now, after in itertools.pairwise(torch.linspace(1, 0, steps + 1)):
        if guidance == 1:
            velocity = predict_velocity(transformer, x, now, wanted)
        else:
            prompted, free = predict_velocity(transformer, torch.cat([x, x]), now, both).chunk(2)
            velocity = free + guidance * (prompted - free)
        x = x + (after - now) * velocity
    return x.clamp(-1, 1)


def predict_velocity(transformer: nn.Module, x: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
    """The transformer's output for images [n, 3, 24, 24], as an image of that shape.

    Patches are plain pixels in place of the latents of an autoencoder, and the mean token stands
    for CLIP's pooled output.
    """
    side = SIZE // PATCH
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
    (out,) = transformer(
        hidden_states=F.pixel_unshuffle(x, PATCH).flatten(2).mT,
        encoder_hidden_states=tokens,
        pooled_projections=tokens.mean(1),
        timestep=time.expand(len(x)),
        img_ids=places,
        txt_ids=torch.zeros(tokens.shape[1], 3),
        return_dict=False,
    )
    return F.pixel_shuffle(out.mT.reshape(len(x), -1, side, side), PATCH)


def draw_samples(names: list[str], columns: list[str], images: Tensor, below: str) -> bytes:
    """A PNG with a captioned row of images [rows, columns, 3, h, w] for each name.

    The sentence below has the lines that it needs.
    """
    from PIL import Image, ImageDraw

    _, _, _, height, width = images.shape
    cell_h, cell_w, head, gap, line = height * SCALE, width * SCALE, 20, 4, 22
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    caption = 16 + round(max(pen.textlength(name, font_size=14) for name in names))
    across, end = caption + len(columns) * (cell_w + gap), head + len(names) * (cell_h + gap)
    lines = wrap_text(below, lambda text: pen.textlength(text, font_size=15) <= across - 16)
    size = (across, end + line * len(lines) + gap)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).movedim(2, -1)
    for j, word in enumerate(columns):
        middle = caption + j * (cell_w + gap) + cell_w // 2
        pen.text((middle, head // 2), word, fill="black", font_size=13, anchor="mm")
    for i, name in enumerate(names):
        top = head + i * (cell_h + gap)
        pen.text((8, top + cell_h // 2), name, fill="black", font_size=14, anchor="lm")
        for j in range(len(columns)):
            # The eye reads a small image more easily without the edges of its pixels.
            cell = Image.fromarray(pixels[i, j].contiguous().numpy()).resize(
                (cell_w, cell_h), Image.Resampling.BICUBIC
            )
            sheet.paste(cell, (caption + j * (cell_w + gap), top))
    for i, text in enumerate(lines):
        pen.text((8, end + line * i + line // 2), text, fill="black", font_size=15, anchor="lm")
    drawn = io.BytesIO()
    sheet.save(drawn, "png", optimize=True)
    return drawn.getvalue()


def wrap_text(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Lines of whole words, each as long as fits."""
    lines: list[str] = []
    for word in text.split():
        if lines and fits(f"{lines[-1]} {word}"):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
