"""Generates an SDXL base, a related SSD-1B and a kohya LoRA at full size, without any download.

`write_all(FOLDER)` writes FOLDER/sdxl/unet and FOLDER/ssd-1b/unet (sharded diffusers folders, fp16)
and FOLDER/lora.safetensors (rank 32, alpha 16, all 560 attention modules in SGM spelling).

The weights are made to cost what real ones cost, and to behave like them where a transfer looks:

* Singular values fall as i^-1/2 and the entries have a standard deviation of 0.025.
* Singular vectors are dense and differ from module to module. A few random matrices of each shape
  are multiplied out once; every module takes one of them with its own random permutations and signs
  of rows and columns, W = D₁P₁ (U Σ Vᵀ) P₂D₂. This has the same spectrum and subspaces as good as
  independent, for the price of a gather instead of a matrix product.
* SSD-1B is W_t = W_s + 0.15 ‖W_s‖ N, with N of unit norm and the same kind of spectrum in
  directions of its own. W_s is the SDXL weight of the same name.

Everything is a function of the seed and the module's name. Left out are the convolutions,
`proj_in`, `proj_out`, feed-forward, embeddings and biases: the LoRA does not touch them, and
`prolora.architectures.layouts.identify` needs attention alone.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from prolora.architectures.layouts import load_layout
from prolora.architectures.shared_names import unet_names
from prolora.files.safetensors_writing import write_safetensors

POOL = 4
DEVIATION = 0.025
NOISE = 0.15
RANK = 32
SHARD_BYTES = 500_000_000


def write_all(folder: Path, scale: int = 1) -> list[Path]:
    """Writes LoRA, source and target below `folder`, all widths divided by `scale`."""
    paths = [folder / name for name in ("lora.safetensors", "sdxl", "ssd-1b")]
    write_lora(paths[0], scale)
    write_unet(paths[1] / "unet", shapes("sdxl", scale), 0.0)
    write_unet(paths[2] / "unet", shapes("ssd-1b", scale), NOISE)
    return paths


def shapes(layout: str, scale: int) -> dict[str, tuple[int, int]]:
    """Module -> (rows, columns) of a layout's attention weights, in the order of their names."""
    known = load_layout(layout)
    sizes = {name: known.shapes[name] for name in sorted(known.attention)}
    return {name: (m // scale, n // scale) for name, (m, n) in sizes.items()}


def write_unet(folder: Path, modules: dict[str, tuple[int, int]], noise: float) -> None:
    """A sharded diffusers folder; never more than one shard is in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = list(_shards(modules))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(plan, 1):
        file = f"diffusion_pytorch_model-{number:05}-of-{len(plan):05}.safetensors"
        tensors = {f"{name}.weight": weight(name, modules[name], noise).half() for name in names}
        write_safetensors(folder / file, tensors, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    total = sum(2 * m * n for m, n in modules.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    name = "diffusion_pytorch_model.safetensors.index.json"
    (folder / name).write_text(json.dumps(index, indent=1))


def write_lora(path: Path, scale: int) -> None:
    """A kohya LoRA for SDXL: SGM spelling, fp16, alpha = rank / 2, singular values that fall."""
    tensors: dict[str, Tensor] = {}
    fall = torch.arange(1, RANK + 1).float().rsqrt()
    for name, (m, n) in shapes("sdxl", scale).items():
        generator = _generator(0, name, "lora")
        key = f"lora_unet_{unet_names().find_weight_holding(name).name}".replace(".", "_")
        up = torch.randn(m, RANK, generator=generator) * fall * (0.3 / m**0.5)
        down = torch.randn(RANK, n, generator=generator) / n**0.5
        tensors[f"{key}.lora_up.weight"] = up.half()
        tensors[f"{key}.lora_down.weight"] = down.half()
        tensors[f"{key}.alpha"] = torch.tensor(RANK / 2).half()
    metadata = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(RANK),
        "ss_network_alpha": str(RANK / 2),
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, tensors, metadata)


def weight(name: str, shape: tuple[int, int], noise: float, seed: int = 0) -> Tensor:
    """The float32 weight [m, n] of a module."""
    made = _turned(name, shape, "weight", seed)
    return made.add_(_turned(name, shape, "noise", seed), alpha=noise) if noise else made


def _turned(name: str, shape: tuple[int, int], purpose: str, seed: int) -> Tensor:
    """One matrix of the pool [m, n] with rows and columns permuted and their signs flipped."""
    generator = _generator(seed, name, purpose)
    number = int(torch.randint(POOL, (), generator=generator))
    rows, columns = (torch.randperm(size, generator=generator) for size in shape)
    signs = [torch.randint(2, (size,), generator=generator) * 2.0 - 1.0 for size in shape]
    turned = _pool(shape, seed)[number].index_select(0, rows).index_select(1, columns)
    return turned.mul_(signs[0][:, None]).mul_(signs[1])


@cache
def _pool(shape: tuple[int, int], seed: int) -> Tensor:
    """Stack [POOL, m, n] of U Σ Vᵀ with σ_i ∝ i^-1/2 and entries of deviation DEVIATION."""
    m, n = shape
    k = min(m, n)
    sigma = torch.arange(1, k + 1).float().rsqrt()
    sigma *= DEVIATION * (m * n) ** 0.5 / sigma.norm()
    made = torch.empty(POOL, m, n)
    for number in range(POOL):
        generator = _generator(seed, f"{m}x{n}/{number}", "pool")
        u, v = (torch.linalg.qr(torch.randn(size, k, generator=generator)).Q for size in (m, n))
        torch.mm(u * sigma, v.T, out=made[number])
    return made


def _shards(modules: dict[str, tuple[int, int]]) -> Iterator[list[str]]:
    """The modules in groups of at most SHARD_BYTES in fp16."""
    names: list[str] = []
    size = 0
    for name, (m, n) in modules.items():
        if names and size + 2 * m * n > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * m * n
    yield names


def _generator(seed: int, name: str, purpose: str) -> torch.Generator:
    """A stream of its own for every name and purpose, the same in every run."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{purpose}/{name}".encode()))
