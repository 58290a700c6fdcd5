"""What LoRAs score that maps between two models moved, and short fits that start from them."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch
from contenders import Updates, scale_updates
from pair_maps_fitting import BEST, STEPS, Maps, Pair, States, counted
from probing import Case
from results import Row
from scoring import apply_updates
from torch import Tensor
from worlds import backbone

from prolora import LowRank, probe
from prolora.probe.fitting import joint
from prolora.probe.fitting.start import StartingPoint
from prolora.probe.settings import FitSettings

JUDGED = 24
"""States on which a strength is chosen."""
STRENGTHS = (0.5, 1.0, 1.5, 2.0)


@dataclass
class Judged:
    """States on which a moved LoRA is compared with what the source does."""

    pair: Pair
    states: list[States]
    plain: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, pair: Pair, n: int = JUDGED, seed: int = 77) -> Judged:
        """Images that the maps were not fitted to."""
        states = list(pair.states(pair.draw(n // 2, STEPS, seed), 1, seed))
        return cls(pair, states, [cls._ask(pair, part) for part in states])

    @staticmethod
    @torch.no_grad()
    def _ask(pair: Pair, states: States) -> tuple[Tensor, Tensor]:
        return pair.models[0](*states.ours)[0], pair.models[1](*states.theirs)[0]

    @torch.no_grad()
    def wanted(self, lora: Updates) -> Tensor:
        """What the LoRA should change."""
        with apply_updates(self.pair.models[0], lora):
            return torch.cat(
                [
                    states.push(self.pair.models[0](*states.ours)[0] - plain[0])
                    for states, plain in zip(self.states, self.plain, strict=True)
                ]
            )

    @torch.no_grad()
    def changed(self, updates: Updates) -> Tensor:
        """What updates of the target change."""
        with apply_updates(self.pair.models[1], updates):
            return torch.cat(
                [
                    self.pair.models[1](*states.theirs)[0] - plain[1]
                    for states, plain in zip(self.states, self.plain, strict=True)
                ]
            )

    def best_strength(self, lora: Updates, moved: Updates) -> tuple[float, float]:
        """The one of STRENGTHS that misses least, and the share reached there."""
        wanted = self.wanted(lora)
        missed = {
            s: float((self.changed(scale_updates(moved, s)) - wanted).square().sum())
            for s in STRENGTHS
        }
        best = min(missed, key=lambda s: missed[s])
        return best, 1 - missed[best] / float(wanted.square().sum())

    def weigh_parts(self, lora: Updates, moved: Updates) -> Updates:
        """Every block's attention and its feed-forward at the strength that least squares gives."""
        parts: dict[tuple[str, bool], Updates] = {}
        for name, update in moved.items():
            block = re.match(r"\w+\.\d+\.", name)[0]  # type: ignore[index]
            parts.setdefault((block, ".attn." in name), {})[name] = update
        wanted = self.wanted(lora)
        changes = torch.stack([self.changed(part).flatten() for part in parts.values()], 1).double()
        square, right = changes.mT @ changes, changes.mT @ wanted.flatten().double()
        square += 0.1 * square.diagonal().mean() * torch.eye(len(square)).double()
        # The penalty draws all of them to the strength that is best for them together.
        whole = changes.sum(1)
        common = (whole @ wanted.flatten().double()) / whole.square().sum()
        right += 0.1 * changes.square().sum(0).mean() * common
        weights = torch.linalg.solve(square, right).tolist()
        return {
            name: LowRank(weight * update.up, update.down)
            for weight, part in zip(weights, parts.values(), strict=True)
            for name, update in part.items()
        }


def fit_some(pair: Pair, moved: Updates, images: int, sampler_steps: int, fit_steps: int) -> Row:
    """A fit by the library of few images or steps, from the moved LoRA; from nothing without one.

    The library starts from what is moved by weights, and goes part of the way where the bases
    differ; from a LoRA that was moved by maps it goes all of the way here.
    """
    case, prefix = pair.case, "backbone."
    assert isinstance(case, Case)
    rank = max(32, *(update.rank for update in case.lora.values()))
    few = {"lora_steps": 4} if case.adapter == "fewstep" else {}
    settings = FitSettings(
        rank=rank,
        seed=100 * case.seed,
        force=True,
        fit_steps=fit_steps,
        start="copy" if moved else "zero",
        **few,
    )
    kept = joint.choose_start
    if moved:
        rival = {prefix + name: update for name, update in moved.items()}
        joint.choose_start = lambda *_: StartingPoint("copy", 1.0, "moved by maps", rival)
    began = time.process_time()
    try:
        result = probe.fit_to_models(
            case.source,
            case.target,
            {prefix + name: update for name, update in case.lora.items()},
            probe.Samplers(*case.samplers(images, sampler_steps)),
            settings,
            rival=rival if moved else {},
        )
    finally:
        joint.choose_start = kept
    verdict = result.report.gate
    updates = {
        name.removeprefix(prefix): LowRank(update.up / verdict.strength, update.down)
        for name, update in result.adapter.updates.items()
    }
    return {
        "images": images,
        "sampler_steps": sampler_steps,
        "fit_steps": fit_steps,
        "start": "moved" if moved else "nothing",
        "scores": score_all(pair, updates, (1.0, 1.25)),
        "share": verdict.share["all"],
        "seconds": time.process_time() - began,
        "predictions": sum(map(sum, result.report.predictions.values())),
    }


def score_all(pair: Pair, updates: Updates, strengths: tuple[float, ...]) -> dict[str, float]:
    """Share of the oracle's gain by strength."""
    return {f"{s:g}": pair.case.score(scale_updates(updates, s)) for s in strengths}


def copy_of(pair: Pair) -> Updates:
    """The LoRA as it is, on the modules of equal shape."""
    if pair.kind == "resized":
        return {}
    if isinstance(pair.case, Case):
        return pair.case.copied()
    inner = backbone(pair.models[1])
    return {
        name: update
        for name, update in pair.case.lora.items()
        if inner.get_submodule(name).weight.shape == update.shape
    }


def score_way(pair: Pair, judged: Judged, lora: Updates, way: str, maps: Maps) -> list[Row]:
    """A LoRA moved by maps, as it is and with every part at a strength of its own."""
    began = time.process_time()
    moved = maps.move(lora)
    seconds = {"move": time.process_time() - began}
    row = {"kind": pair.kind, "seed": pair.seed, "adapter": pair.adapter}
    rows = []
    with counted(pair.models) as count:
        strength, share = judged.best_strength(lora, moved)
        seconds["choose"] = time.process_time() - began - seconds["move"]
    facts = {"strength": strength, "share": share, "seconds": seconds, "predictions": count[0]}
    scores = score_all(pair, moved, STRENGTHS)
    rows.append(row | {"way": way, "scores": scores, "score": scores[f"{strength:g}"]} | facts)
    if way == BEST:
        began = time.process_time()
        with counted(pair.models) as count:
            weighed = judged.weigh_parts(lora, moved)
        facts = {"seconds": {"choose": time.process_time() - began}, "predictions": count[0]}
        scores = score_all(pair, weighed, (1.0, 1.25))
        rows.append(row | {"way": f"{way}; parts", "scores": scores, "score": scores["1"]} | facts)
    return rows
