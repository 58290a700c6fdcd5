"""Two small related bases and a LoRA between them, with SDXL's kind of names, for tests."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from spectra import related, weights
from torch import Tensor

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.{}.{}"
MODULES = ("attn1.to_q", "attn1.to_k", "attn2.to_v", "ff.net.2")


def shapes(blocks: int) -> dict[str, tuple[int, int]]:
    """Module -> weight shape of a model with that many transformer blocks."""
    inputs = {"attn1.to_q": 24, "attn1.to_k": 24, "attn2.to_v": 40, "ff.net.2": 96}
    return {BLOCK.format(i, name): (24, inputs[name]) for i in range(blocks) for name in MODULES}


def source_weights() -> dict[str, Tensor]:
    """Three transformer blocks."""
    return {name: weights(*shape, seed=i) for i, (name, shape) in enumerate(shapes(3).items())}


def target_weights(drift: float = 0.1) -> dict[str, Tensor]:
    """The first two of them, drifted."""
    source = source_weights()
    return {name: related(source[name], drift, 100 + i) for i, name in enumerate(shapes(2))}


def lora_tensors(rank: int = 4, alpha: float | None = 2.0) -> dict[str, Tensor]:
    """A kohya LoRA on every module of the source."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, (m, n) in shapes(3).items():
        key = "lora_unet_" + name.replace(".", "_")
        tensors[f"{key}.lora_up.weight"] = torch.randn(m, rank, generator=generator)
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, n, generator=generator)
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def write_folder(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A diffusers UNet folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    stored = {f"{name}.weight": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "diffusion_pytorch_model.safetensors")
    return folder


def write_case(folder: Path) -> tuple[Path, Path, Path]:
    """LoRA file, source folder and target folder."""
    lora = folder / "lora.safetensors"
    save_file(
        lora_tensors(),
        lora,
        {"ss_tag_frequency": '{"x": {"trigger": 5}}', "ss_sd_model_name": "source"},
    )
    return (
        lora,
        write_folder(folder / "source", source_weights()),
        write_folder(folder / "target", target_weights()),
    )
