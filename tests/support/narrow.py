"""A small transformer, and a student that kept some of its channels, heads and neurons."""

import torch
from spectra import related
from torch import Tensor

from prolora.bases import Base, open_base

IMAGE, TEXT, HEAD = 16, 40, 8
"""Channels of the image and of the text, which no student gives up, and the width of a head."""

STREAM, HEADS, NEURONS = (96, 72), (12, 9), (160, 112)
"""Residual stream, heads and feed-forward neurons of (teacher, student)."""

BLOCKS = 3


def choose(wide: int, narrow: int, seed: int) -> Tensor:
    """Some of `wide` indices, in order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(wide, generator=generator)[:narrow].sort().values


def sides() -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (rows, columns) that the student kept of the teacher's weight."""
    stream, time = choose(*STREAM, 1), choose(*STREAM, 2)
    image, text = torch.arange(IMAGE), torch.arange(TEXT)
    table = {
        "x_embedder": (stream, image),
        "context_embedder": (stream, text),
        "time_embed.linear_1": (time, torch.arange(32)),
        "time_embed.linear_2": (time, time),
    }
    for i in range(BLOCKS):
        heads = choose(*HEADS, 10 + i)
        head = (heads[:, None] * HEAD + torch.arange(HEAD)).flatten()
        neurons = choose(*NEURONS, 20 + i)
        shift = torch.cat([stream, stream + STREAM[0], stream + 2 * STREAM[0]])
        block = f"transformer_blocks.{i}"
        table |= {f"{block}.attn1.to_{x}": (head, stream) for x in "qkv"}
        table |= {
            f"{block}.attn1.to_out.0": (stream, head),
            f"{block}.attn2.to_k": (head, text),
            f"{block}.ff.net.0.proj": (neurons, stream),
            f"{block}.ff.net.2": (stream, neurons),
            f"{block}.norm1.linear": (shift, time),
        }
    return table | {"proj_out": (image, stream)}


def teacher() -> dict[str, Tensor]:
    """The weights of the wide model."""
    heads = HEADS[0] * HEAD
    shapes = {
        "x_embedder": (STREAM[0], IMAGE),
        "context_embedder": (STREAM[0], TEXT),
        "time_embed.linear_1": (STREAM[0], 32),
        "time_embed.linear_2": (STREAM[0], STREAM[0]),
    }
    for i in range(BLOCKS):
        block = f"transformer_blocks.{i}"
        shapes |= {f"{block}.attn1.to_{x}": (heads, STREAM[0]) for x in "qkv"}
        shapes |= {
            f"{block}.attn1.to_out.0": (STREAM[0], heads),
            f"{block}.attn2.to_k": (heads, TEXT),
            f"{block}.ff.net.0.proj": (NEURONS[0], STREAM[0]),
            f"{block}.ff.net.2": (STREAM[0], NEURONS[0]),
            f"{block}.norm1.linear": (3 * STREAM[0], STREAM[0]),
        }
    shapes["proj_out"] = (IMAGE, STREAM[0])
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(m, n, generator=generator) for name, (m, n) in shapes.items()}


def student(noise: float = 0.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The weights of the narrow model, trained on until they moved by `noise` of their norm."""
    wide, kept = teacher(), {}
    for seed, (name, (rows, columns)) in enumerate(sides().items()):
        part = wide[name][rows][:, columns]
        kept[name] = (related(part, noise, seed) if noise else part).to(dtype).contiguous()
    return kept


def stranger() -> dict[str, Tensor]:
    """A model of the student's shapes that has nothing of the teacher."""
    generator = torch.Generator().manual_seed(9)
    return {name: torch.randn(x.shape, generator=generator) for name, x in student().items()}


def as_base(tensors: dict[str, Tensor]) -> Base:
    """Opened from memory."""
    return open_base({f"{name}.weight": tensor for name, tensor in tensors.items()})


def lora(rank: int = 4) -> dict[str, Tensor]:
    """A LoRA on every module in a block of the teacher, in diffusers' spelling."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, weight in teacher().items():
        if name.startswith("transformer_blocks."):
            (m, n), key = weight.shape, f"transformer.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, n, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(m, rank, generator=generator)
    return tensors
