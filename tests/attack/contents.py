"""What results say, read without prolora: by safetensors, PEFT and a few lines of float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sandbox import digest
from torch import Tensor

Updates = dict[str, Tensor]


def read_results(folder: Path) -> dict[str, str]:
    """Name below a folder -> digest of the tensors of each safetensors file; the header is left
    out, since it names the input."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            tensors = load_file(path)
        except Exception as error:  # whatever is wrong with it, it is no result
            found[path.relative_to(folder).as_posix()] = f"cannot be read: {error}"
            continue
        parts = []
        for name, tensor in sorted(tensors.items()):
            parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            parts.append(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        found[path.relative_to(folder).as_posix()] = digest(b"".join(parts))
    return found


def read_bytes(folder: Path) -> dict[str, bytes]:
    """Name below a folder -> content, of all its files."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def read_kohya(path: Path) -> Updates | None:
    """Stem -> ΔW in float64 of a plain LoRA in kohya's spelling; None if it is anything else."""
    try:
        tensors = load_file(path)
    except Exception:
        return None
    stems: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        stem, _, role = key.partition(".")
        stems.setdefault(stem, {})[role] = tensor.double()
    updates = {}
    for stem, parts in stems.items():
        if (
            not {"lora_up.weight", "lora_down.weight"}
            <= parts.keys()
            <= {
                "lora_up.weight",
                "lora_down.weight",
                "alpha",
            }
        ):
            return None
        up, down = parts["lora_up.weight"], parts["lora_down.weight"]
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            return None
        updates[stem] = up @ down * (parts.get("alpha", torch.tensor(len(down))) / len(down))
    return updates


def read_peft(folder: Path) -> Updates | None:
    """Module -> ΔW in float64 of a PEFT folder, with the scale as PEFT itself reads it."""
    from peft import LoraConfig

    try:
        config = LoraConfig.from_pretrained(folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    except Exception:
        return None
    if config.rank_pattern or config.alpha_pattern or config.use_dora:
        return None
    updates = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        stem = key.removesuffix(".lora_A.weight")
        up = tensors.pop(f"{stem}.lora_B.weight", None)
        down = tensors.pop(key)
        if up is None or up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            return None
        updates[stem] = scale * (up.double() @ down.double())
    return None if tensors else updates


def agree(expected: Updates | None, found: Updates | None, wanted: set[str]) -> bool:
    """Whether a result holds the expected updates: all of those that are wanted, and no other."""
    if expected is None or found is None or found.keys() != expected.keys() & wanted:
        return False
    return all(
        update.shape == expected[name].shape
        and float((update - expected[name]).norm()) <= 1e-5 * float(expected[name].norm()) + 1e-12
        for name, update in found.items()
    )


def state_differences(report: Path) -> set[str]:
    """What a report says was not moved as it stood, or not moved at all: a line for each.

    A tensor that is left out says nothing: the update that it is part of would be another.
    """
    try:
        said: Any = json.loads(report.read_text())
    except (OSError, ValueError):
        return set()
    rows = [row for row in said["modules"] if row["status"] != "mapped"]
    lines = {f"{row['source']} {row['status']}" for row in rows}
    return lines | {f"renumbered {pair}" for pair in said.get("renumbered", {}).items()}
