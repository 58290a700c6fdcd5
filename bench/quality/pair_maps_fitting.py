"""Maps between two models: what both are asked, the sums over it, and how maps are fitted to them.

Both models see the same noised images. For every linear layer a map T takes what the target reads
to what the source reads, and a map M what reaches the target's output to what reaches the source's,
when random numbers are propagated back from the prediction. To first order a LoRA changes the
prediction by Σ gᵀ·ΔW·x, so Mᵀ·ΔW·T changes the target as ΔW changes the source.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from contenders import Updates
from crossed import COARSE, PIXELS, Move
from crossing import Crossing, sample
from crossing_ideas import Drawn, LinearMap
from probing import Case
from torch import Tensor, nn
from worlds import backbone, load_world

from prolora import LowRank

CROSSING = "crossing"
IMAGES, STEPS, TIMES, BATCH, TOKENS = 48, 10, 6, 48, 12
"""Images of each model, steps of their samplers, noised states of an image, and the tokens of a
state that the maps are fitted to."""
FREE_SHARE = 0.1
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0)

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

WAYS: dict[str, tuple[str, str, str, bool]] = {
    "outputs, ridge": ("ridge", "y", "ridge", False),
    "outputs, rotation": ("rotation", "y", "rotation", False),
    "outputs, whitened": ("whitened", "y", "whitened", False),
    "slopes, ridge": ("ridge", "g", "ridge", False),
    "slopes, rotation": ("ridge", "g", "rotation", False),
    "slopes, ridge, to all that read the same": ("ridge", "g", "ridge", True),
}
BEST = "slopes, ridge"


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
