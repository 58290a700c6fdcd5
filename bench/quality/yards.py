"""One LoRA and one target: what a fit or a training makes of it, as shares and in samples."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from contenders import Updates
from icons import shipped
from jobs import run_jobs
from judge import Judge, hits
from lessons import Lesson, make_lesson
from models import Folder, load_lora, save_lora
from scoring import apply_updates, held_out_loss, sample_images
from study import judge_job, load_judge, training_jobs
from torch import nn
from training import train_lora
from world_side import fit_lora
from worlds import World, load_world

from prolora import fitting as probe

NAMES = "digits", "shipped"
ORACLE_STEPS = 90
"""How long the icons' LoRAs that set the scale are trained; the study's learn for 150 steps."""
FIT = {"rank": 32, "probes": 768, "held_out": 24, "batch": 48, "fit_steps": 16, "force": True}
FIT |= {"images": 24, "steps": 10}


@functools.cache
def choose_world(name: str) -> World:
    """A world; LoRAs of the icons are trained for ORACLE_STEPS."""
    world = load_world(name)
    if name == "shipped":
        return world.with_budgets(lora=(ORACLE_STEPS, world.budgets["lora"][1]))
    return world


@dataclasses.dataclass(frozen=True, eq=False)
class Yard:
    """One LoRA and one target, and how results are judged."""

    world: World
    root: Path  # of what is trained
    kind: str
    adapter: str
    source: nn.Module
    target: nn.Module
    lora: Updates
    lesson: Lesson
    oracle: Updates
    none: float
    best: float

    def share(self, updates: Updates) -> float:
        """The share of the held-out loss that updates recover."""
        loss = held_out_loss(self.target, self.lesson, updates)
        return round((self.none - loss) / (self.none - self.best), 4)

    def fit(self, lora: Updates, **options: Any) -> probe.Fitted:
        """Fits a LoRA of the source to the target."""
        settings = probe.FitSettings(**(FIT | options))
        return fit_lora(self.world, (self.source, self.target), lora, self.adapter, settings)

    def judge_samples(self, updates: Updates, ground: bool = False) -> dict[str, float]:
        """What a classifier sees in samples; with `ground` that of the source, too."""
        world = self.world
        with apply_updates(self.target, updates):
            images, y = sample_images(world, self.kind, self.target, self.adapter, seed=0)
        _, content, style, look = open_judge(world.name, self.root)(images)
        of_concept = torch.full_like(y, world.concept_class)
        asked = of_concept if self.adapter == "concept" else world.content(y)
        row = {"asked for": hits(content, asked)}
        if self.adapter != "concept":
            wanted = 1 + world.adapters.index(self.adapter)
            row["in the LoRA's style"] = hits(style, torch.tensor(wanted))
        if ground:
            row["on the source's ground"] = hits(look, torch.tensor(0))
        return {name: round(value, 4) for name, value in row.items()}


@functools.cache
def open_judge(world: str, root: Path) -> Judge:
    """The classifier of a world, trained once."""
    run_jobs([judge_job(load_world(world), root)])
    return load_judge(load_world(world), root)


def list_adapters(world: World) -> tuple[str, ...]:
    """Those that pictures can teach."""
    return tuple(adapter for adapter in world.adapters if adapter != "fewstep")


def open_yard(world: World, root: Path, kind: str, adapter: str, seed: int = 0) -> Yard:
    """A LoRA and a target of that seed; of the shipped icons there is one.

    What has to be trained is kept below `root`.
    """
    if world.name == "shipped":
        source, target = shipped.load_model("source"), shipped.load_model(kind)
        lora = shipped.load_lora(adapter)
        with apply_updates(source, lora) as teacher:
            taught, judged = (
                make_lesson(world, kind, adapter, target, split, teacher=teacher)
                for split in ("train", "held_out")
            )
        path = root / f"{kind}-{adapter}.safetensors"
        if not path.exists():
            save_lora(train_lora(world, "flux", adapter, 0, target, taught), path)
        oracle = load_lora(path)
    else:
        folder = Folder(world, root, "flux")
        wanted = [folder.model_path("source", 0), folder.model_path(kind, seed)]
        kinds = [(k, a) for k in ("source", kind) for a in list_adapters(world)]
        wanted += [folder.lora_path(k, seed, a) for k, a in kinds]
        run_jobs([job for job in training_jobs(world, root) if job.path in wanted])
        source, target = folder.load_source(kind, seed), folder.load_model(kind, seed)
        lora, oracle = (load_lora(folder.lora_path(k, seed, adapter)) for k in ("source", kind))
        judged = folder.lesson(kind, seed, adapter, "held_out")
    best, none = (held_out_loss(target, judged, updates) for updates in (oracle, {}))
    return Yard(world, root, kind, adapter, source, target, lora, judged, oracle, none, best)
