"""What results contain, read without prolora: by safetensors, PEFT and a few lines of float64."""

from __future__ import annotations

import json
from pathlib import Path

import mini
import torch
from inputs import kohya_stem
from safetensors.torch import load_file
from sandbox import Box, digest
from torch import Tensor

Updates = dict[str, Tensor]


def read_results(folder: Path) -> dict[str, str]:
    """Name below a folder -> digest of the tensors of each safetensors file.

    The header is left out, since it names the input.
    """
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder).as_posix()
        try:
            tensors = load_file(path)
        except Exception as error:  # whatever is wrong with it, it is no result
            found[name] = f"cannot be read: {error}"
            continue
        parts = []
        for key, tensor in sorted(tensors.items()):
            parts.append(f"{key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            parts.append(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        found[name] = digest(b"".join(parts))
    return found


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
        up, down = parts.pop("lora_up.weight", None), parts.pop("lora_down.weight", None)
        if parts.keys() - {"alpha"} or not is_product(up, down):
            return None
        updates[stem] = up @ down * (parts.get("alpha", torch.tensor(len(down))) / len(down))
    return updates


def is_product(up: Tensor | None, down: Tensor | None) -> bool:
    are_matrices = up is not None and down is not None and up.ndim == down.ndim == 2
    return are_matrices and up.shape[1] == down.shape[0]


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
        up, down = tensors.pop(f"{stem}.lora_B.weight", None), tensors.pop(key)
        if not is_product(up, down):
            return None
        updates[stem] = scale * (up.double() @ down.double())
    return None if tensors else updates


def agree(expected: Updates | None, found: Updates | None, wanted: set[str]) -> bool:
    """Whether a result has the expected updates: all of those that are wanted, and no other."""
    if expected is None or found is None or found.keys() != expected.keys() & wanted:
        return False
    return all(
        update.shape == expected[name].shape
        and float((update - expected[name]).norm()) <= 1e-5 * float(expected[name].norm()) + 1e-12
        for name, update in found.items()
    )


def is_same_kohya(box: Box) -> bool:
    """Whether the result has what the LoRA says, for all modules that the target has."""
    lora, moved = box.inputs / "lora.safetensors", box.out / "moved.safetensors"
    return agree(read_kohya(lora), read_kohya(moved), set(map(kohya_stem, mini.shapes(2))))


def is_same_peft(box: Box) -> bool:
    wanted = {f"base_model.model.{name}" for name in mini.shapes(2)}
    return agree(read_peft(box.inputs / "peft"), read_peft(box.out / "moved"), wanted)


def is_as_mapped(box: Box) -> bool:
    """Whether each module of the target has the update that map.json says, and no other has one."""
    try:
        table = json.loads((box.inputs / "map.json").read_text())
        sources = {kohya_stem(target): kohya_stem(source) for target, source in table.items()}
    except (ValueError, AttributeError):
        return False
    lora = read_kohya(box.inputs / "lora.safetensors") or {}
    expected = {target: lora[source] for target, source in sources.items() if source in lora}
    return agree(expected, read_kohya(box.out / "moved.safetensors"), set(expected))


def list_differences(report: Path) -> set[str]:
    """What a report says was not moved as it was, or not moved at all: a line for each.

    A tensor that is left out is no difference: the update that it is part of would be another.
    """
    try:
        facts = json.loads(report.read_text())
    except (OSError, ValueError):
        return set()
    rows = [row for row in facts["modules"] if row["status"] != "mapped"]
    lines = {f"{row['source']} {row['status']}" for row in rows}
    return lines | {f"renumbered {pair}" for pair in facts.get("renumbered", {}).items()}
