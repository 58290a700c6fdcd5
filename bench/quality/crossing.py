"""Models of other latent spaces and other kinds of prediction, for moving LoRAs between them.

A setting is an architecture, a latent space and a kind of prediction. Every base learns the same
coloured images, encoded; the adapters are trained on each base, so that there is an oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from flow import BATCH, fit
from icons.networks import Painter
from latents import SHAPES, Codec, encode_images
from models import load_lora
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training import train_lora
from worlds import Data, World

from prolora.probe.pipelines.schedules import EPSILON, FLOW, NoiseSchedule, Times

PIXELS = "pixels"
ADAPTERS = ("neon", "duotone", "concept", "shaded")
BASE_STEPS = {"flux": 2000, "unet": 2500}
RATE = 2e-3


def flow_schedule() -> NoiseSchedule:
    """Rectified flow with times from 0 to 1000."""
    return NoiseSchedule(FLOW, None, times=Times(1000.0, 0.0))


def noise_schedule() -> NoiseSchedule:
    """ε on the path of SD1.5 and SDXL: a thousand times, betas linear in their roots."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    return NoiseSchedule(EPSILON, (1 - betas).cumprod(0))


@dataclass(frozen=True)
class Setting:
    """What a base is.

    Attributes:
        arch: "flux" or "unet".
        space: PIXELS or one of the latent spaces.
        kind: "flow" or "epsilon".
        look: what its images look like: "source", or a kind of target of the study.
    """

    arch: str
    space: str
    kind: str
    look: str = "source"

    @property
    def name(self) -> str:
        """For file names and tables."""
        look = "" if self.look == "source" else f"-{self.look}"
        return f"{self.arch}-{self.space}-{self.kind}{look}"

    @property
    def schedule(self) -> NoiseSchedule:
        """Of its noise."""
        return flow_schedule() if self.kind == FLOW else noise_schedule()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of what it denoises."""
        return SHAPES.get(self.space, (3, 24, 24))


@dataclass(frozen=True)
class Crossing:
    """The folder of the settings' models.

    Attributes:
        world: of the images.
        root: the folder; the study's models of pixels are in its "icons".
    """

    world: World
    root: Path

    def codec(self, space: str) -> Codec | None:
        """The autoencoder of a space; None for pixels."""
        if space == PIXELS:
            return None
        codec = Codec(space)
        codec.load_state_dict(load_file(self.root / f"{space}.safetensors"))
        return codec.eval().requires_grad_(False)

    def images(self, setting: Setting, adapter: str | None, split: str) -> Data:
        """Images of an adapter's style in a base's look, encoded, and their prompts."""
        x, y = self.world.images(setting.look, adapter, split)
        return encode_images(self.codec(setting.space), x), y

    def base_path(self, setting: Setting, seed: int) -> Path:
        """Of a base."""
        return self.root / f"{setting.name}-{seed}.safetensors"

    def lora_path(self, setting: Setting, base: int, seed: int, adapter: str) -> Path:
        """Of an adapter of that seed on a base."""
        return self.root / f"{setting.name}-{base}-{seed}-{adapter}.safetensors"

    def new_base(self, setting: Setting) -> Painter:
        """Fresh weights, and the text encoder of the study's source."""
        model = Painter(setting.arch, "source", setting.shape)
        stored = load_file(self.root / "words.safetensors")
        model.text_encoder.load_state_dict(stored)
        return model

    def load_base(self, setting: Setting, seed: int) -> Painter:
        """A trained base."""
        model = self.new_base(setting)
        model.load_state_dict(load_file(self.base_path(setting, seed)))
        return model.eval().requires_grad_(False)

    def make_base(self, setting: Setting, seed: int, out: Path) -> None:
        """Trains a base from fresh weights."""
        torch.manual_seed(5000 + seed)
        model = self.new_base(setting)
        images = self.images(setting, None, "train")
        lesson = Denoising(self.world, setting.schedule, images)
        parameters = [p for p in model.parameters() if p.requires_grad]
        fit(parameters, lesson.loss(model), BASE_STEPS[setting.arch], RATE, seed=6000 + seed)
        save_file(model.state_dict(), out)

    def lesson(self, setting: Setting, adapter: str, split: str) -> Denoising:
        """What an adapter is about in a setting."""
        usual = self.images(setting, None, split) if adapter == "concept" else None
        data = self.images(setting, adapter, split)
        return Denoising(self.world, setting.schedule, data, usual)

    def make_lora(self, setting: Setting, base: int, seed: int, adapter: str, out: Path) -> None:
        """Trains an adapter on a base."""
        model = self.load_base(setting, base)
        lesson = self.lesson(setting, adapter, "train")
        updates = train_lora(self.world, setting.arch, adapter, seed, model, lesson)
        parts = {f"{name}.up": update.up for name, update in updates.items()}
        parts |= {f"{name}.down": update.down for name, update in updates.items()}
        save_file({name: part.contiguous() for name, part in parts.items()}, out)

    def load_lora(self, setting: Setting, base: int, seed: int, adapter: str):
        """{module: update}."""
        return load_lora(self.lora_path(setting, base, seed, adapter))


@dataclass
class Denoising:
    """The usual loss of a kind of prediction on images and prompts.

    Attributes:
        world: of the images.
        schedule: of the noise.
        data: what is learnt.
        kept: prior preservation, or None.
    """

    world: World
    schedule: NoiseSchedule
    data: Data
    kept: Data | None = None

    def loss(self, model: nn.Module):
        """The training loss on a fresh batch."""

        def learn(generator: torch.Generator) -> Tensor:
            value = self._batch_loss(model, self.data, generator)
            if self.kept is not None:
                value = value + 0.3 * self._batch_loss(model, self.kept, generator)
            return value

        return learn

    def _batch_loss(self, model: nn.Module, data: Data, generator: torch.Generator) -> Tensor:
        x, y = data
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        hidden = torch.rand(BATCH, generator=generator) < 0.1
        prompts = torch.where(hidden, self.world.null_prompt, y[rows])
        return self._error(model, x[rows], prompts, generator)

    @torch.no_grad()
    def held_out(self, model: nn.Module) -> float:
        """The loss on the same rows, times and noises for every model."""
        generator = torch.Generator().manual_seed(123)
        x, y = (part[: 2 * self.world.judged_rows] for part in self.data)
        return self._error(model, x, y, generator).item()

    def _error(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        n = len(x)
        share = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
        time = 1000 * share if self.schedule.kind == FLOW else (1000 * share).floor()
        noise = torch.randn(x.shape, generator=generator)
        noisy = mix_noise(self.schedule, x, noise, time)
        wanted = noise - x if self.schedule.kind == FLOW else noise
        return F.mse_loss(model(noisy, time, self.world.tokens(model, y))[0], wanted)


def mix_noise(schedule: NoiseSchedule, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """The state a·x₀ + b·ε at times (n,)."""
    a, b = (expand_rows(part) for part in schedule.scales(schedule.level_at(time)))
    return a * clean + b * noise


def expand_rows(factor: Tensor) -> Tensor:
    """(n,) -> (n, 1, 1, 1) in float32."""
    return factor.float()[:, None, None, None]


def clean_of(schedule: NoiseSchedule, x: Tensor, time: Tensor, prediction: Tensor) -> Tensor:
    """The x₀ that a prediction means."""
    c, d = schedule.weights(schedule.level_at(time))
    return (prediction - expand_rows(d) * x) / expand_rows(c)


@torch.no_grad()
def sample(
    world: World,
    setting: Setting,
    model: nn.Module,
    y: Tensor,
    seed: int,
    steps: int = 25,
    guidance: float = 2.0,
) -> Tensor:
    """DDIM from noise to latents; for a flow these are Euler's steps."""
    schedule, n = setting.schedule, len(y)
    noise = torch.randn(n, *setting.shape, generator=torch.Generator().manual_seed(seed))
    tokens = torch.cat([world.tokens(model, y), world.tokens(model, world.null_like(y))])
    last = 1000.0 if setting.kind == FLOW else 999.0
    times = torch.linspace(last, 0, steps + 1)
    a, b = schedule.scales(schedule.level_at(times))
    x = noise * float(b[0])
    for i in range(steps):
        t = times[i].expand(n)
        both = model(torch.cat([x, x]), torch.cat([t, t]), tokens)[0]
        wanted, free = both.chunk(2)
        f = free + guidance * (wanted - free)
        clean = clean_of(schedule, x, t, f) if float(a[i]) else x - f
        eps = (x - float(a[i]) * clean) / float(b[i])
        x = float(a[i + 1]) * clean + float(b[i + 1]) * eps
    return x
