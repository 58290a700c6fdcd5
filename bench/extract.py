"""Time, memory and energy of extracting a LoRA from a full-size SDXL, beside sd-scripts' own code.

    python bench/extract.py FOLDER CHECKOUT [--site FOLDER] [--rank 32] [--every 20] [--json FILE]

CHECKOUT is one of kohya-ss/sd-scripts, and --site a folder with the packages that it asks for, at
its versions. The base is a U-Net of random weights in all of SDXL's shapes, written once to FOLDER,
2.57 billion numbers in fp16. In every 20th of the 722 matrices that sd-scripts makes LoRAs of, the
tuned one differs by 5 % of the norm: 90 % of the energy has rank 48 with a falling spectrum, and
the rest is dense noise. Full SVDs of all of them would take an hour.

`networks/extract_lora_from_models.py` runs as it stands but for three things, all in its favour: of
the matrices that it subtracts, all 722, it decomposes only those that differ; there are no text
encoders and no VAE to load; and weights are held as they are stored and not in float32, in which
SDXL's two pipelines take more than the 23 GiB of the machine that the figures are from. The two
take turns, each in a process of its own, imports not counted. In the last round sd-scripts runs
without clamping its factors.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from prolora import open_base
from prolora.adapters import read_adapter

CLAMPED, UNCLAMPED = 0.99, 1.0
_BEGIN = """
import json, os, sys, time
import torch
checkout, base, tuned, out, rank, number = sys.argv[1:7]
sys.path[:0] = [checkout, checkout + "/networks"]
"""
_END = """
seconds, used = time.perf_counter() - start, time.process_time() - used
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print()
print(json.dumps({
    "seconds": round(seconds, 1), "processor_seconds": round(used, 1),
    "peak_GiB": round(int(peak) / 2**20, 2), "threads": torch.get_num_threads(),
}))
"""
_START = "start, used = time.perf_counter(), time.process_time()\n"
_OURS = f"""{_BEGIN}
import prolora
{_START}
prolora.extract(base, tuned, out=out, out_rank=int(rank), dtype="float32", overwrite=True)
{_END}"""
_THEIRS = f"""{_BEGIN}
import runpy, tqdm
import lora
from library import sdxl_model_util as loading, train_util
changed = set(json.load(open(tuned + ".json")))
def load_unet(version, path, device):
    held = loading.load_file(path)
    held = {{name.removeprefix("model.diffusion_model."): held[name] for name in held}}
    with loading.init_empty_weights():
        unet = loading.sdxl_original_unet.SdxlUNet2DConditionModel()
    loading._load_state_dict_on_device(unet, held, device, dtype=torch.float16)
    return torch.nn.Module(), torch.nn.Module(), None, unet, None, None
tqdm.tqdm = lambda matrices: [x for x in matrices if x[0] in changed]
loading.load_models_from_sdxl_checkpoint = load_unet
words = "--sdxl --save_precision float --model_org", base, "--model_tuned", tuned
words = [*words[0].split(), *words[1:], "--save_to", out, "--dim", rank, "--clamp_quantile", number]
sys.argv[1:] = words
{_START}
runpy.run_path(checkout + "/networks/extract_lora_from_models.py", run_name="__main__")
{_END}"""
_WRITE = f"""{_BEGIN}
import re, zlib
from accelerate import init_empty_weights
from library.sdxl_original_unet import SdxlUNet2DConditionModel
from safetensors.torch import save_file
CHANGE, LOW, RANK_OF_CHANGE = 0.05, 0.9, 48
with init_empty_weights():
    shapes = {{name: held.shape for name, held in SdxlUNet2DConditionModel().state_dict().items()}}
in_lora = re.compile(r"\\.(?:transformer_blocks\\.|proj_(?:in|out)\\.)")
matrices = sorted(name for name, shape in shapes.items() if len(shape) > 1 and in_lora.search(name))
changed = set(matrices[:: int(number)])

def draw(name):
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))

def change(name, flat):
    (m, n), generator = flat.shape, draw(name + "/change")
    k = min(RANK_OF_CHANGE, m, n)
    low = torch.randn(m, k, generator=generator) * torch.arange(1, k + 1).float().rsqrt()
    low = low @ torch.randn(k, n, generator=generator)
    noise = torch.randn(m, n, generator=generator)
    low, noise = low * (LOW**0.5 / low.norm()), noise * ((1 - LOW) ** 0.5 / noise.norm())
    return flat + (low + noise) * (CHANGE * flat.norm())

for path in (tuned,) if os.path.exists(base) else (base, tuned):
    tensors = {{}}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=draw(name)) * 0.025
        if path == tuned and name in changed:
            weight = change(name, weight.flatten(1)).reshape(shape)
        tensors["model.diffusion_model." + name] = weight.half()
    save_file(tensors, path)
    del tensors
names = ["lora_unet_" + name.removesuffix(".weight").replace(".", "_") for name in sorted(changed)]
json.dump(names, open(tuned + ".json", "w"))
{_START}{_END}"""


def run(code: str, site: Path | None, *arguments: object) -> dict[str, float]:
    """The figures of a process of its own."""
    words = [sys.executable, "-c", code, *map(str, arguments)]
    ours = os.environ.get("PYTHONPATH", "")
    paths = os.pathsep.join(filter(None, [str(site) if site else "", ours]))
    done = subprocess.run(words, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths})
    if done.returncode:
        raise SystemExit(f"the process failed with {done.returncode}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(figures, flush=True)
    return figures


def measure_energy(base: Path, tuned: Path, lora: Path) -> dict[str, float]:
    """The share of each difference's energy that a LoRA holds: 1 − ‖ΔW − BA‖²/‖ΔW‖²."""
    old, new, adapter = open_base(base), open_base(tuned), read_adapter(lora)
    shares = {}
    for name, update in adapter.updates.items():
        wanted = (new.read(name).float() - old.read(name).float()).flatten(1)
        left = wanted - update.up.float() @ update.down.float()
        shares[name] = 1 - (left.double().square().sum() / wanted.double().square().sum()).item()
    return shares


def describe(rounds: list[dict[str, float]]) -> dict[str, object]:
    """The rounds of one program, and the least of each of their figures."""
    return {"rounds": rounds} | {name: min(one[name] for one in rounds) for name in rounds[0]}


def main() -> None:
    """Reads the arguments, measures, writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("checkout", type=Path, help="of kohya-ss/sd-scripts")
    parser.add_argument("--site", type=Path, help="a folder with the packages that it needs")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--every", type=int, default=20, help="one of how many matrices differs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    site, folder = arguments.site, arguments.folder
    base, tuned = folder / "unet.safetensors", folder / f"unet-{arguments.every}.safetensors"
    words = arguments.checkout, base, tuned
    if not tuned.with_name(f"{tuned.name}.json").exists():
        run(_WRITE, site, *words, "-", 0, arguments.every)
    mine, theirs, ours, other = folder / "mine.safetensors", folder / "theirs.safetensors", [], []
    energies: dict[str, dict[str, float]] = {}
    for clamp in (CLAMPED, UNCLAMPED):
        ours.append(run(_OURS, None, *words, mine, arguments.rank, 0))
        other.append(run(_THEIRS, site, *words, theirs, arguments.rank, clamp))
        energies[f"sd-scripts, clamp_quantile {clamp}"] = measure_energy(base, tuned, theirs)
    energies["prolora"] = kept = measure_energy(base, tuned, mine)
    best = energies[f"sd-scripts, clamp_quantile {UNCLAMPED}"]
    with safe_open(base, framework="pt") as file:
        count = len(file.keys())
    first, second = describe(ours), describe(other)
    facts = {
        "rank": arguments.rank,
        "tensors": count,
        "modules": len(best),
        "prolora": first,
        "sd-scripts": second,
        **{
            f"{name}_ratio": round(first[name] / second[name], 3)  # type: ignore[operator]
            for name in ("seconds", "processor_seconds", "peak_GiB")
        },
        "energy": {
            name: {
                "modules": len(shares),
                "mean": round(sum(shares.values()) / len(shares), 6),
                "worst": round(min(shares.values()), 6),
            }
            for name, shares in energies.items()
        },
        "energy_worst_difference": max(abs(kept[name] - best[name]) for name in best),
        "torch": torch.__version__,
    }
    print(json.dumps(facts, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
