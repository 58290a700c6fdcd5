"""The networks of the mini family: UNets built like SDXL's, one label table, loss and sampler."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

NULL_LABEL = 10
TOKENS, WIDTH = 4, 64

# SDXL's structure at a hundredth of its width: no attention in the first stage, one transformer
# block per attention in the second, several in the third and in the middle.
SOURCE = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [16, 32, 48],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 1, 3],
    "attention_head_dim": [1, 2, 3],  # diffusers reads this as the number of heads
    "cross_attention_dim": WIDTH,
    "norm_num_groups": 8,
    "use_linear_projection": True,
}

# SSD-1B's cut of SDXL: fewer transformer blocks in the deepest stage, all of them kept in the
# last attention of the first up block, and no attention in the middle.
PRUNED = SOURCE | {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [1, 1], [1, 1]],
    "reverse_transformer_layers_per_block": [[1, 1, 3], [1, 1, 1], 1],
}

CONFIGS = {"source": SOURCE, "pruned": PRUNED, "finetuned": SOURCE}


def new_unet(member: str) -> nn.Module:
    """Builds one member with fresh weights."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**CONFIGS[member])


def load_unet(folder: Path) -> nn.Module:
    """Loads a stored member in float32."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)


class Labels(nn.Module):
    """Label -> the tokens that cross-attention reads; the family's text encoder.

    It is trained with the source and then frozen: every other member uses the same table.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(NULL_LABEL + 1, TOKENS, WIDTH))

    def forward(self, y: Tensor) -> Tensor:
        """(n,) labels in 0..10, 10 meaning none -> (n, 4, 64)."""
        return self.table[y]

    @classmethod
    def load(cls, path: Path) -> Labels:
        """Reads the stored table and freezes it."""
        labels = cls()
        labels.table.data.copy_(load_file(path)["table"])
        return labels.requires_grad_(False)


def predict(unet: nn.Module, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
    """The velocity noise - image at time t in [0, 1]: (n, 1, 16, 16), (n,), (n, 4, 64)."""
    return unet(x, 1000 * t, tokens, return_dict=False)[0]


def noised(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draws the rectified-flow training point of each image."""
    n = len(x)
    # One time per n-th of [0, 1] instead of n free draws: the same mean, a steadier loss.
    t = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    noise = torch.randn(x.shape, generator=generator)
    s = t[:, None, None, None]
    return (1 - s) * x + s * noise, t, noise - x


@torch.no_grad()
def held_out_loss(
    unet: nn.Module, labels: Labels, x: Tensor, y: Tensor, draws: int = 8, seed: int = 123
) -> float:
    """Mean squared error of the velocity, over the same times and noises for every model."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(draws):
        xt, t, velocity = noised(x, generator)
        total += F.mse_loss(predict(unet, xt, t, labels(y)), velocity).item()
    return total / draws


@torch.no_grad()
def sample(
    unet: nn.Module,
    labels: Labels,
    y: Tensor,
    steps: int = 25,
    guidance: float = 2.0,
    seed: int = 0,
) -> Tensor:
    """Euler steps from noise (t = 1) to an image (t = 0) with classifier-free guidance."""
    x = torch.randn(len(y), 1, 16, 16, generator=torch.Generator().manual_seed(seed))
    tokens = torch.cat([labels(y), labels(torch.full_like(y, NULL_LABEL))])
    for i in range(steps):
        t = torch.full((2 * len(y),), 1 - i / steps)
        with_label, without = predict(unet, torch.cat([x, x]), t, tokens).chunk(2)
        x = x - (without + guidance * (with_label - without)) / steps
    return x.clamp(-1, 1)
