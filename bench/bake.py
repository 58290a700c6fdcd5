"""Baking a LoRA beside the merges of sd-scripts and sd-lora-tools: CPU seconds, peak memory, bits.

    python bench/bake.py FOLDER SD_SCRIPTS SD_LORA_TOOLS

The model has three blocks of FLUX.1's sizes, random, in bfloat16; the LoRA has rank 16 on every
matrix of them. sd-scripts runs as `networks/flux_merge_lora.py --precision float`, in both of its
ways to load, and sd-lora-tools as `merge_to_model`; packages that only training needs may be
missing. Each is a process of its own.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from prolora.architectures.families import known_families
from prolora.architectures.layouts import load_layout

BLOCKS = re.compile(r"(double_blocks\.0|single_blocks\.[01])\.")
PEAK = "print(next(x.split()[1] for x in open('/proc/self/status') if x.startswith('VmHWM')))"
OURS = f"import sys, prolora; prolora.bake(sys.argv[2:3], *sys.argv[1::2], overwrite=True); {PEAK}"
THEIRS = f"""
import runpy, sys
from pathlib import Path
from unittest.mock import MagicMock
from loader_programs.common import enter
base, lora, out, scripts, *more = sys.argv[1:]
for name in ("lpw", "sdxl_lpw"):  # pipelines for older versions of transformers
    sys.modules["library." + name + "_stable_diffusion"] = MagicMock()
enter(Path(scripts), *"torchvision accelerate cv2 imagesize toml voluptuous bitsandbytes".split())
sys.path.insert(0, scripts + "/networks")
sys.argv = ["merge", "--flux_model", base, "--models", lora, "--ratios", "1", "--save_to", out]
sys.argv += ["--precision", "float", "--save_precision", "bf16", "--no_metadata", *more]
runpy.run_path(scripts + "/networks/flux_merge_lora.py", run_name="__main__")
{PEAK}"""
TOOLS = f"""
import runpy, sys
base, lora, out, tools = sys.argv[1:]
sys.path.insert(0, tools + "/src")
sys.argv = ["merge", "--base_model", base, "--models", lora, "--ratios", "1", "--save_to", out]
sys.argv += ["--precision", "float", "--save_precision", "bf16"]
runpy.run_module("sd_lora_tools.merge_to_model", run_name="__main__")
{PEAK}"""


def write_case(folder: Path) -> None:
    """Writes the model in its authors' names, and the LoRA in kohya's."""
    shapes, made, lora = load_layout("flux1-dev").shapes, {}, {}
    for name in shapes:
        weight = known_families()["flux"].find_weight_holding(name)
        if weight and BLOCKS.match(weight.name):
            rows, inputs = sum(shapes[part][0] for part in weight.parts), shapes[name][1]
            path = f"lora_unet_{weight.name.replace('.', '_')}"
            made[f"{weight.name}.weight"] = (torch.randn(rows, inputs) * 0.02).bfloat16()
            lora[f"{path}.lora_up.weight"] = (torch.randn(rows, 16) * 0.01).bfloat16()
            lora[f"{path}.lora_down.weight"] = (torch.randn(16, inputs) * 0.1).bfloat16()
            lora[f"{path}.alpha"] = torch.tensor(16.0)
    save_file(made, folder / "base.safetensors")
    save_file(lora, folder / "lora.safetensors")


if __name__ == "__main__":
    words = sys.argv[1:] if len(sys.argv) == 4 else sys.exit(__doc__)
    folder, scripts, tools = (Path(word).resolve() for word in words)
    torch.manual_seed(0)
    write_case(folder)
    ways = {
        "prolora": (OURS, []),
        "sd-scripts": (THEIRS, [scripts]),
        "lean": (THEIRS, [scripts, "--mem_eff_load_save"]),
        "sd-lora-tools": (TOOLS, [tools]),
    }
    ours = {}
    for way, (code, more) in ways.items():
        files = [folder / f"{name}.safetensors" for name in ("base", "lora", way)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = [sys.executable, "-c", code, *map(str, [*files, *more])]
        done = subprocess.run(run, check=True, capture_output=True, text=True, cwd="bench")
        after, peak = resource.getrusage(resource.RUSAGE_CHILDREN), done.stdout.split()[-1]
        user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
        print(f"{way}: {user:.1f} + {system:.1f} CPU s, {int(peak) / 2**20:.2f} GiB", flush=True)
        made = {key: x.view(torch.int16) for key, x in load_file(files[2]).items()}
        ours = ours or made
        total = sum(map(torch.numel, ours.values()))
        other = sum(int((made[key] != ours[key]).sum()) for key in ours)
        print(f"  {other} of {total} numbers differ from prolora's")
