"""Maps between two models that move any LoRA: ``python bench/quality/pair_maps.py --work DIR``.

DIR is the folder of study.py, --crossed that of crossed.py; nothing is written into them. Both
models see the same noised images. For every linear layer a map T takes what the target reads to
what the source reads, and a map M what reaches the target's output to what reaches the source's,
when random numbers are propagated back from the prediction. To first order a LoRA changes the
prediction by Σ gᵀ·ΔW·x, so Mᵀ·ΔW·T changes the target as ΔW changes the source. The maps are fitted
once for a pair; docs/fit_measured.md says what they are worth.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from contenders import Updates, scale_updates
from crossed import COARSE, PIXELS, Move
from crossed import PAIRS as CROSSED
from crossing import Crossing, sample
from crossing_ideas import Drawn, LinearMap
from evidence import ROOT, fill_page
from jobs import Job, run_jobs
from probing import Case
from results import Row, git, round_numbers
from scoring import apply_updates
from tables import format_table
from torch import Tensor, nn
from worlds import backbone, load_world

from prolora import LowRank, probe
from prolora.probe.fitting import joint
from prolora.probe.fitting.start import StartingPoint
from prolora.probe.settings import FitSettings
from prolora.probe.workload import Workload

RESULTS = ROOT / "bench/results/pair_maps.json"
CROSSING = "crossing"
IMAGES, STEPS, TIMES, BATCH, TOKENS = 48, 10, 6, 48, 12
"""Images of each model, steps of their samplers, noised states of an image, and the tokens of a
state that the maps are fitted to."""
FREE_SHARE = 0.1
JUDGED = 24
"""States on which a strength is chosen."""
STRENGTHS = (0.5, 1.0, 1.5, 2.0)
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0)
PARTS = r"transformer_blocks\.\d+\.|single_transformer_blocks\.\d+\."

Models = tuple[nn.Module, nn.Module]
Matrices = dict[str, Tensor]


@dataclass(frozen=True)
class States:
    """What both models are asked, row by row the same.

    Attributes:
        ours: arguments of the source.
        theirs: arguments of the target.
        pull: cotangent of the target's prediction -> of the source's.
        push: change of the source's prediction -> of the target's.
    """

    ours: tuple[Tensor, ...]
    theirs: tuple[Tensor, ...]
    pull: Callable[[Tensor], Tensor] = lambda slope: slope
    push: Callable[[Tensor], Tensor] = lambda change: change


class Pair:
    """Two models of the study, their LoRAs, and states that both are asked about.

    Attributes:
        asks_for_concept: whether seven in ten prompts have the word that no base has learnt.
    """

    asks_for_concept = False

    def __init__(self, kind: str, seed: int, adapter: str, roots: Mapping[str, Path]) -> None:
        """Loads the case of one LoRA."""
        self.kind, self.seed, self.adapter = kind, seed, adapter
        self.world = load_world("icons")
        if kind == CROSSING:
            study = Crossing(self.world, roots["crossed"])
            self.case: Case | Move = Move(study, (PIXELS, COARSE), seed, adapter)
            self.codec = study.codec("coarse")
        else:
            self.case = Case(self.world, roots["icons"], "flux", "flux", kind, seed, adapter)

    @property
    def models(self) -> Models:
        """Source and target."""
        return self.case.source, self.case.target

    def draw(self, images: int, steps: int, seed: int) -> Drawn:
        """Images of both models, in the latents of each."""
        generator = torch.Generator().manual_seed(seed)
        y = self.world.draw_prompts(2 * images, generator, self.asks_for_concept)
        if self.kind == CROSSING:
            ours = sample(self.world, PIXELS, self.models[0], y[:images], seed, steps)
            theirs = sample(self.world, COARSE, self.models[1], y[images:], seed + 1, steps)
            with torch.no_grad():
                drawn = self.codec.encode(ours), self.codec.decode(theirs)
            return Drawn(torch.cat([ours, drawn[1]]), torch.cat([drawn[0], theirs]), y)
        halves = y.split(images)
        x = [
            self.world.sample(model, part, steps, self.world.guidance, seed + i)
            for i, (model, part) in enumerate(zip(self.models, halves, strict=True))
        ]
        return Drawn(torch.cat(x), torch.cat(x), y)

    def states(self, drawn: Drawn, times: int, seed: int, batch: int = BATCH) -> Iterator[States]:
        """Every image at fresh noise and that many times, a tenth without a prompt."""
        generator = torch.Generator().manual_seed(seed)
        n = times * len(drawn.prompts)
        rows = torch.randperm(n, generator=generator) % len(drawn.prompts)
        t = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
        free = torch.rand(n, generator=generator) < FREE_SHARE
        y = torch.where(free, self.world.null_prompt, drawn.prompts[rows])
        crossed = LinearMap({"all": drawn}) if self.kind == CROSSING else None
        for some, at, prompts in zip(
            rows.split(batch), t.split(batch), y.split(batch), strict=True
        ):
            clean = drawn.ours[some], drawn.theirs[some]
            noise = torch.randn(clean[0].shape, generator=generator)
            noises = noise, noise
            if crossed is not None:
                theirs = torch.randn(clean[1].shape, generator=generator)
                noises = crossed.couple_noise(theirs, noise), theirs
            s = at[:, None, None, None]
            asked = [
                ((1 - s) * x + s * e, 1000 * at, self.world.tokens(model, prompts))
                for x, e, model in zip(clean, noises, self.models, strict=True)
            ]
            if crossed is None:
                yield States(*asked)
            else:
                pull = functools.partial(self._pull, clean[0])
                yield States(*asked, pull, functools.partial(self._push, clean[0]))

    def _pull(self, x: Tensor, slope: Tensor) -> Tensor:
        """A cotangent of the target's latents as one of pixels."""
        x = x.clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad((self.codec.encode(x) * slope).sum(), x)[0]

    @torch.no_grad()
    def _push(self, x: Tensor, change: Tensor) -> Tensor:
        """What a change of the velocity in pixels changes in the target's latents."""
        return self.codec.encode(x) - self.codec.encode(x - change)

    def names(self) -> tuple[list[str], list[str]]:
        """Modules of source and target that LoRAs change."""
        pattern = self.world.adapted["flux"]
        ours, theirs = (
            [n for n, _ in backbone(model).named_modules() if re.fullmatch(pattern, n)]
            for model in self.models
        )
        return ours, theirs


def group_of(name: str) -> str:
    """What modules that read the same have in common."""
    name = re.sub(r"attn\.add_._proj$", "words", name)
    if name.startswith("single"):
        name = name.replace("proj_mlp", "attn.to_q")
    return re.sub(r"attn\.to_[qkv]$", "reads", name)


def group_modules(names: list[str]) -> dict[str, list[str]]:
    """Group -> its modules."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(group_of(name), []).append(name)
    return groups


def match_groups(ours: list[str], theirs: list[str]) -> dict[str, str]:
    """Group of the source -> that of the target, in the block of the same relative depth."""

    def depths(names: list[str]) -> dict[str, int]:
        found: dict[str, set[str]] = {}
        for name in names:
            kind, index = re.match(r"(\w+)\.(\d+)\.", name).groups()  # type: ignore[union-attr]
            found.setdefault(kind, set()).add(index)
        return {kind: len(indices) for kind, indices in found.items()}

    a, b = depths(ours), depths(theirs)
    matched = {}
    for group in group_modules(ours):
        kind, index, rest = re.match(r"(\w+)\.(\d+)\.(.*)", group).groups()  # type: ignore[union-attr]
        there = int((int(index) + 0.5) / a[kind] * b[kind])
        matched[group] = f"{kind}.{there}.{rest}"
    return matched


@dataclass
class Moments:
    """Sums over rows of the target and of the source: of squares, and of products of the two."""

    theirs: Tensor | float = 0.0
    ours: Tensor | float = 0.0
    both: Tensor | float = 0.0

    def add(self, theirs: Tensor, ours: Tensor) -> None:
        """Adds rows [n, d] of either."""
        self.theirs = self.theirs + (theirs.mT @ theirs).double()
        self.ours = self.ours + (ours.mT @ ours).double()
        self.both = self.both + (theirs.mT @ ours).double()

    def part(self, theirs: slice, ours: slice) -> Moments:
        """Those of some columns."""
        return Moments(self.theirs[theirs, theirs], self.ours[ours, ours], self.both[theirs, ours])

    def swapped(self) -> Moments:
        """Source and target in each other's place."""
        return Moments(self.ours, self.theirs, self.both.mT)


def fit_ridge(fit: Moments, judge: Moments) -> tuple[Tensor, float]:
    """The map [source, target] by least squares, and the share that it explains of held-out rows.

    The penalty is the one of PENALTIES that explains most of them.
    """
    return fit_ridges(fit, judge, [slice(None)])[0]


def fit_ridges(fit: Moments, judge: Moments, columns: list[slice]) -> list[tuple[Tensor, float]]:
    """`fit_ridge` of several parts of the source, each with a penalty of its own."""
    values, vectors = torch.linalg.eigh(fit.theirs)
    turned, asked = vectors.mT @ fit.both, vectors.mT @ judge.both
    square = vectors.mT @ judge.theirs @ vectors
    found = []
    for part in columns:
        energy = max(float(judge.ours[part, part].trace()), 1e-30)
        best = torch.zeros(0), -torch.inf
        for penalty in PENALTIES:
            made = turned[:, part] / (values + penalty * values.mean())[:, None]
            share = float((made * (2 * asked[:, part] - square @ made)).sum()) / energy
            if share > best[1]:
                best = made, share
        found.append(((vectors @ best[0]).mT, best[1]))
    return found


def fit_rotation(fit: Moments, judge: Moments) -> tuple[Tensor, float]:
    """The orthogonal map that fits best, times the factor that does (Procrustes)."""
    left, _, right = torch.linalg.svd(fit.both.mT, full_matrices=False)
    turn = left @ right
    size = (turn @ fit.both).trace() / (turn @ fit.theirs @ turn.mT).trace()
    return size * turn, float("nan")


def fit_whitened(fit: Moments, judge: Moments) -> tuple[Tensor, float]:
    """Canonical correlations: white rows are turned into white rows, and coloured again."""

    def power(square: Tensor, exponent: float) -> Tensor:
        values, vectors = torch.linalg.eigh(square)
        return vectors * values.clamp_min(1e-4 * values[-1]) ** exponent @ vectors.mT

    white = power(fit.ours, -0.5) @ fit.both.mT @ power(fit.theirs, -0.5)
    left, _, right = torch.linalg.svd(white, full_matrices=False)
    return power(fit.ours, 0.5) @ left @ right @ power(fit.theirs, -0.5), float("nan")


FITS = {"ridge": fit_ridge, "rotation": fit_rotation, "whitened": fit_whitened}


@dataclass
class Study:
    """The sums of one pair, in two halves: for the maps, and for their penalties.

    Attributes:
        pair: of models.
        matched: group of the source -> of the target.
        sums: half -> (kind, group of the source) -> sums; kinds are what is read ("x"), made ("y")
            and sent back ("g").
        columns: side -> module -> its columns in the sums of its group.
        seconds: of sampling, and of collecting.
        predictions: of both models.
    """

    pair: Pair
    matched: dict[str, str]
    sums: tuple[dict[tuple[str, str], Moments], ...] = field(default_factory=lambda: ({}, {}))
    columns: tuple[dict[str, slice], ...] = field(default_factory=lambda: ({}, {}))
    seconds: dict[str, float] = field(default_factory=dict)
    predictions: int = 0

    @classmethod
    def collect(cls, pair: Pair, images: int = IMAGES, times: int = TIMES) -> Study:
        """Samples both models, and runs them forwards and backwards on the same states."""
        ours, theirs = pair.names()
        study = cls(pair, match_groups(ours, theirs))
        groups = group_modules(ours), group_modules(theirs)
        with counted(pair.models) as count:
            began = time.process_time()
            drawn = pair.draw(images, STEPS, seed=11)
            study.seconds["sample"] = time.process_time() - began
            generator = torch.Generator().manual_seed(5)
            for i, states in enumerate(pair.states(drawn, times, seed=7)):
                slope = torch.randn(states.theirs[0].shape, generator=generator)
                slopes = states.pull(slope), slope
                seen = [
                    trace_model(model, asked, names, part)
                    for model, asked, names, part in zip(
                        pair.models,
                        (states.ours, states.theirs),
                        (ours, theirs),
                        slopes,
                        strict=True,
                    )
                ]
                study._add(seen, groups, study.sums[i % 4 == 3], generator)
            study.seconds["collect"] = time.process_time() - began - study.seconds["sample"]
        study.predictions = count[0]
        return study

    def _add(
        self,
        seen: list[dict[str, Matrices]],
        groups: tuple[dict[str, list[str]], ...],
        sums: dict[tuple[str, str], Moments],
        generator: torch.Generator,
    ) -> None:
        picked: dict[int, Tensor] = {}
        for ours, theirs in self.matched.items():
            both = groups[0][ours], groups[1][theirs]
            tokens = seen[0]["x"][both[0][0]].shape[1]
            if tokens not in picked:
                picked[tokens] = torch.randperm(tokens, generator=generator)[:TOKENS]
            for kind in "xyg":
                rows = []
                for side, names in enumerate(both):
                    parts = [seen[side][kind][n][:, picked[tokens]].flatten(0, 1) for n in names]
                    rows.append(parts[0] if kind == "x" else torch.cat(parts, 1))
                    ends = torch.tensor([0, *(p.shape[1] for p in parts)]).cumsum(0).tolist()
                    if kind == "g":
                        self.columns[side].update(
                            zip(names, map(slice, ends[:-1], ends[1:]), strict=True)
                        )
                sums.setdefault((kind, ours), Moments()).add(rows[1], rows[0])

    def fit(self, inner: str, kind: str, outer: str, whole: bool) -> Maps:
        """Maps of one way.

        Args:
            inner: how the maps of what is read are fitted.
            kind: what those of the outputs are fitted to, "y" or "g".
            outer: how.
            whole: whether a module sends to all of the target's that read the same.
        """
        began = time.process_time()
        maps = Maps(self.pair)
        groups = [group_modules(names) for names in self.pair.names()]
        for group, there in self.matched.items():
            read, maps.explained[group] = FITS[inner](*(half["x", group] for half in self.sums))
            ours, theirs = groups[0][group], groups[1][there]
            columns = [self.columns[0][name] for name in ours]
            if whole:
                fitted = fit_ridges(*(half[kind, group] for half in self.sums), columns)
            else:
                fitted = [
                    self._fit_alone(kind, outer, group, names)
                    for names in zip(ours, theirs, strict=True)
                ]
            for i, (name, (made, share)) in enumerate(zip(ours, fitted, strict=True)):
                sent = theirs if whole else [theirs[i]]
                sizes = [self.columns[1][n].stop - self.columns[1][n].start for n in sent]
                split = made.mT.float().split(sizes)
                maps.read[name], maps.explained[name] = read.float(), share
                maps.written[name] = dict(zip(sent, split, strict=True))
        maps.seconds = time.process_time() - began
        return maps

    def _fit_alone(
        self, kind: str, outer: str, group: str, names: tuple[str, str]
    ) -> tuple[Tensor, float]:
        """The map between two modules, [source, target]."""
        ours, theirs = (at[name] for at, name in zip(self.columns, names, strict=True))
        parts = [half[kind, group].part(theirs, ours) for half in self.sums]
        if kind == "g":
            return FITS[outer](*parts)
        made, share = FITS[outer](*(part.swapped() for part in parts))
        return made.mT, share


@dataclass
class Maps:
    """What moves any LoRA of a pair.

    Attributes:
        pair: of models.
        read: module of the source -> T, from what the target reads to what it reads.
        written: module of the source -> module of the target -> Mᵀ, from its output's changes.
        explained: module, or group -> share of held-out rows that its map explains.
        seconds: that fitting them took.
    """

    pair: Pair
    read: Matrices = field(default_factory=dict)
    written: dict[str, Matrices] = field(default_factory=dict)
    explained: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def move(self, lora: Updates) -> Updates:
        """The LoRA of the target, ranks added up where modules share a place."""
        moved: dict[str, list[LowRank]] = {}
        for name, update in lora.items():
            down = update.down @ self.read[name]
            for there, made in self.written[name].items():
                moved.setdefault(there, []).append(LowRank(made @ update.up, down))
        return {
            name: LowRank(
                torch.cat([part.up for part in parts], 1), torch.cat([part.down for part in parts])
            )
            for name, parts in moved.items()
        }


@contextmanager
def counted(models: Models) -> Iterator[list[int]]:
    """Counts the samples that models predict."""
    count = [0]

    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        count[0] += len(args[0])

    hooks = [model.register_forward_pre_hook(add) for model in models]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


def trace_model(
    model: nn.Module, asked: tuple[Tensor, ...], names: list[str], slope: Tensor
) -> dict[str, Matrices]:
    """What modules read and make, and what a cotangent of the prediction sends back to it."""
    read: Matrices = {}
    made: Matrices = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            read[name], made[name] = args[0].detach(), y

        return keep

    hooks = [backbone(model).get_submodule(n).register_forward_hook(hook(n)) for n in names]
    x, at, tokens = asked
    with torch.enable_grad():
        out = model(x.clone().requires_grad_(), at, tokens.clone().requires_grad_())[0]
        for handle in hooks:
            handle.remove()
        back = torch.autograd.grad((out * slope).sum(), [made[n] for n in names], allow_unused=True)
    sent = {
        n: torch.zeros_like(made[n]) if part is None else part
        for n, part in zip(names, back, strict=True)
    }
    return {"x": read, "y": {n: y.detach() for n, y in made.items()}, "g": sent}


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


WAYS: dict[str, tuple[str, str, str, bool]] = {
    "outputs, ridge": ("ridge", "y", "ridge", False),
    "outputs, rotation": ("rotation", "y", "rotation", False),
    "outputs, whitened": ("whitened", "y", "whitened", False),
    "slopes, ridge": ("ridge", "g", "ridge", False),
    "slopes, rotation": ("ridge", "g", "rotation", False),
    "slopes, ridge, to all that read the same": ("ridge", "g", "ridge", True),
}
BEST = "slopes, ridge"


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


WORD = ", asked with the concept's word"
SCORED = (0.5, 1.0, 1.5, 2.0)
SMALL = ((8, 10, 4), (8, 10, 12))
"""Images, steps of the samplers and of the fit, where a fit starts from what was moved."""


def adapters_of(kind: str) -> tuple[str, ...]:
    """The four LoRAs of a pair."""
    return ("neon", "duotone", "concept", "shaded" if kind == CROSSING else "fewstep")


def try_maps(
    kind: str, seed: int, roots: Mapping[str, Path], asked: Mapping[str, Any], out: Path
) -> None:
    """All LoRAs of a pair, moved in every way that is asked for, and what it took."""
    pairs = {name: Pair(kind, seed, name, roots) for name in asked["adapters"] or adapters_of(kind)}
    first = next(iter(pairs.values()))
    first.asks_for_concept = asked["concept"]
    study = Study.collect(first, asked["images"], asked["times"])
    judged = Judged.of(first)
    maps = {way: study.fit(*WAYS[way]) for way in asked["ways"] if way in WAYS}
    about = {
        "kind": kind,
        "seed": seed,
        "seconds": study.seconds | {way: made.seconds for way, made in maps.items()},
        "predictions": study.predictions,
        "concept": asked["concept"],
        "explained": maps[BEST].explained if BEST in maps else {},
    }
    rows: list[Row] = []
    for name, pair in pairs.items():
        lora = pair.case.lora
        for way, made in maps.items():
            rows += score_way(pair, judged, lora, way, made)
        if asked["concept"]:
            rows = [row | {"way": row["way"].removesuffix(WORD) + WORD} for row in rows]
        row = {"kind": kind, "seed": seed, "adapter": name}
        if copied := copy_of(pair):
            rows.append(row | {"way": "copy", "scores": score_all(pair, copied, (1.0,))})
        if name in asked["fitted"] and kind != CROSSING:
            moved = maps[asked["ways"][-1]].move(lora)
            strength, _ = judged.best_strength(lora, moved)
            for numbers in SMALL:
                for start in ({}, scale_updates(moved, strength)):
                    rows.append(row | {"way": "fit"} | fit_some(pair, start, *numbers))
    out.write_text(json.dumps({"about": about, "rows": rows}))


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
    scores = score_all(pair, moved, SCORED)
    rows.append(row | {"way": way, "scores": scores, "score": scores[f"{strength:g}"]} | facts)
    if way == BEST:
        began = time.process_time()
        with counted(pair.models) as count:
            weighed = judged.weigh_parts(lora, moved)
        facts = {"seconds": {"choose": time.process_time() - began}, "predictions": count[0]}
        scores = score_all(pair, weighed, (1.0, 1.25))
        rows.append(row | {"way": f"{way}; parts", "scores": scores, "score": scores["1"]} | facts)
    return rows


def main() -> None:
    """Tries what is asked for, and fills the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="folder of study.py, icons; none tries nothing")
    parser.add_argument("--crossed", type=Path, help="folder of crossed.py")
    parser.add_argument("--out", type=Path, help="folder for the rows")
    parser.add_argument("--pairs", nargs="+", default=["independent 1"], help="kind and seed")
    parser.add_argument("--adapters", nargs="+", help="all of a pair unless given")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--fitted", nargs="*", default=[], help="LoRAs that are fitted afterwards")
    parser.add_argument("--concept", action="store_true", help="ask with the concept's word, too")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--times", type=int, default=TIMES)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.work:
        roots = {"icons": asked.work, "crossed": asked.crossed}
        jobs = []
        for pair in asked.pairs:
            kind, seed = pair.rsplit(" ", 1)
            run = functools.partial(try_maps, kind, int(seed), roots, vars(asked))
            name = f"{pair}{WORD if asked.concept else ''}.json"
            jobs.append(Job(asked.out / name, (), run))
        run_jobs(jobs)
        RESULTS.write_text(json.dumps(collect(asked.out), indent=0) + "\n")
    results = json.loads(RESULTS.read_text())
    page = ROOT / "docs/fit_measured.md"
    page.write_text(fill_page(page.read_text(), tables_of(results)))


def collect(folder: Path) -> dict[str, Any]:
    """What was measured, and how it was made."""
    parts = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    made = {
        "script": "bench/quality/pair_maps.py",
        "command": "python pair_maps.py --work icons --crossed crossing --out maps --pairs PAIR",
        "commit": git("rev-parse", "--short", "HEAD"),
        "date": git("log", "-1", "--format=%cs"),
        "torch": torch.__version__,
        "threads": 1,
    }
    pairs = [round_numbers(part["about"]) for part in parts]
    return {
        "made": made,
        "pairs": pairs,
        "rows": [round_numbers(r) for p in parts for r in p["rows"]],
    }


def tables_of(results: dict[str, Any]) -> dict[str, str]:
    """Mark on the page -> table."""
    fits = stored_fits()
    return {
        "maps ways": ways_table(results["rows"], fits),
        "maps pairs": pairs_table(results["rows"], fits),
        "maps cost": cost_table(results, fits),
        "maps start": start_table(results["rows"]),
    }


def stored_fits() -> dict[tuple[str, int, str], Row]:
    """Pair, seed and LoRA -> the fit from nothing, at the strength that is written."""
    files = ROOT / "bench/results/probing_icons.json", ROOT / "bench/results/crossing.json"
    icons, crossed = (json.loads(path.read_text())["rows"] for path in files)
    found = {
        (row["kind"], row["seed"], row["adapter"]): row
        for row in icons
        if row["name"] == "study" and row["method"] == "probe"
    }
    for row in crossed:
        if row["pair"] == next(n for n, p in CROSSED.items() if p == (PIXELS, COARSE)):
            if row["method"] == "probe":
                found[CROSSING, row["seed"], row["adapter"]] = row
    return found


def ways_table(rows: list[Row], fits: dict[tuple[str, int, str], Row]) -> str:
    """Every way on the first pair: the score at the strength that was chosen."""
    rows = [row for row in rows if (row["kind"], row["seed"]) == ("independent", 1)]
    names = adapters_of("independent")
    lines = []
    ways = dict.fromkeys(row["way"] for row in rows if "score" in row)
    for way in sorted(ways, key=lambda way: WORD in way):
        part = {row["adapter"]: row["score"] for row in rows if row["way"] == way}
        cells = [f"{part[n]:.2f}" if n in part else "–" for n in names]
        lines.append(
            [way, *cells, f"{mean(part.values()):.2f}" if len(part) == len(names) else "–"]
        )
    fitted = [fits["independent", 1, name]["score"] for name in names]
    lines.append(["*the fit*", *(f"{s:.2f}" for s in fitted), f"{mean(fitted):.2f}"])
    return format_table(["way", *names, "mean"], lines)


def pairs_table(rows: list[Row], fits: dict[tuple[str, int, str], Row]) -> str:
    """The best way on every pair, LoRA by LoRA."""
    lines = []
    for pair in dict.fromkeys((row["kind"], row["seed"]) for row in rows):
        sums = []
        for name in adapters_of(pair[0]):
            part = [r for r in rows if (r["kind"], r["seed"], r["adapter"]) == (*pair, name)]
            copied, moved, parts = (
                next((r for r in part if r["way"] == way), None)
                for way in ("copy", BEST, f"{BEST}; parts")
            )
            if moved is None or parts is None:
                continue
            fitted = fits[(*pair, name)]["score"]
            fixed = moved["scores"]["1"], moved["scores"]["1.5"]
            sums.append((moved["score"], parts["score"], *fixed, fitted))
            lines.append(
                [
                    f"{pair[0]}, seed {pair[1]}",
                    name,
                    f"{copied['scores']['1']:.2f}" if copied else "–",
                    f"{moved['score']:.2f} at {moved['strength']:g}",
                    f"{parts['score']:.2f}",
                    f"{moved['scores']['1']:.2f}",
                    f"{moved['scores']['1.5']:.2f}",
                    f"{fitted:.2f}",
                ]
            )
        if sums:
            means = [mean(part) for part in zip(*sums, strict=True)]
            shares = [f"**{m:.2f}** ({m / means[-1]:.0%})" for m in means[:-1]]
            lines.append([lines[-1][0], "*mean*", "", *shares, f"**{means[-1]:.2f}**"])
    head = ["pair", "LoRA", "copy", "at the chosen strength", "every part at its own", "at 1"]
    return format_table([*head, "at 1.5", "the fit"], lines)


def cost_table(results: dict[str, Any], fits: dict[tuple[str, int, str], Row]) -> str:
    """What is done once for a pair, for every LoRA, and for a fit."""
    lines = []
    asked = sum(map(sum, Workload(FitSettings(), 25).predictions.values()))
    for about in results["pairs"]:
        if about.get("concept"):
            continue
        pair = about["kind"], about["seed"]
        rows = [r for r in results["rows"] if (r["kind"], r["seed"]) == pair]
        seconds = about["seconds"]
        once = seconds["sample"] + seconds["collect"] + seconds[BEST]
        moved = [r for r in rows if r["way"] == BEST]
        parts = [r for r in rows if r["way"] == f"{BEST}; parts"]
        fitted = [sum(fits[(*pair, r["adapter"])]["seconds"].values()) for r in moved]
        move = mean(r["seconds"]["move"] for r in moved)
        choose = mean(r["seconds"]["choose"] for r in moved)
        weigh = mean(r["seconds"]["choose"] for r in parts)
        lines.append(
            [
                f"{pair[0]}, seed {pair[1]}",
                f"{once:.0f} s, {about['predictions']}",
                f"{1000 * move:.0f} ms, 0",
                f"{choose:.1f} s, {moved[0]['predictions']}",
                f"{weigh:.1f} s, {parts[0]['predictions']}",
                f"{mean(fitted):.0f} s, about {asked}"
                if pair[0] != CROSSING
                else f"{mean(fitted):.0f} s",
            ]
        )
    head = ["pair", "maps, once", "moving a LoRA", "a strength", "of every part", "a fit"]
    return format_table(head, lines)


def start_table(rows: list[Row]) -> str:
    """Short fits from what was moved and from nothing, at strength 1 and 1.25."""
    lines = []
    fitted = [row for row in rows if row["way"] == "fit"]
    for key in dict.fromkeys(
        (r["kind"], r["adapter"], r["images"], r["fit_steps"]) for r in fitted
    ):
        part = {
            r["start"]: r
            for r in fitted
            if (r["kind"], r["adapter"], r["images"], r["fit_steps"]) == key
        }
        cells = [
            f"{r['scores']['1']:.2f}, {r['scores']['1.25']:.2f} ({r['predictions']})"
            for r in (part["nothing"], part["moved"])
        ]
        lines.append([*map(str, key), *cells])
    head = ["pair", "LoRA", "images", "steps", "from nothing", "from the moved LoRA"]
    return format_table(head, lines)


def mean(values: Iterable[float]) -> float:
    """Of some numbers."""
    some = list(values)
    return sum(some) / len(some)


if __name__ == "__main__":
    main()
