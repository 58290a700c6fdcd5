"""Baking a LoRA into FLUX.1 beside sd-scripts' own merge: CPU seconds, peak memory, bits.

    python bench/bake.py FOLDER SD_SCRIPTS [--double 2 --single 4]

The model has so many blocks of FLUX.1's sizes, random, in bfloat16; the LoRA has rank 16 on every
matrix of them. sd-scripts runs as `networks/flux_merge_lora.py --precision float`, in both of its
ways to load; packages that only its training needs may be missing. Each is a process of its own.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from prolora.architectures.families import known_families
from prolora.architectures.layouts import load_layout

PEAK = "print(next(x.split()[1] for x in open('/proc/self/status') if x.startswith('VmHWM')))"
OURS = f"import sys, prolora; prolora.bake([sys.argv[2]], sys.argv[1], sys.argv[3]); {PEAK}"
THEIRS = (
    """
import runpy, sys
from unittest.mock import MagicMock
for name in ("lpw", "sdxl_lpw"):  # pipelines for older versions of transformers
    sys.modules[f"library.{name}_stable_diffusion"] = MagicMock()
from pathlib import Path
from loader_programs.common import enter
scripts, base, lora, out, *more = sys.argv[1:]
enter(Path(scripts), *"torchvision accelerate cv2 imagesize toml voluptuous bitsandbytes".split())
sys.path.insert(0, scripts + "/networks")
sys.argv = ["merge", "--flux_model", base, "--models", lora, "--ratios", "1", "--save_to", out]
sys.argv += ["--precision", "float", "--save_precision", "bf16", "--no_metadata", *more]
runpy.run_path(scripts + "/networks/flux_merge_lora.py", run_name="__main__")
"""
    + PEAK
)


def write_case(folder: Path, double: int, single: int) -> tuple[Path, Path]:
    """The model in its authors' names, and the LoRA in kohya's."""
    family, made, lora = known_families()["flux"], {}, {}
    shapes = load_layout("flux1-dev").shapes
    for name in shapes:
        weight = family.find_weight_holding(name)
        block = re.match(r"(double|single)_blocks\.(\d+)\.", weight.name if weight else "")
        if block and int(block[2]) < {"double": double, "single": single}[block[1]]:
            rows, inputs = sum(shapes[part][0] for part in weight.parts), shapes[name][1]
            made[f"{weight.name}.weight"] = (torch.randn(rows, inputs) * 0.02).bfloat16()
            path = f"lora_unet_{weight.name.replace('.', '_')}"
            lora[f"{path}.lora_up.weight"] = (torch.randn(rows, 16) * 0.01).bfloat16()
            lora[f"{path}.lora_down.weight"] = (torch.randn(16, inputs) * 0.1).bfloat16()
            lora[f"{path}.alpha"] = torch.tensor(16.0)
    save_file(made, folder / "base.safetensors")
    save_file(lora, folder / "lora.safetensors")
    return folder / "base.safetensors", folder / "lora.safetensors"


def main() -> None:
    """Runs all, and compares the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("scripts", type=Path)
    parser.add_argument("--double", type=int, default=2)
    parser.add_argument("--single", type=int, default=4)
    asked = parser.parse_args()
    torch.manual_seed(0)
    base, lora = write_case(asked.folder, asked.double, asked.single)
    theirs = ["-c", THEIRS, asked.scripts.resolve(), base, lora]
    ways = {"prolora": ["-c", OURS, base, lora], "sd-scripts": theirs, "sd-scripts, lean": theirs}
    for way, command in ways.items():
        out = asked.folder / f"{way}.safetensors"
        out.unlink(missing_ok=True)
        more = ["--mem_eff_load_save"] if "lean" in way else []
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = [sys.executable, *map(str, [*command, out, *more])]
        done = subprocess.run(run, check=True, capture_output=True, text=True, cwd="bench")
        after, peak = resource.getrusage(resource.RUSAGE_CHILDREN), done.stdout.split()[-1]
        user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
        print(f"{way}: {user:.1f} + {system:.1f} CPU s, {int(peak) / 2**20:.2f} GiB", flush=True)
    files = [safe_open(asked.folder / f"{way}.safetensors", "pt") for way in list(ways)[:2]]
    total = other = 0
    for key in files[0].keys():
        one, two = (file.get_tensor(key).view(torch.int16) for file in files)
        total, other = total + one.numel(), other + int((one != two).sum())
    print(f"{other} of {total} numbers differ")


if __name__ == "__main__":
    main()
