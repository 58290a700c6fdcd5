"""A converter on `prolora.core` alone: reads two checkpoints and a LoRA, projects, and writes.

    python by_hand.py lora.safetensors source.safetensors target.safetensors out.safetensors

It reads files in the names of diffusers. The checkpoints have NAME.weight; the LoRA has
NAME.lora_A.weight [rank, in] and NAME.lora_B.weight [out, rank] behind "unet." or "transformer.",
and NAME.alpha where its scale, alpha / rank, is not 1. `prolora.transfer` reads the other formats,
too, decides whether a copy is better, and reports what is lost.
"""

import sys
from collections.abc import Mapping

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prolora.core import LowRank, project_many


class Weights(Mapping):
    """The weights of a checkpoint, by name; each is read when it is asked for."""

    def __init__(self, file):
        self.file, self.keys_in_file = file, set(file.keys())

    def __getitem__(self, name):
        return self.file.get_tensor(f"{name}.weight")

    def __iter__(self):
        return (key.removesuffix(".weight") for key in self.keys_in_file)

    def __len__(self):
        return len(self.keys_in_file)


def read_lora(path):
    """Returns name -> (up, down) with the scale in `up`, and the prefix of all names."""
    tensors, updates, prefix = load_file(path), {}, ""
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            full = key.removesuffix(".lora_A.weight")
            prefix, name = full.split(".", 1)
            scale = float(tensors.get(f"{full}.alpha", len(down))) / len(down)
            up = tensors[f"{full}.lora_B.weight"].float() * scale
            updates[name] = LowRank(up, down.float())
    return updates, prefix


def main(lora, source, target, out):
    updates, prefix = read_lora(lora)
    with safe_open(source, "pt") as old, safe_open(target, "pt") as new:
        moved = project_many(
            updates, Weights(old), Weights(new), rank=0.99, method="prolora", max_bytes=2 << 30
        )
    tensors = {}
    for name, (up, down) in moved.items():
        tensors[f"{prefix}.{name}.lora_A.weight"] = down.contiguous()
        tensors[f"{prefix}.{name}.lora_B.weight"] = up.contiguous()
    save_file(tensors, out)
    print(f"{len(moved)} modules moved to {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
