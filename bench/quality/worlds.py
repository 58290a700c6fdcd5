"""The worlds that the study can be run in: what is drawn, by which networks, moved to what.

Jobs, methods and scores are the same for every world, and so is rectified flow, whose noising and
training loop are the mini family's.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2] / "examples/mini_family"))

# isort: split
from model import predict

Data = tuple[Tensor, Tensor]
NAMES = ("digits", "icons")
"""Worlds of the study; a third has the shipped models alone."""


@dataclass(frozen=True)
class World:
    """One world. A prompt is a number."""

    name: str  # one of NAMES, or "shipped"
    shape: tuple[int, ...]  # of an image
    null_prompt: int  # the prompt for guidance
    kinds: tuple[str, ...]  # targets with samples and every score
    variants: tuple[str, ...]  # further targets, losses only
    fresh: tuple[str, ...]  # kinds that start from new weights, the others from the source's
    adapters: tuple[str, ...]  # their names; "fewstep" learns the base's own trajectories
    ranks: Mapping[str, int]  # adapter -> rank
    budgets: dict[str, tuple[int, float]]  # kind, or "lora" -> batches of 32 and peak learning rate
    adapted: Mapping[str, str]  # architecture -> pattern of the modules that a LoRA changes
    prefix: Mapping[str, str]  # architecture -> what comes before diffusers' names in the models
    # (architecture, kind) -> a base with weights from torch's global generator
    new_model: Callable[[str, str], nn.Module]
    # (architecture, kind, name) -> the source's name of a module or parameter
    origin: Callable[[str, str, str], str]
    # (kind, adapter or None, split) -> the images it is about and their prompts
    images: Callable[[str, str | None, str], Data]
    tokens: Callable[[nn.Module, Tensor], Tensor]  # (model, prompts) -> what the model reads
    # (n, generator, whether for the concept) -> what a user would ask for
    draw_prompts: Callable[[int, torch.Generator, bool], Tensor]
    sample_prompts: Callable[[str, int], Tensor]  # (adapter, n) -> the prompts of scored samples
    content: Callable[[Tensor], Tensor]  # prompts -> the judge's class
    classes: tuple[int, int, int]  # how many contents, styles and looks the judge tells apart
    # (split, generator) -> 64 images for the judge and their three labels
    judged: Callable[[str, torch.Generator], tuple[Tensor, ...]]
    concept_class: int  # the judge's class of the withheld concept
    judge_steps: int = 900
    # (architecture, kind, name) -> whether a parameter is in a block that only the target has, and
    # whether it starts with zeros
    is_new: Callable[[str, str, str], bool] = lambda *_: False
    is_silent: Callable[[str, str, str], bool] = lambda *_: False
    # kind -> (kind of the source, kind of the target) where they are not ("source", kind)
    pairs_of: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    # kind -> (adapters whose LoRAs are merged into the source, weight)
    merged: Mapping[str, tuple[tuple[str, ...], float]] = field(default_factory=dict)
    # kind -> {kind: weight} of the fine-tunes it is the mean of
    blended: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    # kinds that learn the source's output beside the images
    imitating: tuple[str, ...] = ("pruned",)
    # kind -> "lines" or "guided", how the source teaches it; sampled without guidance
    distilled: Mapping[str, str] = field(default_factory=dict)
    # architecture whose source trains the text encoder; "" if there is none
    teaches_words: str = ""
    pairs: int = 1024  # how many teacher pairs a few-step adapter is trained on
    student_pairs: int = 2048  # how many a few-step base is trained on
    teacher_steps: int = 16  # in which the teacher makes them
    judged_rows: int = 320  # held-out images, or held-out teacher pairs, behind every loss
    once: tuple[str, ...] = ()  # kinds of which there is one seed
    sampled_seeds: tuple[int, ...] = (0, 1, 2)  # whose targets have samples
    variants_seed: int = 0  # of the one target of each variant
    guidance: float = 2.0  # of samples
    muon: float = 0.0  # rate over AdamW's of the Muon that bases are trained by; 0 for AdamW alone

    def source_of(self, kind: str) -> str:
        """The kind of base that LoRAs come from when they are moved to that kind."""
        return self.pairs_of.get(kind, ("source", kind))[0]

    def model_of(self, kind: str) -> str:
        """The kind of base that plays the target."""
        return self.pairs_of.get(kind, ("source", kind))[1]

    def adapters_for(self, kind: str) -> tuple[str, ...]:
        """Those that make sense on a kind of target: few-step siblings need no few-step adapter."""
        if self.distilled.get(kind) == "lines":
            return tuple(adapter for adapter in self.adapters if adapter != "fewstep")
        return self.adapters

    def guidance_of(self, kind: str) -> float:
        """The guidance that a kind of base is sampled with; 1 is none."""
        return 1.0 if kind in self.distilled else self.guidance

    def with_budgets(self, **budgets: tuple[int, float]) -> World:
        """The same world, where some kinds are trained for other numbers of steps."""
        return replace(self, budgets=self.budgets | budgets)

    @torch.no_grad()
    def sample(self, model: nn.Module, y: Tensor, steps: int, guidance: float, seed: int) -> Tensor:
        """Images (n, *shape) in [-1, 1] for prompts (n,): Euler steps from noise (t = 1)."""
        tokens, null = self.tokens(model, y), self.tokens(model, self.null_like(y))
        x = torch.randn(len(y), *self.shape, generator=torch.Generator().manual_seed(seed))
        for i in range(steps):
            t = torch.full((len(y),), 1 - i / steps)
            x = x - guided_velocity(model, x, t, tokens, null, guidance) / steps
        return x.clamp(-1, 1)

    def null_like(self, y: Tensor) -> Tensor:
        """The null prompt as often as there are prompts."""
        return torch.full_like(y, self.null_prompt)


def guided_velocity(
    model: nn.Module, x: Tensor, t: Tensor, tokens: Tensor, null: Tensor, guidance: float
) -> Tensor:
    """The velocity with classifier-free guidance: v_null + guidance (v - v_null)."""
    both = predict(model, torch.cat([x, x]), torch.cat([t, t]), torch.cat([tokens, null]))
    wanted, free = both.chunk(2)
    return free + guidance * (wanted - free)


def backbone(model: nn.Module) -> nn.Module:
    """The diffusers model inside: its module names are the ones LoRAs use."""
    return getattr(model, "backbone", model)


def load_world(name: str) -> World:
    """The world of that name."""
    return importlib.import_module(f"{name}_world").WORLD
