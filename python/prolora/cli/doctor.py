"""What runs here, and where it is computed."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from ..bases.cache.basis_cache import default_folder
from ..bases.cache.cache_folder import measure_cache
from ..core.ops import native
from ..files.sizes import format_size
from ..version import __version__
from .console import answer, out
from .flags import JsonOption
from .tables import draw_facts


def doctor(as_json: JsonOption = False) -> None:
    """Say what runs here and what is missing: kernels, a GPU, the cache."""
    kernels, on_gpu = native.describe_installation(), torch.cuda.is_available()
    facts = {
        "prolora": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu threads": torch.get_num_threads(),
        "NVIDIA driver": describe_driver(on_gpu),
        "torch sees a GPU": on_gpu,
        **kernels,
        "cache": describe_cache(default_folder()),
    }
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        facts["GPU memory"] = f"{format_size(free)} free of {format_size(total)}"
    if as_json:
        return answer.write(facts)
    where = "A GPU will compute" if on_gpu else f"No GPU: computing on {os.cpu_count()} cores"
    verdict = "✔ LoRAs can be moved here, in part more slowly: no extension is compiled."
    compiled = str(kernels.get("compiled extension", "no"))
    if compiled == "yes":
        verdict = "✔ Everything that moving LoRAs needs is here."
    out.print(f"{verdict} {where}.", style="bold")
    spelled = {True: "yes", False: "no"}
    rows = [(n, spelled[x] if isinstance(x, bool) else str(x)) for n, x in facts.items()]
    why = compiled.removeprefix("no")  # once is enough
    rows = [(n, x.replace(why, "") if why and n.startswith("op ") else x) for n, x in rows]
    return out.print(draw_facts(rows))


def describe_driver(seen: bool) -> str:
    """Reports the driver's version, and what keeps torch from the card."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "none"
    line = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    version = subprocess.run(line, capture_output=True, text=True).stdout.split("\n")[0]
    if not version[:1].isdecimal():
        return "nvidia-smi reports no card"
    if seen:
        return version
    if torch.version.cuda is None:
        return f"{version}, but this torch has no CUDA: install its build for CUDA (docs/guide.md)"
    return f"{version}, too old for this torch (CUDA {torch.version.cuda}), or no card is visible"


def describe_cache(folder: Path) -> str:
    """Describes the basis cache: path, size, free space on its disk."""
    try:
        size = measure_cache(folder)
        # Of a drive that is missing on Windows not even the last one is there.
        parents = (path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(parent := next(parents, folder)).free
    except OSError as error:
        return f"{folder}: cannot be read: {error.strerror}"
    if not os.access(parent, os.W_OK):
        return f"{folder}: cannot be written (--cache or PROLORA_CACHE names another folder)"
    return f"{folder}: {format_size(size)}, {format_size(free)} free on the disk"
