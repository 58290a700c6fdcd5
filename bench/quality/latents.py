"""The latent spaces of the coloured world: small autoencoders of its images, trained here.

"fine" has 12 × 12 latents of 4 channels, as the VAEs of SD1.5 and SDXL halve a side three times;
"coarse" has 6 × 6 of 16, as FLUX's latents in patches. Both keep a third of an image's numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from flow import fit
from torch import Tensor, nn
from worlds import World

SHAPES = {"fine": (4, 12, 12), "coarse": (16, 6, 6)}
SMOOTHING = 0.15
"""Standard deviation of the noise that a decoder learns to bear, in units of the latents'."""
STEPS, RATE, BATCH = 1500, 2e-3, 64


class Codec(nn.Module):
    """A convolutional autoencoder with latents of zero mean and unit variance in every channel."""

    def __init__(self, space: str, width: int = 48) -> None:
        super().__init__()
        channels, side, _ = SHAPES[space]
        halvings = 1 if side == 12 else 2
        down: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.SiLU()]
        up: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.SiLU()]
        for _ in range(halvings):
            down += [nn.Conv2d(width, width, 4, stride=2, padding=1), nn.SiLU()]
            up += [nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.SiLU()]
        self.encoder = nn.Sequential(*down, nn.Conv2d(width, channels, 3, padding=1))
        self.decoder = nn.Sequential(*up, nn.Conv2d(width, 3, 3, padding=1))
        self.norm = nn.BatchNorm2d(channels, affine=False, momentum=0.02)

    def encode(self, x: Tensor) -> Tensor:
        """Images (n, 3, 24, 24) -> latents (n, c, h, w)."""
        return self.norm(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Latents -> images."""
        return self.decoder(z)


def train_codec(world: World, space: str) -> Codec:
    """The codec of a space, trained on the world's images, plain and in the adapters' styles."""
    torch.manual_seed(sorted(SHAPES).index(space))
    codec = Codec(space).train()
    looks = [None, *(a for a in world.adapters if a != "fewstep")]
    images = torch.cat([world.images("source", look, "train")[0] for look in looks])

    def loss(generator: torch.Generator) -> Tensor:
        x = images[torch.randint(len(images), (BATCH,), generator=generator)]
        z = codec.encode(x)
        noise = SMOOTHING * torch.randn(z.shape, generator=generator)
        return F.mse_loss(codec.decode(z + noise), x)

    fit(list(codec.parameters()), loss, STEPS, RATE, seed=7)
    # The averaged weights have latents of their own statistics.
    codec.norm.reset_running_stats()
    codec.norm.momentum = None
    with torch.no_grad():
        for part in images[torch.randperm(len(images))[:4096]].split(256):
            codec.encode(part)
    return codec.eval().requires_grad_(False)


@torch.no_grad()
def encode_images(codec: Codec | None, x: Tensor) -> Tensor:
    """Images -> latents in batches; the images themselves where there is no codec."""
    return x if codec is None else torch.cat([codec.encode(part) for part in x.split(256)])


@torch.no_grad()
def decode_latents(codec: Codec | None, z: Tensor) -> Tensor:
    """Latents -> images in batches."""
    return z if codec is None else torch.cat([codec.decode(part) for part in z.split(256)])
