"""Where the study keeps its models and adapters, and how it makes and reads them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from contenders import Updates
from lessons import Lesson, make_lesson
from safetensors.torch import load_file, save_file
from scoring import apply_updates
from torch import nn
from training import train_base, train_lora
from worlds import World, backbone

from prolora import LowRank

BASE_SEED = 0
"""There is one source of each architecture; seeds are those of targets and adapters."""


def load_lora(path: Path) -> Updates:
    """{module: update} of a stored adapter."""
    stored = load_file(path)
    names = [key.removesuffix(".up") for key in stored if key.endswith(".up")]
    return {name: LowRank(stored[name + ".up"], stored[name + ".down"]) for name in names}


def save_lora(updates: Updates, path: Path) -> None:
    """Stores an adapter as `load_lora` reads it."""
    parts = {f"{name}.up": update.up for name, update in updates.items()}
    parts |= {f"{name}.down": update.down for name, update in updates.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: part.contiguous() for name, part in parts.items()}, path)


def merge_loras(network: nn.Module, paths: Iterable[Path], strength: float) -> None:
    """Adds stored adapters to the weights."""
    for path in paths:
        for name, update in load_lora(path).items():
            weight = network.get_submodule(name).weight.data
            weight += strength * update.dense().reshape(weight.shape)


@dataclass(frozen=True)
class Folder:
    """The study's folder for one architecture of one world."""

    world: World
    root: Path
    arch: str

    def model_path(self, kind: str, seed: int) -> Path:
        """A base; a kind that names a pair has the model of its target."""
        kind = self.world.model_of(kind)
        seed = BASE_SEED if kind == "source" else seed
        return self.root / self.arch / f"{kind}-{seed}.safetensors"

    def lora_path(self, kind: str, seed: int, adapter: str) -> Path:
        """The adapter of that seed on a kind of base: a source's, or the oracle of a target."""
        kind = self.world.model_of(kind)
        return self.root / self.arch / f"{kind}-{seed}-{adapter}.safetensors"

    def source_lora_path(self, kind: str, seed: int, adapter: str) -> Path:
        """The adapter that is moved to a kind of target."""
        return self.lora_path(self.world.source_of(kind), seed, adapter)

    def words_path(self) -> Path:
        """The source that trains the text encoder."""
        return self.root / self.world.teaches_words / f"source-{BASE_SEED}.safetensors"

    def load_model(self, kind: str, seed: int) -> nn.Module:
        """A base in evaluation mode."""
        model = self.world.new_model(self.arch, self.world.model_of(kind))
        model.load_state_dict(load_file(self.model_path(kind, seed)))
        return model.eval().requires_grad_(False)

    def load_source(self, kind: str, seed: int) -> nn.Module:
        """The base whose adapters are moved to a kind of target."""
        return self.load_model(self.world.source_of(kind), seed)

    def base_needs(self, kind: str, seed: int) -> tuple[Path, ...]:
        """Files that must be there before a base is made."""
        if kind == "source":
            words = bool(self.world.teaches_words) and self.arch != self.world.teaches_words
            return (self.words_path(),) if words else ()
        names, _ = self.world.merged.get(kind, ((), 0.0))
        merged = [self.lora_path("source", seed, name) for name in names]
        blended = [self.model_path(part, seed) for part in self.world.blended.get(kind, {})]
        return (self.model_path("source", BASE_SEED), *merged, *blended)

    def make_base(self, kind: str, seed: int, out: Path) -> None:
        """Trains, merges or blends a base."""
        world = self.world
        if kind == "source":
            needs = self.base_needs(kind, seed)
            words = Folder(world, self.root, world.teaches_words)
            source = words.load_model("source", BASE_SEED) if needs else None
        else:
            source = self.load_model("source", BASE_SEED)
        if kind in world.merged:
            model = self._merge(kind, seed, source)
        elif kind in world.blended:
            model = self._blend(kind, seed)
        else:
            model = train_base(world, self.arch, kind, seed, source)
        save_file(model.state_dict(), out)

    def _merge(self, kind: str, seed: int, source: nn.Module) -> nn.Module:
        """The source with LoRAs in its weights."""
        names, weight = self.world.merged[kind]
        merge_loras(backbone(source), [self.lora_path("source", seed, a) for a in names], weight)
        return source

    def _blend(self, kind: str, seed: int) -> nn.Module:
        """The weighted mean of fine-tunes."""
        parts = self.world.blended[kind]
        models = {part: self.load_model(part, seed).state_dict() for part in parts}
        model = self.load_model("source", BASE_SEED)
        mean = {
            name: sum(weight * models[part][name] for part, weight in parts.items())
            if value.is_floating_point()
            else value
            for name, value in model.state_dict().items()
        }
        model.load_state_dict(mean)
        return model

    def lesson(self, kind: str, seed: int, adapter: str, split: str) -> Lesson:
        """What an adapter is about on a target, in the target's look."""
        kind = self.world.model_of(kind)
        model = self.load_model(kind, seed)
        teacher = None
        if kind in self.world.distilled and adapter != "fewstep":
            teacher = self.load_model("source", BASE_SEED)
            with apply_updates(teacher, load_lora(self.lora_path("source", seed, adapter))):
                teacher = copy.deepcopy(teacher)
        return make_lesson(self.world, kind, adapter, model, split, seed, teacher)

    def lora_needs(self, kind: str, seed: int, adapter: str) -> tuple[Path, ...]:
        """Files that must be there before an adapter is trained."""
        needs = (self.model_path("source", BASE_SEED), self.model_path(kind, seed))
        if kind in self.world.distilled and adapter != "fewstep":
            needs += (self.lora_path("source", seed, adapter),)
        return needs

    def make_lora(self, kind: str, seed: int, adapter: str, out: Path) -> None:
        """Trains an adapter."""
        lesson = self.lesson(kind, seed, adapter, "train")
        model = self.load_model(kind, seed)
        save_lora(train_lora(self.world, self.arch, adapter, seed, model, lesson), out)
