"""What a model is taught and judged by: images, its own straight lines, or a guided teacher.

An adapter is asked for what it means in the target's own look.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from worlds import Data, World, guided_velocity

# isort: split
from model import noised, predict
from train import BATCH

Loss = Callable[[torch.Generator], Tensor]
Pairs = tuple[Tensor, Tensor, Tensor]


class Lesson:
    """One side of the split of what is taught."""

    world: World
    taught: tuple[Tensor, ...]  # rows of it

    def error(self, model: nn.Module, generator: torch.Generator, rows: Tensor) -> Tensor:
        """The loss on some rows."""
        raise NotImplementedError

    def loss(self, model: nn.Module) -> Loss:
        """The training loss on a fresh batch, from a random generator."""

        def on_batch(generator: torch.Generator) -> Tensor:
            rows = torch.randint(len(self.taught[0]), (BATCH,), generator=generator)
            return self.error(model, generator, rows)

        return on_batch

    @torch.no_grad()
    def held_out(self, model: nn.Module) -> float:
        """The loss on the same rows, times and noises for every model."""
        rows = torch.arange(min(self.world.judged_rows, len(self.taught[0])))
        return self.error(model, torch.Generator().manual_seed(123), rows).item()


def flow_loss(world: World, model: nn.Module, data: Data, teacher: nn.Module | None = None) -> Loss:
    """The rectified-flow loss on images and prompts; with a teacher, its output is learnt too.

    A tenth of the prompts is hidden for classifier-free guidance.
    """
    x, y = data

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        hidden = torch.rand(BATCH, generator=generator) < 0.1
        prompts = torch.where(hidden, world.null_prompt, y[rows])
        xt, t, velocity = noised(x[rows], generator)
        tokens = world.tokens(model, prompts)
        output = predict(model, xt, t, tokens)
        if teacher is None:
            return F.mse_loss(output, velocity)
        with torch.no_grad():
            wanted = predict(teacher, xt, t, tokens)
        return F.mse_loss(output, velocity) + F.mse_loss(output, wanted)

    return loss


@dataclass
class Images(Lesson):
    """Images and their prompts; beside them the usual ones, so that these survive."""

    world: World  # of the images
    taught: Data  # what is learnt
    kept: Data | None = None  # prior preservation, or None

    def loss(self, model: nn.Module) -> Loss:
        """See Lesson."""
        learnt = flow_loss(self.world, model, self.taught)
        if self.kept is None:
            return learnt
        kept = flow_loss(self.world, model, self.kept)
        return lambda generator: learnt(generator) + 0.3 * kept(generator)

    def error(self, model: nn.Module, generator: torch.Generator, rows: Tensor) -> Tensor:
        """Squared error of the velocity of noised images."""
        x, y = (part[rows] for part in self.taught)
        xt, t, velocity = noised(x, generator)
        return F.mse_loss(predict(model, xt, t, self.world.tokens(model, y)), velocity)


@dataclass
class Lines(Lesson):
    """Straight lines between noise and what a teacher samples from it (reflow)."""

    world: World  # of the images
    taught: Pairs  # noise, images and prompts

    def error(self, model: nn.Module, generator: torch.Generator, rows: Tensor) -> Tensor:
        """Squared error of the velocity along the lines of those rows."""
        noise, image, y = (part[rows] for part in self.taught)
        t = torch.rand(len(rows), generator=generator)
        s = t[:, None, None, None]
        tokens = self.world.tokens(model, y)
        output = predict(model, (1 - s) * image + s * noise, t, tokens)
        return F.mse_loss(output, noise - image)


@dataclass
class Guided(Lesson):
    """A teacher's velocity with guidance, which the student gives at once."""

    world: World  # of the images
    taught: Data  # images, from which noised ones are made, and their prompts
    teacher: nn.Module  # the model that is run with guidance

    def error(self, model: nn.Module, generator: torch.Generator, rows: Tensor) -> Tensor:
        """Squared distance from the teacher's guided velocity."""
        x, y = (part[rows] for part in self.taught)
        xt, t, _ = noised(x, generator)
        with torch.no_grad():
            tokens = self.world.tokens(self.teacher, y)
            null = self.world.tokens(self.teacher, self.world.null_like(y))
            wanted = guided_velocity(self.teacher, xt, t, tokens, null, self.world.guidance)
        return F.mse_loss(predict(model, xt, t, self.world.tokens(model, y)), wanted)


def teacher_pairs(
    world: World, model: nn.Module, n: int, seed: int, guidance: float, concept: bool = False
) -> Pairs:
    """Noise, the image the model samples from it, and the prompt.

    A few-step adapter learns the straight line between the two (reflow), guidance included.
    """
    y = world.draw_prompts(n, torch.Generator().manual_seed(seed), concept)
    noise = torch.randn(n, *world.shape, generator=torch.Generator().manual_seed(seed))
    return noise, world.sample(model, y, world.teacher_steps, guidance, seed), y


def make_lesson(
    world: World,
    kind: str,
    adapter: str,
    model: nn.Module,
    split: str,
    seed: int = 0,
    teacher: nn.Module | None = None,
) -> Lesson:
    """What an adapter is about on a kind of base."""
    n, start = (world.pairs, 4000 + seed) if split == "train" else (world.judged_rows, 99)
    if adapter == "fewstep":
        return Lines(world, teacher_pairs(world, model, n, start, world.guidance_of(kind)))
    data = world.images(kind, adapter, split)
    if kind in world.distilled:
        assert teacher is not None, "a distilled base learns from the source with its adapter"
        if world.distilled[kind] == "guided":
            return Guided(world, data, copy.deepcopy(teacher))
        concept = adapter == "concept"
        return Lines(world, teacher_pairs(world, teacher, n, start, world.guidance, concept))
    usual = world.images(kind, None, split) if adapter == "concept" else None
    return Images(world, data, usual)
