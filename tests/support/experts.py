"""Small models of two experts in the names of Wan, and LoRAs of them, for tests."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from spectra import related, weights
from torch import Tensor

MODULES = [
    f"blocks.{i}.{name}"
    for i in range(2)
    for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_k", "ffn.net.2")
]


def expert(seed: int, drift: float = 0.0) -> dict[str, Tensor]:
    """The weights of an expert: equal seeds are one model, trained on until it moved by `drift`."""
    kept = {}
    for i, name in enumerate(MODULES):
        weight = weights(24, 32 if name.endswith("ffn.net.2") else 24, seed=100 * seed + i)
        kept[f"{name}.weight"] = related(weight, drift, i) if drift else weight
    return kept


def write_file(path: Path, tensors: dict[str, Tensor]) -> Path:
    """A single file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def write_pipeline(folder: Path, drift: float = 0.0) -> Path:
    """A diffusers folder: `transformer` is the expert for high noise, `transformer_2` for low."""
    for part, seed in (("transformer", 1), ("transformer_2", 2)):
        path = folder / part / "diffusion_pytorch_model.safetensors"
        write_file(path, expert(seed, drift))
        (folder / part / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    return folder


def write_lora(path: Path, seed: int = 0) -> Path:
    """A LoRA on every module, in diffusers' spelling."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, weight in expert(1).items():
        (m, n), key = weight.shape, f"transformer.{name.removesuffix('.weight')}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(2, n, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(m, 2, generator=generator)
    return write_file(path, tensors)
