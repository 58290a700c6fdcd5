"""Measures the family and draws it: ``python evaluate.py`` writes results.json and samples.png.

A transfer is scored by the share of the gap it closes: 0 is the target without any adapter, 1 is
a LoRA trained on the target itself. The transfer measured here is the plainest one, "copy": the
source's LoRA added to the target's modules of the same name.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

# isort: split
from data import DOMAINS, STYLES, digits
from lora import add_by_name
from model import Labels, held_out_loss, load_unet, sample
from train import WEIGHTS, WORK, lora_path

HERE = Path(__file__).parent


def with_lora(unet: nn.Module, path: Path) -> tuple[nn.Module, tuple[int, int]]:
    """A copy of the UNet with a LoRA merged in, and how many modules were found and missing."""
    merged = copy.deepcopy(unet)
    return merged, add_by_name(merged, path)


def weight_drift(source: nn.Module, target: nn.Module) -> float:
    """Relative change, in Frobenius norm, of the matrices with the same name in both models."""
    before, after = source.state_dict(), target.state_dict()
    names = [n for n in after if ".attentions." in n and after[n].dim() == 2]
    moved = sum((after[n] - before[n]).square().sum() for n in names)
    return float((moved / sum(before[n].square().sum() for n in names)).sqrt())


def losses(unets: dict[str, nn.Module], labels: Labels) -> dict:
    """Held-out losses of every member and style."""
    x, y = digits("held_out")
    table = {}
    for member, unet in unets.items():
        for style, restyle in STYLES.items():
            images = DOMAINS[member](restyle(x))
            row = {"none": held_out_loss(unet, labels, images, y)}
            merged, (found, missing) = with_lora(unet, lora_path("source", style))
            value = held_out_loss(merged, labels, images, y)
            if member == "source":
                row |= {"lora": value, "modules": found}
            else:
                oracle, _ = with_lora(unet, lora_path(member, style))
                row |= {"copy": value, "oracle": held_out_loss(oracle, labels, images, y)}
                row["recovered"] = (row["none"] - value) / (row["none"] - row["oracle"])
                row |= {"modules_copied": found, "modules_absent": missing}
            table.setdefault(member, {})[style] = {
                k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()
            }
            print(member, style, table[member][style], flush=True)
    return table


def contact_sheet(unets: dict[str, nn.Module], labels: Labels) -> Image.Image:
    """Per member: a row without adapter and a row per copied LoRA; one column per digit twice."""
    y = torch.arange(10).repeat_interleave(2)
    rows: list[Tensor] = []
    for unet in unets.values():
        for path in [None, *(lora_path("source", style) for style in STYLES)]:
            model = unet if path is None else with_lora(unet, path)[0]
            rows.append(torch.cat(list(sample(model, labels, y)[:, 0]), dim=1))
    sheet = ((torch.cat(rows) + 1) * 127.5).round().byte().numpy()
    image = Image.fromarray(sheet)
    return image.resize((3 * image.width, 3 * image.height), Image.Resampling.NEAREST)


def main() -> None:
    """Writes results.json and samples.png."""
    labels = Labels.load(WEIGHTS / "labels.safetensors")
    unets = {member: load_unet(WEIGHTS / member).eval() for member in DOMAINS}
    contact_sheet(unets, labels).save(HERE / "samples.png", optimize=True)
    x, y = digits("held_out")
    results = {
        "held_out_loss": losses(unets, labels),
        "held_out_loss_own_domain": {
            member: round(held_out_loss(unet, labels, DOMAINS[member](x), y), 4)
            for member, unet in unets.items()
        },
        "weight_drift_from_source": {
            member: round(weight_drift(unets["source"], unets[member]), 4)
            for member in ("pruned", "finetuned")
        },
        "parameters": {m: sum(p.numel() for p in u.parameters()) for m, u in unets.items()},
        "train_seconds": json.loads((WORK / "times.json").read_text()),
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
